"""Modules with a forward of their own, opened: the layer inside of them can be seen and replaced."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lrcompress.nn.own import INNER, OwnForward, opened
from lrcompress.rewrite.copying import copied
from lrcompress.rewrite.layers import DENSE, kind_of
from lrcompress.rewrite.survey import around, is_tied, otherwise, owners_of_parameters, unusual


def own_forwards(
    model: nn.Module,
    ignore: Sequence[str] = (),  # shell patterns of names
) -> dict[str, nn.Module]:
    """Return what derives from a kind of layer but computes by a forward of its own, with a plain weight."""
    owners = owners_of_parameters(model)
    return {
        name: module
        for name, module in model.named_modules()
        if _has_own_forward(module)
        and not is_tied(module, owners)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    }


def _has_own_forward(module: nn.Module) -> bool:
    if not isinstance(module, DENSE):
        return False
    weight = module._parameters.get("weight")
    return (
        not isinstance(module, OwnForward)
        and kind_of(module) not in DENSE
        and weight is not None
        and weight.numel() > 0
        and "bias" in module._parameters
        and unusual(module) is None
    )


def closed(module: nn.Module) -> str | None:
    """Say why a module with a forward of its own cannot be opened; None where it can."""
    for name, parameter in module.named_parameters(recurse=False):
        if name != "weight" and parameter.ndim > 1:
            return f"it has another weight, {name}"
    if hasattr(module, INNER) or "__getattr__" in vars(type(module)):
        return otherwise(module)
    return None


def with_opened(
    model: nn.Module,  # untouched
    names: Iterable[str],  # of modules, or of the layers inside of them; others count for nothing
) -> nn.Module:
    """Return a model in which the named modules hold their weight in a layer inside, named ``<name>.inner``.

    All tensors are shared with ``model``, which is returned itself where there is nothing to open.
    """
    wanted = {around(name) for name in names}
    found = [name for name, module in own_forwards(model).items() if name in wanted and not closed(module)]
    if not found:
        return model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copied(model, memo)
    for name in found:
        opened(result.get_submodule(name))
    return result


def inner_names(names: Iterable[str]) -> list[str]:
    """Return those of some names that are of layers inside of opened modules."""
    return [name for name in names if around(name) != name]
