"""The memory format of a model's weights."""

from __future__ import annotations

import torch
from torch import nn

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def memory_formats(model: nn.Module) -> tuple[str, ...]:
    """Name the memory formats that the weights can have; channels_last only exists for 2-D convolutions."""
    has_images = any(parameter.ndim == 4 for parameter in model.parameters())
    return ("contiguous", "channels_last") if has_images else ("contiguous",)


def set_memory_format(
    module: nn.Module,  # changed in place
    memory_format: str,  # "contiguous" or "channels_last"
) -> None:
    """Lay all parameters of four axes out in a memory format."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=_FORMATS[memory_format])


def memory_format_of(module: nn.Module) -> str:
    """Name the memory format of the parameters of four axes; where both hold, contiguous."""
    weights = [parameter for parameter in module.parameters() if parameter.ndim == 4]
    return "contiguous" if all(weight.is_contiguous() for weight in weights) else "channels_last"
