"""Which memory a forward reads: what ran, whoever called it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrcompress.calibrate.run import inference
from lrcompress.calibrate.values import run


class Reads(TorchDispatchMode):
    """Notes the memory of every tensor that operators get, those of scripted code included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        self._found |= memory_of(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return func(*args, **kwargs)

    def any_of(self, tensors: Iterable[Tensor]) -> bool:
        """Say whether an operator got one of the tensors, or a view of it."""
        return not self._found.isdisjoint(memory_of(tensors))


def reads(model: nn.Module, inputs: Any) -> Reads:
    """Run the model once; return what was read."""
    found = Reads()
    with inference(model, inputs), found:
        run(model, inputs)
    return found


def memory_of(tensors: Iterable[Tensor]) -> set[int]:
    """Return the addresses of what holds the tensors' values; none of those that hold none."""
    found = set()
    for tensor in tensors:
        try:
            found.add(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # sparse, or a subclass without memory of its own
            continue
    return found - {0}
