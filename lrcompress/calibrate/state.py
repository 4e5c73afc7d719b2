"""What a forward may change beside its outputs, and how all of it comes back."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS: tuple[type, ...] = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


@contextmanager
def unchanged(
    model: nn.Module,
    *values: Any,  # inputs
) -> Iterator[None]:
    """Put back what the model's code changes meanwhile, in the model and in the values.

    These are modes, hooks, ``requires_grad``, buffers, also new ones, attributes with the lists, dicts and
    tensors in them, objects of the packages that the model's classes come from, and the states of torch's,
    NumPy's and Python's random numbers. The values of parameters are not watched.
    """
    before = _State(model, values)
    numbers = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        devices = {t.device for t in (*model.parameters(), *model.buffers())}
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in sorted({device.type for device in devices} - {"cpu", "meta"}):
            indices = sorted({d.index or 0 for d in devices if d.type == kind})
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
            yield
        finally:
            before.restore()
            random.setstate(numbers[0])
            np.random.set_state(numbers[1])


class _State:
    """Holds copies of everything that can be written to."""

    def __init__(self, model: nn.Module, values: tuple[Any, ...]) -> None:
        self._held: dict[int, Any] = {}  # keeps ids from being used again
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        packages = {type(module).__module__.partition(".")[0] for module in modules}
        self._packages = packages - {"torch", "builtins"} | {"collections"}
        waiting: list[Any] = [*modules, *model.buffers(), *values]
        while waiting:
            waiting.extend(self._note(waiting.pop()))

    def _note(self, value: Any) -> list[Any]:
        """Copy one value; return what it holds."""
        if isinstance(value, str | int | float | None | type) or id(value) in self._held:
            return []
        self._held[id(value)] = value
        if isinstance(value, Tensor):
            if not (isinstance(value, nn.Parameter) or value.is_meta or value.is_nested):
                self._tensors.append((value, value.detach().clone()))
        elif isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))
        elif type(value) in _CONTAINERS:
            self._containers.append((value, value.copy()))
            return list(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):
            return list(value)
        elif isinstance(value, torch.jit.ScriptModule):
            return list(value.buffers())
        elif isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] in self._packages:
            attributes: dict[str, Any] = getattr(value, "__dict__", {})
            self._attributes.append((attributes, dict(attributes)))
            return list(attributes.values())
        return []

    @torch.no_grad()
    def restore(self) -> None:
        """Write back what changed."""
        for attributes, saved in self._attributes:
            if not _same(attributes, saved):
                attributes.clear()
                attributes.update(saved)
        for container, saved in self._containers:
            if not _same(container, saved):
                container.clear()
                (container.update if isinstance(container, dict | set) else container.extend)(saved)
        for tensor, values in self._tensors:
            if not torch.equal(tensor, values):
                with torch.inference_mode(tensor.is_inference()):
                    tensor.detach().copy_(values)
        for generator, state in self._generators:
            generator.set_state(state)
        for module, mode in self._modes:
            module.training = mode
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def _same(now: Any, saved: Any) -> bool:
    """Say whether a container holds the very same objects in the same order."""
    if len(now) != len(saved):
        return False
    if isinstance(now, dict):
        pairs = zip(now.items(), saved.items(), strict=True)
        return all(a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    return all(a is b for a, b in zip(now, saved, strict=True))
