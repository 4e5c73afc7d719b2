"""Every call of torch in one forward, shown together with the module that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Observer(Protocol):
    """What sees the calls."""

    def before(self, name: str, where: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Take note of the arguments of a call."""

    def after(self, seen: Any, result: Any) -> Any:
        """Return the result of a call, given what `before` returned."""

    def unseen(self, where: str, leaves: Sequence[Any]) -> None:
        """Take note of an operator that no call in Python shows, as in scripted code."""


@contextmanager
def watched(model: nn.Module, observer: Observer) -> Iterator[Callable[[str], str]]:
    """Show the observer whatever calls torch; yield what names an operator and the module that is running."""
    running: list[str] = []  # names of modules, the innermost last
    handles = []
    calls = _Calls(observer, running)
    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks, and its operators belong to the module around it

            def enter(_: nn.Module, args: Any, name: str = name) -> None:
                running.append(name)

            def leave(_: nn.Module, args: Any, output: Any) -> None:
                running.pop()

            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with calls, _Operators(calls):
            yield calls.where
    finally:
        for handle in handles:
            handle.remove()


class _Calls(TorchFunctionMode):
    """What Python calls of torch: functions, methods and attributes."""

    def __init__(self, observer: Observer, running: list[str]) -> None:
        super().__init__()
        self.observer, self._running = observer, running
        self.inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        seen = self.observer.before(name, self.where(name), args, kwargs)
        self.inside += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside -= 1
        return self.observer.after(seen, result)

    def where(self, name: str) -> str:
        """Name an operator and the module that calls it."""
        module = self._running[-1] if self._running else ""
        return f"{name!r} in {module!r}" if module else f"{name!r} in the network itself"


class _Operators(TorchDispatchMode):
    """What runs outside of all calls in Python."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._calls.inside:
            where = self._calls.where(func.overloadpacket.__name__)
            self._calls.observer.unseen(where, tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _name(func: Any) -> str:
    """Return what functions, methods, operators and their in-place variants have in common."""
    if isinstance(func, OpOverload | OpOverloadPacket):
        return str(func)  # of whatever library
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", name) + ("" if name == "__get__" else " =")
    return name.strip("_")
