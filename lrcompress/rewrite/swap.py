"""A copy of a model with some modules swapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lrcompress.rewrite.copying import copied


def replaced(model: nn.Module, modules: Mapping[str, nn.Module], hollow: bool = False) -> nn.Module:
    """Copy the model with some modules swapped; the weights of what is swapped are never copied.

    A module that the model holds under several names is swapped under all of them. ``hollow`` copies no
    values at all: every parameter and buffer is left on the meta device.

    Raises:
        PlanError: see `copied`.
    """
    empty: dict[int, Any] = {}
    if hollow:
        for parameter in model.parameters():
            empty[id(parameter)] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), parameter.requires_grad
            )
        empty |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return copied(model, empty, modules)


@contextmanager
def swapped_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the places of a model's own, wherever it holds them; afterwards put its own back."""
    new = {id(model.get_submodule(name)): module for name, module in modules.items()}
    places = [
        (parent._modules, leaf, child)
        for parent in model.modules()
        for leaf, child in parent._modules.items()
        if id(child) in new
    ]
    try:
        for children, leaf, child in places:
            children[leaf] = new[id(child)]
        yield
    finally:
        for children, leaf, child in places:
            children[leaf] = child
