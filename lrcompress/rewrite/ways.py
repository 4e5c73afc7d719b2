"""The way in which factored layers run: kernel, multiplied out or not, and the weights' memory format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lrcompress.rewrite.layers import check_factored
from lrcompress.rewrite.plain import merge

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def memory_formats(model: nn.Module) -> tuple[str, ...]:
    """Name the memory formats that the weights can have; channels_last only exists for 2-D convolutions."""
    has_images = any(parameter.ndim == 4 for parameter in model.parameters())
    return ("contiguous", "channels_last") if has_images else ("contiguous",)


def tuned(
    model: nn.Module,  # with factored layers; untouched
    choices: Mapping[str, str],  # factored layer -> "auto", "fused", "composed" or "merged"
    memory_format: str,  # of all weights: "as given", "contiguous" or "channels_last"
) -> nn.Module:
    """Copy the model with the chosen way for each named layer: the same function.

    Raises:
        PlanError: a name that is not that of a factored layer.
    """
    check_factored(model, choices)
    copied = merge(model, [name for name, choice in choices.items() if choice == "merged"])
    modules = dict(copied.named_modules())
    for name, choice in choices.items():
        if choice != "merged":
            modules[name].kernel = choice
    if memory_format != "as given":
        set_memory_format(copied, memory_format)
    return copied


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
