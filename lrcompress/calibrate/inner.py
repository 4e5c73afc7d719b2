"""Which modules with a forward of their own run a layer in it: seen while the model runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lrcompress.calibrate.run import inference
from lrcompress.calibrate.uses import METADATA

_LINEAR = inspect.signature(lambda input, weight, bias=None: None)
_CONVOLUTION = inspect.signature(
    lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None
)
_SIGNATURES: dict[Any, tuple[type[nn.Module], inspect.Signature]] = {
    F.linear: (nn.Linear, _LINEAR),
    F.conv1d: (nn.Conv1d, _CONVOLUTION),
    F.conv2d: (nn.Conv2d, _CONVOLUTION),
    F.conv3d: (nn.Conv3d, _CONVOLUTION),
}


def inner_calls(
    model: nn.Module,
    modules: Mapping[str, nn.Module],  # of the model: subclasses of layers with a forward of their own
    run: Callable[[], Any],  # runs the model once
    inputs: Any = None,  # which the model may write to
) -> dict[str, str | None]:
    """Say why a module runs no layer that it declares; None for those that do, once in each forward.

    Such a forward hands its own weight and bias to F.linear or a convolution, in the geometry that the module
    declares but for the padding, whatever it does before and after.
    """
    watch = _Watch(modules)
    with inference(model, inputs), watch, watch.attached():
        run()
    return {
        name: watch.reasons.get(name, "its forward did not run on the example inputs") for name in modules
    }


class _Watch(TorchFunctionMode):
    """Sees what the running module does with its weight."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.reasons: dict[str, str | None] = {}  # of the modules that ran
        self._modules = modules
        self._running: list[str] = []  # the innermost last
        self._uses: list[int] = []  # of the weight, in these forwards
        self._owner: Any = WeakTensorKeyDictionary()  # weight -> its module
        for name, module in modules.items():
            self._owner[module.weight] = name

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hear of every forward of the modules."""
        handles = []
        try:
            for name, module in self._modules.items():
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                handles.append(module.register_forward_hook(lambda *_: self._leave()))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> None:
        self._running.append(name)
        self._uses.append(0)
        self.reasons.setdefault(name, None)

    def _leave(self) -> None:
        name, uses = self._running.pop(), self._uses.pop()
        if uses == 0:
            self._refuse(name, "its forward does not call F.linear or a convolution with its weight")
        elif uses > 1:
            self._refuse(name, f"its forward uses its weight {uses} times")

    def _refuse(self, name: str, reason: str) -> None:
        self.reasons[name] = self.reasons[name] or reason

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = self._running[-1] if self._running else None
        leaves = tree_leaves((args, kwargs)) if name is not None else ()
        if name is not None and any(isinstance(x, Tensor) and self._owner.get(x) == name for x in leaves):
            self._see(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _see(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        """Take note of a call with the weight of the module that runs."""
        called = getattr(func, "__name__", str(func))
        if called == "__get__":  # an attribute
            called = getattr(func.__self__, "__name__", called)
        if called in METADATA:
            return
        module: Any = self._modules[name]
        kind, signature = _SIGNATURES.get(func, (None, _LINEAR))
        if kind is None or not isinstance(module, kind):
            self._refuse(name, f"its forward reads its weight in {called}")
            return
        self._uses[-1] += 1
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        _, weight, bias, *geometry = given.arguments.values()
        if weight is not module.weight:
            self._refuse(name, f"its forward reads its weight in {called}")
        elif bias is not module.bias:
            self._refuse(name, f"its forward gives {called} another bias than its own")
        elif geometry and not _declared(module, *geometry):
            self._refuse(name, f"its forward gives {called} another geometry than it declares")


def _declared(module: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Say whether a convolution is the declared one, but for padding by the same numbers on both sides."""
    axes = len(module.kernel_size)

    def each(size: Any) -> tuple[int, ...]:
        sizes = (size,) if isinstance(size, int) else tuple(size)
        return sizes * axes if len(sizes) == 1 else sizes

    same = all(
        each(given) == each(own) for given, own in ((stride, module.stride), (dilation, module.dilation))
    )
    return same and groups == module.groups and padding != "same"
