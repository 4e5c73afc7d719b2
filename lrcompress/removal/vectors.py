"""Modules whose own tensors are vectors with an entry for each channel: batch norms, slopes, scales."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers by name."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return dict(parameters) | dict(module.named_buffers(recurse=False, remove_duplicate=False))


def vectors_of(module: nn.Module) -> dict[str, int]:
    """Return the axis of the channels in each own tensor with more than one entry.

    There are none where a tensor has several such axes, where their sizes differ, or where a module inside
    has tensors of its own.
    """
    axes: dict[str, int] = {}
    for name, tensor in own_tensors(module).items():
        long = [axis for axis, size in enumerate(tensor.shape) if size != 1]
        if len(long) > 1:
            return {}
        if long:
            axes[name] = long[0]
    inside = any(own_tensors(part) for part in module.modules() if part is not module)
    sizes = {tensor.numel() for name, tensor in own_tensors(module).items() if name in axes}
    return axes if len(sizes) == 1 and 0 not in sizes and not inside else {}


def count_of(module: nn.Module) -> int:
    """Return how many channels the vectors of a module have; 0 if it has none."""
    return max((own_tensors(module)[name].numel() for name in vectors_of(module)), default=0)


def owners_of(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter or buffer, by its id."""
    return Counter(id(tensor) for module in model.modules() for tensor in own_tensors(module).values())
