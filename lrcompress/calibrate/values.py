"""What models take and give: how inputs are passed, and the tensors inside of any value."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrcompress.types import PlanError

_AT_ONCE = 100  # samples in one forward
_CLOSED = (nn.Module, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, str, bytes, range)


def run(
    model: nn.Module,
    inputs: Any,  # a tensor, a tuple or list of positional or any mapping of keyword arguments
) -> Any:
    """Call the model."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def in_parts(inputs: Any) -> list[Any]:
    """Cut inputs into batches, when they are one tensor."""
    return list(inputs.split(_AT_ONCE)) if isinstance(inputs, Tensor) else [inputs]


def thinned(
    batches: Sequence[Any],
    share: int,  # one batch of so many
    least: int,  # samples that stay, if there are as many
) -> list[Any]:
    """Return evenly spaced batches."""
    samples = sum(samples_in(batch) for batch in batches)
    return list(batches[:: max(1, min(share, samples // least))])


def samples_in(inputs: Any) -> int:
    """Return the leading size of the first tensor.

    Raises:
        PlanError: there is no tensor with at least one sample.
    """
    for _, tensor in tensors_in(inputs):
        size = int(tensor.size(0)) if tensor.dim() else 0
        if size:
            return size
    raise PlanError("inputs must hold a tensor whose first dimension, the samples, is not empty")


def tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:  # with the path that leads there
    """Find every tensor in nested containers, mappings, dataclasses and objects with attributes.

    Arrays of NumPy are tensors. Modules, classes and functions are not looked into.
    """
    return _found(value, "", [])


def _found(value: Any, path: str, around: list[Any]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield path, torch.from_numpy(value.copy())
    elif not isinstance(value, _CLOSED) and not any(value is outer for outer in around):
        for step, part in _parts(value):
            yield from _found(part, path + step, [*around, value])


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """List what a value is made of."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, Sequence | deque):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    else:
        yield from ((f".{name}", part) for name, part in attributes_of(value).items())


def attributes_of(value: Any) -> dict[str, Any]:
    """Return an object's own attributes, slots included."""
    slots = [name for kind in type(value).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return found | dict(getattr(value, "__dict__", {}))


def _names(slots: Any) -> list[str]:
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def rows_of(x: Tensor) -> Tensor:
    """Return a nested tensor as the rows of its parts, one after the other; others as they are."""
    return torch.cat(list(x.unbind())) if x.is_nested else x


def plain_tensors(value: Any) -> dict[str, Tensor]:  # by path; real, dense
    """Return the floating and complex tensors of a model's outputs, ready to be compared."""
    found: dict[str, Tensor] = {}
    for path, tensor in tensors_in(value):
        if tensor.is_nested:
            found |= {f"{path}[{i}]": part for i, part in enumerate(tensor.unbind())}
        else:
            found[path] = tensor if tensor.layout == torch.strided else tensor.to_dense()
    kept = {path: t.detach() for path, t in found.items() if t.is_floating_point() or t.is_complex()}
    return {path: torch.view_as_real(t) if t.is_complex() else t for path, t in kept.items()}
