"""Make torchvision importable beside a torch that its compiled part was not built for.

The torchvision that pip finds is built for CUDA's torch. Beside the CPU's its shared library does not load,
and the import ends at operators that nobody defined. Their signatures are enough for the models of the tests.
"""

import importlib
import sys

import torch

_SIGNATURE = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # its operators go with it


def define() -> None:
    """Define the operators that the import of torchvision asks for, where its own library does not."""
    global _library
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(_SIGNATURE.format(operator))
        importlib.import_module("torchvision")
