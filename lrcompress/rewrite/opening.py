"""Modules with a forward of their own, opened: the layer inside of them can be seen and replaced."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lrcompress.nn.own import INNER, OwnForward, opened
from lrcompress.rewrite.copying import copied
from lrcompress.rewrite.layers import DENSE, kind_of
from lrcompress.rewrite.survey import is_tied, owners_of_parameters, unusual


def openable(
    model: nn.Module,
    ignore: Sequence[str] = (),  # shell patterns of names
) -> dict[str, nn.Module]:
    """Return what derives from a kind of layer but computes by a forward of its own, with a plain weight."""
    owners = owners_of_parameters(model)
    return {
        name: module
        for name, module in model.named_modules()
        if _can_open(module)
        and not is_tied(module, owners)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    }


def _can_open(module: nn.Module) -> bool:
    own = {name for name, p in module.named_parameters(recurse=False) if p.ndim > 1} - {"weight"}
    weight = module._parameters.get("weight")
    return (
        isinstance(module, DENSE)
        and not isinstance(module, OwnForward)
        and kind_of(module) not in DENSE
        and not own
        and weight is not None
        and weight.numel() > 0
        and "bias" in module._parameters
        and not hasattr(module, INNER)
        and "__getattr__" not in vars(type(module))
        and unusual(module) is None
    )


def with_opened(
    model: nn.Module,  # untouched
    names: Iterable[str],  # of modules, or of the layers inside of them; others count for nothing
) -> nn.Module:
    """Return a model in which the named modules hold their weight in a layer inside, named ``<name>.inner``.

    All tensors are shared with ``model``, which is returned itself where there is nothing to open.
    """
    wanted = {name.removesuffix("." + INNER) for name in names}
    found = [name for name in openable(model) if name in wanted]
    if not found:
        return model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copied(model, memo)
    for name in found:
        opened(result.get_submodule(name))
    return result


def inner_names(names: Iterable[str]) -> list[str]:
    """Return those of some names that are of layers inside of opened modules."""
    return [name for name in names if name == INNER or name.endswith("." + INNER)]
