"""Who reads what modules give: every use of their outputs and of their own tensors in one forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lrcompress.calibrate.run import inference
from lrcompress.types import Uses

# What these tell of an output is the same whatever its values.
METADATA = frozenset(("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda"))
METADATA |= {"size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point"}

_KEPT = "whatever keeps it after the forward"


def uses(
    model: nn.Module,
    modules: Mapping[str, nn.Module],  # of the model
    run: Callable[[], Any],  # runs the model once
    inputs: Any = None,  # which the model may write to
) -> dict[str, Uses]:
    """Follow the outputs of modules through whatever torch calls; of modules that run.

    An output that still exists when the forward is over is kept by somebody: it is returned, or an attribute
    or a hook holds it. What reads tensors in foreign code without calling torch is not seen.
    """
    watch = _Watch(modules)
    with inference(model, inputs):
        with _Calls(watch), _Operators(watch), watch.attached():
            result = run()
        found = watch.found()  # before what the forward left in attributes goes
    del result  # only now: what it holds is kept
    return found


class _Watch:
    """Knows which tensors the modules gave, which they own, and which modules are running."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._running: list[str] = []  # the innermost last
        self._calls: Counter[str] = Counter()
        self._axes: dict[str, int] = {}
        self._readers: dict[str, list[str]] = {name: [] for name in modules}  # of each one's output
        self._others: dict[str, list[str]] = {name: [] for name in modules}  # calls that read the output
        self._foreign: dict[str, list[str]] = {name: [] for name in modules}  # that read its own tensors
        self._made: Any = WeakTensorKeyDictionary()  # output -> its module
        self._own: Any = WeakTensorKeyDictionary()  # parameter or buffer -> its module
        for name, module in modules.items():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self._own[tensor] = name

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hear of every call of the modules."""
        handles = []
        try:
            for name, module in self._modules.items():

                def enter(_: nn.Module, args: Any, name: str = name) -> None:
                    self._running.append(name)
                    self._calls[name] += 1

                def leave(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    self._running.pop()
                    if isinstance(output, Tensor):  # a user's hook may have made it something else
                        self._made[output] = name  # of a module that works in place: no longer its input's
                        self._axes[name] = output.ndim

                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def see(self, value: Any, called: str) -> None:
        """Take note of what reads a tensor: the running module, or else a call of torch."""
        if not isinstance(value, Tensor):
            return
        maker, owner = self._made.get(value), self._own.get(value)
        if maker is not None and called not in METADATA:
            if self._running:
                _add(self._readers[maker], self._running[-1])
            else:
                _add(self._others[maker], called)
        if owner is None or owner in self._running:
            return
        # Once folded in, a batch norm has no tensors left to be asked even for their type.
        if called not in METADATA or isinstance(self._modules[owner], _BatchNorm):
            _add(self._foreign[owner], called)

    def found(self) -> dict[str, Uses]:
        """Return the uses of each module that ran."""
        for maker in self._made.values():
            _add(self._others[maker], _KEPT)
        lists = (self._readers, self._others, self._foreign)
        return {
            name: Uses(count, self._axes.get(name, 0), *(tuple(each[name]) for each in lists))
            for name, count in self._calls.items()
        }


class _Calls(TorchFunctionMode):
    """Shows what Python calls of torch: attributes and arrays, too, which are no operators."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        called = getattr(func, "__name__", str(func)).partition(".")[0]  # an operator's without its overload
        if called == "__get__":  # an attribute
            called = getattr(func.__self__, "__name__", called)
        for leaf in tree_leaves((args, kwargs)):
            self._watch.see(leaf, called)
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """Shows what runs below Python: scripted modules and extensions that call torch."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            self._watch.see(leaf, func.overloadpacket.__name__)
        return func(*args, **kwargs)


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)
