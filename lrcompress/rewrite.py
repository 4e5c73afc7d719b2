"""The only code that walks or changes a model: which layers it has, the model with some of them factored."""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lrcompress.nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from lrcompress.types import Call, Layer, LeftAlone, LowRank, Plan, PlanError, WeightError

Dense = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Factored = LowRankLinear | LowRankConv1d | LowRankConv2d | LowRankConv3d

_CONVOLUTIONS: dict[type[nn.Module], type[LowRankConv1d | LowRankConv2d | LowRankConv3d]] = {
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}
_DENSE: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Multiplied-out factors may miss the weight's own optimum by this share of its norm: the least singular
# values lost in a float64 Gram matrix are 1e-8 of the largest.
_FACTOR_TOLERANCE = 1e-6

_LARGEST_ENTRY = 1e150  # of a float64 weight: sums of squares must stay finite


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
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers: dict[str, Dense] = {}
    left_alone: list[LeftAlone] = []
    inside_attention: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention |= {id(part) for part in module.modules() if part is not module}
        if id(module) in inside_attention or all(p.ndim < 2 for p in module.parameters(recurse=False)):
            continue
        reason = _reason(name, module, owners, ignore)
        if reason is not None:
            left_alone.append(left_out(name, module, reason))
        elif isinstance(module, Dense):
            layers[name] = module
    return layers, left_alone


def left_out(name: str, module: nn.Module, reason: str) -> LeftAlone:
    """Record a module that keeps its weights."""
    parts = module.parameters(recurse=isinstance(module, nn.MultiheadAttention))  # else parts are listed too
    return LeftAlone(name, type(module).__name__, sum(part.numel() for part in parts), reason)


def _reason(name: str, module: nn.Module, owners: Counter[int], ignore: Sequence[str]) -> str | None:
    """Say why a module must be left alone; None when it can be compressed."""
    kind = type(module)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
        return "ignored by name"
    if is_factored(module):
        return "already factored"
    if any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
        return "its weight is tied to another module's"
    if kind not in _DENSE:
        known = next((base for base in _DENSE if isinstance(module, base)), None)
        return (
            f"a subclass of {known.__name__} may compute otherwise"
            if known
            else f"no factorisation of {kind.__name__}"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return f"its weight is of type {weight.dtype}"
    backward = (module._backward_hooks, module._backward_pre_hooks)
    if module._forward_hooks or module._forward_pre_hooks or any(backward):
        return "it carries hooks, which a replacement would lose"
    if "forward" in vars(module):
        return "its forward was replaced"
    return None if weight.numel() else "its weight is empty"


def count_params(model: nn.Module) -> int:
    """Count every parameter once."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe(
    name: str,
    module: Dense,
    calls: tuple[Call, ...] = (),
) -> Layer:
    """Return a layer as planning sees it."""
    return Layer(
        name,
        type(module).__name__,
        tuple(module.weight.shape),
        1 if isinstance(module, nn.Linear) else module.groups,
        calls,
    )


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be factorised.

    Raises:
        WeightError: it has no values (meta device), or holds nan, infinity or numbers whose squares are.
    """
    if weight.is_meta:
        raise WeightError(
            f"layer {name!r}: its weight is on the meta device and holds no values; load them first"
        )
    if not weight.isfinite().all():
        raise WeightError(f"layer {name!r}: its weight holds nan or infinity")
    if weight.dtype == torch.float64 and weight.abs().max() > _LARGEST_ENTRY:
        raise WeightError(f"layer {name!r}: its weight holds entries above {_LARGEST_ENTRY}")


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
        if not isinstance(module, Dense) or type(module).__name__ != planned.kind:
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


def is_factored(module: nn.Module) -> bool:
    """Say whether a module is one of ours."""
    return isinstance(module, Factored)


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
        new = _CONVOLUTIONS[type(module)](*sizes, config.rank, config.groups, **made)
    for factor in (new.U, new.V):
        factor.requires_grad_(module.weight.requires_grad)
    if new.bias is not None and module.bias is not None:
        new.bias.requires_grad_(module.bias.requires_grad)
    new.train(module.training)
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
    if new.bias is not None and old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach().clone(), requires_grad=old.bias.requires_grad)


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


def merge(
    model: nn.Module,  # with factored layers; untouched
) -> nn.Module:
    """Copy the model with every factored layer multiplied out into an ordinary dense one: the same function.

    For exporters, for another round of compression, or where dense runs faster.
    """
    factors = {name: module for name, module in model.named_modules() if isinstance(module, Factored)}
    return replaced(model, {name: _multiplied_out(module) for name, module in factors.items()})


def _multiplied_out(module: Factored) -> Dense:
    """Return the dense layer that a factored one stands for."""
    weight = module.weight.detach()
    made: dict[str, Any] = {"bias": module.bias is not None, "device": weight.device, "dtype": weight.dtype}
    dense: Dense
    if isinstance(module, LowRankLinear):
        dense = nn.Linear(module.in_features, module.out_features, **made)
    else:
        kept = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
        made |= {name: getattr(module, name) for name in kept} | {"groups": module.conv_groups}
        kinds: dict[type[Factored], type[nn.Conv1d | nn.Conv2d | nn.Conv3d]]
        kinds = {LowRankConv1d: nn.Conv1d, LowRankConv2d: nn.Conv2d, LowRankConv3d: nn.Conv3d}
        dense = kinds[type(module)](**made)
    dense.weight = nn.Parameter(weight, requires_grad=module.U.requires_grad)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
    dense.train(module.training)
    return dense


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


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return all tensors of a model by name, and the names of the buffers that its state dict leaves out."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra = {name: b for name, b in model.named_buffers(remove_duplicate=False) if name not in tensors}
    return tensors | extra, tuple(extra)


def fill(
    model: nn.Module,  # hollow, from `replaced`; changed in place
    tensors: Mapping[str, Tensor],
    buffers: Iterable[str],  # names that are no keys of the state dict
) -> None:
    """Give every parameter and buffer its stored value; parameters stored as one stay tied.

    Raises:
        PlanError: tensors are missing, unknown, or of another shape; the message names the first of them.
    """
    expected, extra = named_tensors(model)
    differing = sorted(expected.keys() ^ tensors.keys()) or sorted(set(extra) ^ set(buffers))
    if differing:
        raise PlanError(
            f"tensor {differing[0]!r} is on one side only ({len(differing)} such): other architecture"
        )
    values: dict[int, Tensor] = {}
    for name, empty in expected.items():
        stored = tensors[name]
        if stored.shape != empty.shape or stored.is_floating_point() != empty.is_floating_point():
            raise PlanError(
                f"tensor {name!r} must be {list(empty.shape)} {empty.dtype}, got {list(stored.shape)} "
                f"{stored.dtype}"
            )
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
