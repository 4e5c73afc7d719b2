"""The tensors and states of a model by name, and a model without values that gets them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.types import PlanError
from lrcompress.types.plain import shown


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return all tensors of a model by name, and the names of the buffers that its state dict leaves out."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    tensors = {
        name: value for name, value in state.items() if isinstance(value, Tensor) and not _is_extra(name)
    }
    extra = {name: b for name, b in model.named_buffers(remove_duplicate=False) if name not in tensors}
    return tensors | extra, tuple(extra)


def extra_states(model: nn.Module) -> dict[str, Any]:
    """Return what `get_extra_state` of each module gives, where there is one, by the module's name."""
    state = model.state_dict()
    return {name.rpartition(".")[0]: value for name, value in state.items() if _is_extra(name)}


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2] == "_extra_state"


def add_buffers(
    model: nn.Module,  # hollow, from `replaced`; changed in place
    tensors: Mapping[str, Tensor],  # that it shall have
    buffers: Iterable[str],  # names of those that state dicts leave out
) -> None:
    """Register buffers that the model does not have yet because its first forward makes them."""
    modules, transient = dict(model.named_modules()), set(buffers)
    for name in tensors.keys() - named_tensors(model)[0].keys():
        owner, _, leaf = name.rpartition(".")
        if owner in modules and _makes_later(modules[owner], leaf):
            modules[owner].register_buffer(leaf, tensors[name].to("meta"), name not in transient)


def _makes_later(module: nn.Module, leaf: str) -> bool:
    """Say whether a buffer is declared without a value, or registered by a method that is no constructor."""
    if leaf in module._buffers or hasattr(module, leaf):
        return leaf in module._buffers and module._buffers[leaf] is None
    methods = [value for kind in type(module).__mro__ for value in vars(kind).values()]
    codes = [method.__code__ for method in methods if isinstance(method, FunctionType)]
    return any(
        code.co_name != "__init__" and "register_buffer" in code.co_names and leaf in code.co_consts
        for code in codes
    )


def check_fill(
    model: nn.Module,  # hollow, from `replaced`
    tensors: Mapping[str, Tensor],  # on the meta device too
    buffers: Iterable[str],  # names that are no keys of the state dict
    states: Iterable[str],  # modules with an extra state
) -> None:
    """Check that tensors and states are those of a model.

    Raises:
        PlanError: tensors are missing, unknown, or of another shape; the message names the first of them.
    """
    expected, extra = named_tensors(model)
    differing = sorted(expected.keys() ^ tensors.keys()) or sorted(set(extra) ^ set(buffers))
    if differing:
        raise PlanError(
            f"tensor {differing[0]!r} is on one side only ({len(differing)} such): other architecture, "
            "or a buffer that the first forward makes: run the model once before"
        )
    strangers = sorted(extra_states(model).keys() ^ set(states))
    if strangers:
        raise PlanError(
            f"module {shown(strangers[0])} has an extra state on one side only: other architecture"
        )
    for name, empty in expected.items():
        stored = tensors[name]
        if stored.shape != empty.shape or stored.is_floating_point() != empty.is_floating_point():
            raise PlanError(
                f"tensor {name!r} must be {list(empty.shape)} {empty.dtype}, got {list(stored.shape)} "
                f"{stored.dtype}"
            )


def _in_place_of(empty: Tensor, made: Tensor) -> Tensor:
    """Return a tensor with its values; the empty one itself where it can be, for lists may hold that, too."""
    if type(empty) is not type(made):
        return made
    try:
        torch.utils.swap_tensors(empty, made)
    except RuntimeError:  # something follows the tensor itself, as a weak reference does
        return made
    return empty


def fill(
    model: nn.Module,  # hollow, from `replaced`; changed in place
    tensors: Mapping[str, Tensor],  # that `check_fill` took
    states: Mapping[str, Any],  # by module: what `set_extra_state` gets
) -> None:
    """Give every parameter and buffer its stored value; parameters stored as one stay tied.

    Raises:
        PlanError: a module does not take its extra state.
    """
    expected, extra = named_tensors(model)
    values: dict[int, Tensor] = {}  # parameters by the ids of what is stored
    filled: dict[str, Tensor] = {}
    used: set[int] = set()  # ids of empty tensors: one that is tied here alone serves the first of its names
    for name, empty in expected.items():
        stored, is_parameter = tensors[name], isinstance(empty, nn.Parameter)
        if is_parameter and id(stored) in values:
            filled[name] = values[id(stored)]
            continue
        made = stored.detach().requires_grad_(empty.requires_grad)  # also parameters in code of torch.jit
        made = nn.Parameter(made, requires_grad=empty.requires_grad) if is_parameter else made
        filled[name] = made if id(empty) in used else _in_place_of(empty, made)
        used.add(id(empty))
        if is_parameter:
            values[id(stored)] = filled[name]
    state = model.state_dict()  # with the modules' versions
    state.update({name: filled[name] for name in expected if name not in extra})
    for key in [key for key in state if _is_extra(key)]:
        del state[key]
    model.load_state_dict(state, strict=False, assign=True)  # only extra states are missing
    for name in extra:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = filled[name]
    for name, value in states.items():
        try:
            model.get_submodule(name).set_extra_state(value)
        except Exception as error:
            raise PlanError(
                f"module {name!r} does not take its stored extra state: {shown(f'{error!r}')}"
            ) from error
