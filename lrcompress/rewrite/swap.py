"""A copy of a model with some modules swapped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lrcompress.types import PlanError


def replaced(model: nn.Module, modules: Mapping[str, nn.Module], hollow: bool = False) -> nn.Module:
    """Copy the model with some modules swapped; the weights of what is swapped are never copied.

    A module that the model holds under several names is swapped under all of them. ``hollow`` copies no
    values at all: every parameter and buffer is left on the meta device.
    """
    memo: dict[int, Any] = {}  # deepcopy takes what is in here for copies that it has already made
    if hollow:
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), parameter.requires_grad
            )
        memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    memo |= {id(model.get_submodule(name)): new for name, new in modules.items()}
    try:
        copied: nn.Module = copy.deepcopy(model, memo)
    except RuntimeError as error:  # torch copies no tensor that was computed from others
        raise PlanError(
            f"the model cannot be copied; make its weights plain parameters first: {error}"
        ) from error
    return copied


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
