"""A copy of a model with some modules swapped, and its tensors by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return all tensors of a model by name, and the names of the buffers that its state dict leaves out."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra = {name: b for name, b in model.named_buffers(remove_duplicate=False) if name not in tensors}
    return tensors | extra, tuple(extra)


def check_fill(
    model: nn.Module,  # hollow, from `replaced`
    tensors: Mapping[str, Tensor],  # on the meta device too
    buffers: Iterable[str],  # names that are no keys of the state dict
) -> None:
    """Check that tensors are those of a model.

    Raises:
        PlanError: tensors are missing, unknown, or of another shape; the message names the first of them.
    """
    expected, extra = named_tensors(model)
    differing = sorted(expected.keys() ^ tensors.keys()) or sorted(set(extra) ^ set(buffers))
    if differing:
        raise PlanError(
            f"tensor {differing[0]!r} is on one side only ({len(differing)} such): other architecture"
        )
    for name, empty in expected.items():
        stored = tensors[name]
        if stored.shape != empty.shape or stored.is_floating_point() != empty.is_floating_point():
            raise PlanError(
                f"tensor {name!r} must be {list(empty.shape)} {empty.dtype}, got {list(stored.shape)} "
                f"{stored.dtype}"
            )


def fill(
    model: nn.Module,  # hollow, from `replaced`; changed in place
    tensors: Mapping[str, Tensor],  # that `check_fill` took
) -> None:
    """Give every parameter and buffer its stored value; parameters stored as one stay tied."""
    expected, extra = named_tensors(model)
    values: dict[int, Tensor] = {}
    for name, empty in expected.items():
        stored = tensors[name]
        if isinstance(empty, nn.Parameter):
            values.setdefault(id(stored), nn.Parameter(stored, requires_grad=empty.requires_grad))
    filled = {
        name: values[id(tensors[name])] if isinstance(empty, nn.Parameter) else tensors[name]
        for name, empty in expected.items()
    }
    state = model.state_dict()  # with the modules' versions, and extra state that is no tensor
    state.update({name: filled[name] for name in expected if name not in extra})
    model.load_state_dict(state, assign=True)
    for name in extra:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = filled[name]
