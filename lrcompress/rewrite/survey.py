"""What a model holds: its compressible layers, and why the others are left alone."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lrcompress.nn.own import INNER
from lrcompress.rewrite.layers import DENSE, Dense, is_factored, kind_of
from lrcompress.types import Call, Layer, LeftAlone, PlanError, WeightError

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_WHOLE = (nn.MultiheadAttention, torch.jit.ScriptModule)  # their parts are not listed one by one

TIED = "its weight is tied to another module's"

_LARGEST_ENTRIES = (1e-150, 1e150)  # of a float64 weight, unless all are zero: squares must be numbers


def survey(
    model: nn.Module,
    ignore: Sequence[str] = (),  # shell patterns of names
) -> tuple[dict[str, Dense], list[LeftAlone]]:
    """List the compressible layers, and everything else with a weight matrix together with the reason.

    Raises:
        WeightError: a lazy module has not seen its first input yet.
        PlanError: a pattern matches no module.
    """
    for name, module in model.named_modules():
        if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
            raise WeightError(f"layer {name!r}: its weight has no shape yet; run the model once first")
    for pattern in ignore:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in model.named_modules()):
            raise PlanError(f"ignore pattern {pattern!r} matches no module")
    owners = owners_of_parameters(model)
    layers: dict[str, Dense] = {}
    left_alone: list[LeftAlone] = []
    inside: set[int] = set()  # what is left alone as a whole
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        whole = isinstance(module, _WHOLE)
        if whole:
            inside |= {id(part) for part in module.modules()}
        if all(p.ndim < 2 for p in module.parameters(recurse=whole)):
            continue
        reason = _reason(name, module, owners, ignore)
        if reason is not None:
            left_alone.append(left_out(name, module, reason))
        elif isinstance(module, Dense):
            layers[name] = module
    return layers, left_alone


def owners_of_parameters(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def is_tied(module: nn.Module, owners: Counter[int]) -> bool:
    """Say whether another module holds a parameter of this one."""
    return any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))


def left_out(name: str, module: nn.Module, reason: str) -> LeftAlone:
    """Record a module that keeps its weights."""
    parts = module.parameters(recurse=isinstance(module, _WHOLE))
    return LeftAlone(name, type(module).__name__, sum(part.numel() for part in parts), reason)


def _reason(name: str, module: nn.Module, owners: Counter[int], ignore: Sequence[str]) -> str | None:
    """Say why a module must be left alone; None when it can be compressed."""
    kind = kind_of(module)
    names = {name, around(name)}  # a layer inside is ignored with the module around it
    if any(fnmatch.fnmatchcase(each, pattern) for each in names for pattern in ignore):
        return "ignored by name"
    if is_factored(module):
        return "already factored"
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit compiled it: its code cannot be changed"
    if is_tied(module, owners):
        return TIED
    if kind not in DENSE:
        return otherwise(module) if isinstance(module, Dense) else f"no factorisation of {kind.__name__}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    return unusual(module) or (None if weight.numel() else "its weight is empty")


def around(name: str) -> str:
    """Return the name of the module that holds a layer inside; other names as they are."""
    outer, _, last = name.rpartition(".")
    return outer if last == INNER else name


def otherwise(module: nn.Module) -> str:
    """Say why a class that derives from a kind of layer is not taken for it."""
    base = next(base for base in DENSE if isinstance(module, base))
    return f"a subclass of {base.__name__} may compute otherwise"


def unusual(module: nn.Module) -> str | None:
    """Say what keeps a module from being what its class says; None where nothing does."""
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter.dtype not in _DTYPES:
            return f"its {name} is of type {parameter.dtype}"
    backward = (module._backward_hooks, module._backward_pre_hooks)
    if module._forward_hooks or module._forward_pre_hooks or any(backward):
        return "it carries hooks, which a replacement would lose"
    return "its forward was replaced" if "forward" in vars(module) else None


def count_params(model: nn.Module) -> int:
    """Count every parameter once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Count the bytes of every parameter once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def describe(
    name: str,
    module: Dense,
    calls: tuple[Call, ...] = (),
) -> Layer:
    """Return a layer as planning sees it."""
    return Layer(
        name,
        kind_of(module).__name__,
        tuple(module.weight.shape),
        1 if isinstance(module, nn.Linear) else module.groups,
        calls,
        itemsize=module.weight.element_size(),
    )


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be factorised.

    Raises:
        WeightError: it has no values (meta device), or holds nan, infinity or numbers whose squares are none.
    """
    if weight.is_meta:
        raise WeightError(
            f"layer {name!r}: its weight is on the meta device and holds no values; load them first"
        )
    if not weight.isfinite().all():
        raise WeightError(f"layer {name!r}: its weight holds nan or infinity")
    largest = float(weight.detach().abs().max()) if weight.dtype == torch.float64 and weight.numel() else 0.0
    if largest and not _LARGEST_ENTRIES[0] <= largest <= _LARGEST_ENTRIES[1]:
        raise WeightError(
            f"layer {name!r}: the largest entry of its weight must lie within {_LARGEST_ENTRIES[0]} and "
            f"{_LARGEST_ENTRIES[1]}, got {largest:.3g}; scale it, or ignore the layer"
        )
