"""The way in which factored layers run: kernel, multiplied out or not, and the weights' memory format."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lrcompress.rewrite.layers import check_factored
from lrcompress.rewrite.layout import set_memory_format
from lrcompress.rewrite.plain import merge


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
