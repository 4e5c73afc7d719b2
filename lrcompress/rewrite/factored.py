"""Dense layers to factored ones, and whether a plan and a model fit each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.nn import LowRankLinear
from lrcompress.rewrite.layers import CONVOLUTIONS, Dense, Factored, kind_of
from lrcompress.rewrite.layout import memory_format_of, set_memory_format
from lrcompress.rewrite.survey import describe
from lrcompress.types import LowRank, Plan, PlanError, WeightError

# Multiplied-out factors may miss the weight's own optimum by this share of its norm: the least singular
# values lost in a float64 Gram matrix are 1e-8 of the largest.
_FACTOR_TOLERANCE = 1e-6


def factored(
    module: Dense,
    config: LowRank,
) -> Factored:
    """Return a factored module of the same geometry, dtype and mode, its parameters on the meta device."""
    made: dict[str, Any] = {"bias": module.bias is not None, "device": "meta", "dtype": module.weight.dtype}
    new: Factored
    if isinstance(module, nn.Linear):
        new = LowRankLinear(module.in_features, module.out_features, config.rank, config.groups, **made)
    else:
        made |= {name: getattr(module, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        made |= {"scheme": config.scheme, "conv_groups": module.groups}
        sizes = (module.in_channels, module.out_channels, module.kernel_size)
        new = CONVOLUTIONS[kind_of(module)](*sizes, config.rank, config.groups, **made)
    for factor in (new.U, new.V):
        factor.requires_grad_(module.weight.requires_grad)
    if new.bias is not None and module.bias is not None:
        new.bias.requires_grad_(module.bias.requires_grad)
    new.train(module.training)
    return new


def like(module: Dense, config: LowRank) -> Factored:
    """Return a factored module that would run as one in the place of ``module``; its values are random."""
    new = factored(module, config).to_empty(device=module.weight.device)
    device = module.weight.device
    with torch.random.fork_rng(
        devices=[] if device.type == "cpu" else [device.index or 0],
        device_type="cuda" if device.type == "cpu" else device.type,
    ):
        new.reset_parameters()
    set_memory_format(new, memory_format_of(module))
    return new


def fill_factors(
    name: str,
    new: Factored,  # from `factored`
    old: Dense,
    U: Tensor,  # float64, shaped as new.U
    V: Tensor,  # float64, shaped as new.V
    error: float,  # relative Frobenius error that the factors should have
) -> None:
    """Give a factored module its values, after checking that they multiply out to the weight they replace.

    Raises:
        WeightError: shapes differ from the module's, or the product misses the weight by more than ``error``.
    """
    if U.shape != new.U.shape or V.shape != new.V.shape:
        shapes = [tuple(t.shape) for t in (new.U, new.V, U, V)]
        raise WeightError(f"layer {name!r}: factors must be {shapes[:2]}, got {shapes[2:]}")
    weight = old.weight.detach()
    new.U, new.V = nn.Parameter(U), nn.Parameter(V)
    missed = float((new.weight.detach() - weight).norm() / weight.double().norm().clamp(min=1e-300))
    if not abs(missed - error) <= _FACTOR_TOLERANCE:
        raise WeightError(
            f"layer {name!r}: its factors must miss the weight by {error:.3e}, got {missed:.3e}"
        )
    for factor in (new.U, new.V):
        factor.data = factor.to(device=weight.device, dtype=weight.dtype)
        factor.requires_grad_(old.weight.requires_grad)
    set_memory_format(new, memory_format_of(old))
    if new.bias is not None and old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach().clone(), requires_grad=old.bias.requires_grad)


def check_fits(model: nn.Module, plan: Plan) -> dict[str, Dense]:
    """Return the modules that a plan factors.

    Raises:
        PlanError: a planned layer is missing, or is of another kind or shape; both are named.
    """
    modules, fitting = dict(model.named_modules()), {}
    for entry in plan:
        planned = entry.layer
        module = modules.get(planned.name)
        if module is None:
            raise PlanError(
                f"the plan has a layer {planned.name!r} ({planned.kind}), the model has none of that name"
            )
        if not isinstance(module, Dense) or kind_of(module).__name__ != planned.kind:
            raise PlanError(
                f"layer {planned.name!r} must be {planned.kind} as planned, got {type(module).__name__}"
            )
        found = describe(planned.name, module)
        if (found.weight_shape, found.conv_groups) != (planned.weight_shape, planned.conv_groups):
            shapes = [f"{list(x.weight_shape)} in {x.conv_groups} groups" for x in (planned, found)]
            raise PlanError(
                f"layer {planned.name!r} must have weight {shapes[0]} as planned, got {shapes[1]}"
            )
        if entry.choice.config is not None:
            fitting[planned.name] = module
    return fitting


def check_applied(model: nn.Module, plan: Plan) -> None:
    """Check that a model is what a plan makes.

    Raises:
        PlanError: a layer is missing or is not factored as planned.
    """
    modules = dict(model.named_modules())
    for entry in plan:
        module, config = modules.get(entry.layer.name), entry.choice.config
        found: LowRank | None = None
        if isinstance(module, Factored):
            found = LowRank(getattr(module, "scheme", 0), module.groups, module.rank)
        if module is None or found != config:
            raise PlanError(
                f"layer {entry.layer.name!r} must be {config or 'dense'} as planned, got {found or module}"
            )
        shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if shape != entry.layer.weight_shape:
            shapes = (list(entry.layer.weight_shape), list(shape))
            raise PlanError(
                f"layer {entry.layer.name!r} must have weight {shapes[0]} as planned, got {shapes[1]}"
            )
