"""The memory format of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def memory_formats(model: nn.Module) -> tuple[str, ...]:
    """Name the memory formats that the weights can have; channels_last only exists for 2-D convolutions."""
    has_images = any(parameter.ndim == 4 for parameter in model.parameters())
    return ("contiguous", "channels_last") if has_images else ("contiguous",)


def set_memory_format(
    module: nn.Module,  # changed in place
    memory_format: str,  # "contiguous" or "channels_last"
) -> None:
    """Lay all parameters out as torch does: those of four axes in a memory format, others row by row.

    Strides of axes with one entry count too: torch takes a kernel of 1 x 1 as channels_last by them.
    """
    for parameter in module.parameters():
        chosen = memory_format if parameter.ndim == 4 else "contiguous"
        if not _lies(parameter, chosen):
            parameter.data = parameter.data.clone(memory_format=_FORMATS[chosen])


def memory_format_of(module: nn.Module) -> str:
    """Name the memory format of the parameters of four axes; where both hold, contiguous."""
    weights = [parameter for parameter in module.parameters() if parameter.ndim == 4]
    return "contiguous" if all(_lies(weight, "contiguous") for weight in weights) else "channels_last"


def _lies(tensor: Tensor, memory_format: str) -> bool:
    """Say whether a tensor has the strides that torch gives a new one."""
    new = torch.empty_like(tensor, device="meta", memory_format=_FORMATS[memory_format])
    return tensor.stride() == new.stride()
