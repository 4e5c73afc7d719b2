"""The story of a compression: plan, apply, verify, save, load. The only file that knows the order."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrcompress import allocate, calibrate, codec, measure, presets, reconstruct, refine, removal, rewrite
from lrcompress.factorize import svd_factors
from lrcompress.types import (
    Budget,
    BudgetError,
    Call,
    FormatError,
    LayerCheck,
    LayerPlan,
    Option,
    Plan,
    PlanError,
    Recipe,
    Reconstruction,
    Refinement,
    Tradeoff,
    Tuning,
    Verification,
    WeightError,
)
from lrcompress.types.options import OptionTable

_CURVE_POINTS = 32  # of a layer's error curve kept in a plan: enough for a plot, small enough for JSON
_TRADEOFF_POINTS = 24
_NEED_INPUTS = {"macs": "know how often each layer runs", "latency": "measure on"}


def plan(
    model: nn.Module,
    budget: Budget,
    recipe: Recipe | Reconstruction | None = None,  # None: presets.alds()
    *,
    example_inputs: Any = None,  # a tensor, a tuple of positional or a mapping of keyword arguments
    statistics: calibrate.Statistics | None = None,  # from `collect`, for recipes that look at data
    ignore: str | Sequence[str] = (),  # shell patterns of layer names to leave alone
    weights: Mapping[str, float] | None = None,  # of layers' errors, by shell pattern; the last match counts
    min_keep: float | Mapping[str, float] = 0.0,  # fraction of its parameters that a factored layer keeps
    unreached: Literal["dense", "data-free"] = "dense",  # layers that the statistics say nothing of
    progress: measure.Progress | None = None,  # of measuring: called with the steps done, and all of them
) -> Plan:
    """Choose for every compressible layer how to factor it, or to keep it dense.

    Linear (Conv1D of transformers too) and Conv1d/2d/3d layers are considered; whatever else has a weight
    matrix is listed in ``left_alone`` with the reason. ``example_inputs`` are run once, in evaluation mode,
    to count multiply-accumulates. ``lnr`` also calibrates on them: give it thousands of samples.
    Deterministic, unless the budget is in latency: then the model, its layers and a selection of their
    options are timed on the model's device, an option no faster than its dense layer is never chosen, and
    ranks are such that ``groups x rank`` is a multiple of 8 where possible. The time that such a plan
    predicts is made of the lowest of many noisy measurements: expect somewhat more.

    ``weights`` multiply the errors that the global step sees, 1 where no pattern matches; ``min_keep`` takes
    away options below that fraction of the layer's parameters. The dense layer always stays an option.
    Where a recipe looks at data, ``unreached`` layers stay dense, or are planned by their weights alone.

    Raises:
        BudgetError: the budget cannot be met; the message says the least possible.
        WeightError: a weight is not finite, or on the meta device; the message names the layer.
        PlanError: a budget in MACs or latency without example inputs, or a pattern that matches no module; a
            weight that is not positive, a ``min_keep`` outside [0, 1].
    """
    model = rewrite.with_linears(model)
    recipe = recipe or presets.alds()
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if isinstance(recipe, Reconstruction):
        if weights or min_keep:
            raise PlanError(f"{recipe} takes no weights and no min_keep, got {weights} and {min_keep}")
        return reconstruct.planned(model, budget, recipe, example_inputs, ignored)
    if budget.cost in _NEED_INPUTS and example_inputs is None:
        raise PlanError(f"a budget in {budget.cost} needs example_inputs, to {_NEED_INPUTS[budget.cost]}")
    modules, left_alone = rewrite.survey(model, ignored)
    calls: dict[str, tuple[Call, ...]] = {}
    macs = 0
    if example_inputs is not None:
        calls, macs = calibrate.observe_calls(model, modules, example_inputs)
        for name in [name for name in modules if name not in calls]:
            reason = "its forward did not run on the example inputs"
            left_alone.append(rewrite.left_out(name, modules.pop(name), reason))
    if recipe.local_step.needs_statistics:
        left_alone += refine.without_statistics(model, modules, statistics, unreached)
    for name, module in modules.items():
        rewrite.check_weight(name, module.weight)
    layers = tuple(rewrite.describe(name, module, calls.get(name, ())) for name, module in modules.items())
    known = {} if statistics is None else statistics.layers
    matrices = tuple(module.weight.detach() for module in modules.values())
    tables = allocate.floored(layers, recipe.local_step(layers, matrices, known), min_keep)
    factors = allocate.factors([layer.name for layer in layers], weights or {})
    params, latency = rewrite.count_params(model), 0
    if budget.cost == "latency":
        timed = measure.timed_options(model, modules, layers, tables, example_inputs, progress)
        latency, layers, tables = timed
    totals = {"params": params, "macs": macs, "bytes": rewrite.count_bytes(model), "latency": latency}
    total = totals[budget.cost]
    fixed = total - sum(getattr(layer, budget.cost) for layer in layers)
    _check_reachable(budget, tables, fixed, total)
    weighed = allocate.weighed(tables, factors)
    left = budget.limit(total) - fixed
    rows = recipe.global_step(weighed, budget.cost, left)
    entries = tuple(
        LayerPlan(layer, table[row], _curve(table, budget.cost, row))
        for layer, table, row in zip(layers, tables, rows, strict=True)
    )
    return Plan(
        str(recipe),
        budget,
        params,
        macs,
        entries,
        tuple(left_alone),
        _tradeoff(recipe, weighed, budget.cost, fixed, total),
        latency,
        objective=_objective(recipe, weighed, rows),
        bound=recipe.global_step.bound(weighed, budget.cost, left),
    )


def _least(tables: list[OptionTable], cost: str) -> int:
    """Return what the cheapest option of every layer costs together."""
    return sum(int(table.cost(cost).min()) for table in tables)


def _check_reachable(budget: Budget, tables: list[OptionTable], fixed: int, total: int) -> None:
    """Refuse a budget below the cheapest options and what is left alone."""
    least = fixed + _least(tables, budget.cost)
    unit = "nanoseconds" if budget.cost == "latency" else budget.cost
    if least > budget.limit(total):
        raise BudgetError(
            f"budget {budget} allows {budget.limit(total)} {unit}, the least possible is {least} of "
            f"{total} ({math.ceil(1e4 * least / max(total, 1)) / 1e4}); {fixed} of them are left alone"
        )


def _curve(table: OptionTable, cost: str, row: int) -> tuple[Option, ...]:
    """Keep evenly spaced points of a layer's front, and the chosen option, in the order of their cost."""
    front = table.front(cost)
    spaced = np.linspace(0, len(front) - 1, min(len(front), _CURVE_POINTS)).round().astype(int)
    kept = np.union1d(front[spaced], [row])
    return tuple(table[int(i)] for i in kept[np.argsort(table.cost(cost)[kept], kind="stable")])


def _tradeoff(
    recipe: Recipe, tables: list[OptionTable], cost: str, fixed: int, total: int
) -> tuple[Tradeoff, ...]:
    """Solve the global step for budgets from the least possible to the whole model."""
    if not tables or not total:
        return ()
    points = []
    for limit in np.linspace(fixed + _least(tables, cost), total, _TRADEOFF_POINTS).astype(int):
        rows = recipe.global_step(tables, cost, int(limit) - fixed)
        points.append(Tradeoff(int(limit) / total, _objective(recipe, tables, rows)))
    return tuple(points)


def _objective(recipe: Recipe, tables: list[OptionTable], rows: list[int]) -> float:
    errors = [float(table.error[row]) for table, row in zip(tables, rows, strict=True)]
    return recipe.global_step.objective(errors)


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    statistics: calibrate.Statistics | None = None,  # from `collect`
    batches: Iterable[Any] | None = None,  # unlabelled; held in memory
    refinement: Refinement | None = None,  # how weights are fitted to either; None: the default
) -> nn.Module:
    """Return a copy of the model with its planned layers factored; ``model`` is untouched.

    Without data, factors are those of truncated SVDs. With ``statistics``, each layer's are fitted to what
    the original layer gives; with ``batches``, layer after layer, on what the compressed layers before it
    give, which is better and takes a run of the model for each layer. Re-estimate no batch norm after that.
    Where the plan removes neurons, ``batches`` are needed, and the layers behind them are fitted first.

    Factors keep the dtype, device, memory format, mode and ``requires_grad`` of the weights that they
    replace. What was chosen dense is copied, ``Conv1D`` of transformers
    as the ``nn.Linear`` of the same values. Before a layer is replaced, its factors are multiplied out and
    compared with the weight.

    Raises:
        PlanError: the plan does not fit the model, the message names the layer and both shapes; or the
            statistics are of another model.
        WeightError: a weight is not finite, or on the meta device.
        CompressionError: ``batches`` is empty.
    """
    model = rewrite.with_linears(model)
    if plan.removals:
        if batches is None:
            raise PlanError("a plan that removes neurons needs batches, unlabelled, to fit what is left")
        batches = list(batches)
        removal.check_fits(model, plan.removals)
        model = reconstruct.reconstructed(model, plan.removals, batches, plan.sequential)
        model = removal.removed(model, plan.removals)
    old = rewrite.check_fits(model, plan)
    for name, module in old.items():
        rewrite.check_weight(name, module.weight)
    if statistics is not None or batches is not None:
        model = refine.refined(model, plan, statistics, batches, refinement or Refinement())
        old = rewrite.check_fits(model, plan)
    entries = [entry for entry in plan if entry.choice.config is not None]
    layers = [entry.layer for entry in entries]
    configs = [entry.choice.config for entry in entries if entry.choice.config is not None]
    factors = svd_factors(layers, [old[layer.name].weight for layer in layers], configs)
    new = {}
    for layer, config, found in zip(layers, configs, factors, strict=True):
        new[layer.name] = rewrite.factored(old[layer.name], config)
        rewrite.fill_factors(layer.name, new[layer.name], old[layer.name], found.U, found.V, found.error)
    return rewrite.replaced(model, new)


def compress(
    model: nn.Module,
    budget: Budget,
    recipe: Recipe | Reconstruction | None = None,
    *,
    example_inputs: Any = None,
    batches: Iterable[Any] | None = None,  # unlabelled, for recipes that look at data, and to refine
    ignore: str | Sequence[str] = (),
) -> tuple[nn.Module, Plan]:
    """Collect, plan and apply in one call. Raises what these raise."""
    held = None if batches is None else list(batches)
    statistics = None
    if held is not None and isinstance(recipe, Recipe) and recipe.local_step.needs_statistics:
        gradients = recipe.local_step.needs_gradients
        statistics = refine.collect(model, held, ignore=ignore, gradients=gradients)
    made = plan(model, budget, recipe, example_inputs=example_inputs, statistics=statistics, ignore=ignore)
    return apply(model, made, batches=held), made


def verify(
    model: nn.Module,
    small: nn.Module,
    inputs: Any,  # a tensor, a tuple of positional or a mapping of keyword arguments
) -> Verification:
    """Measure what compression changed on the given inputs, for the whole model and layer by layer.

    Each replaced layer is run on the inputs that the original layer saw. Both models run in evaluation mode
    and are left as they were.

    Raises:
        PlanError: the two models' outputs differ in number or shape.
    """
    modules = dict(model.named_modules())
    pairs = {name: new for name, new in small.named_modules() if rewrite.is_factored(new) and name in modules}
    pairs = {name: new for name, new in pairs.items() if not rewrite.is_factored(modules[name])}
    squares: dict[str, list[float]] = {}  # of the layers that run

    def see(name: str, x: Tensor, y: Tensor) -> None:
        squares.setdefault(name, [0.0, 0.0])
        squares[name][0] += float((pairs[name](x).double() - y.double()).square().sum())
        squares[name][1] += float(y.double().square().sum())

    with calibrate.inference(model), calibrate.inference(small):
        with calibrate.observed({name: modules[name] for name in pairs}, see):
            before = _outputs(calibrate.run(model, inputs))
        after = _outputs(calibrate.run(small, inputs))
    shapes = [[tuple(y.shape) for y in each] for each in (before, after)]
    if shapes[0] != shapes[1]:
        raise PlanError(f"outputs must keep their shapes {shapes[0]}, got {shapes[1]}")
    difference = [b.double() - a.double() for a, b in zip(before, after, strict=True)]
    change = sum(float(d.square().sum()) for d in difference)
    logits = before[0] if len(before) == 1 and before[0].ndim == 2 and before[0].shape[1] > 1 else None
    return Verification(
        samples=calibrate.samples_in(inputs),
        output_error=_ratio(change, sum(float(y.double().square().sum()) for y in before)),
        max_difference=max((float(d.abs().max()) for d in difference if d.numel()), default=0.0),
        agreement=None if logits is None else float((logits.argmax(1) == after[0].argmax(1)).double().mean()),
        params_before=rewrite.count_params(model),
        params_after=rewrite.count_params(small),
        macs_before=calibrate.count_macs(model, inputs),
        macs_after=calibrate.count_macs(small, inputs),
        layers=tuple(
            LayerCheck(
                name,
                type(modules[name]).__name__,
                rewrite.count_params(modules[name]),
                rewrite.count_params(pairs[name]),
                _ratio(*squares[name]) if name in squares else math.nan,
            )
            for name in pairs
        ),
    )


def _outputs(outputs: Any) -> list[Tensor]:
    """Return the floating tensors among a model's outputs."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _ratio(change: float, size: float) -> float:
    """Return sqrt(change / size); nan when the original is all zero and the change is not."""
    return (change / size) ** 0.5 if size else (0.0 if change == 0 else math.nan)


def save(
    model: nn.Module,  # what `apply` returned, fine-tuned or not
    plan: Plan,
    path: str | Path,
    *,
    tunings: Sequence[Tuning] = (),  # from `tune`, one a device
) -> None:
    """Write the folder ``path``: config.json and one safetensors file, no pickle.

    Factors are stored as ordinary tensors ``<layer>.U`` and ``<layer>.V``. An artefact already there is
    replaced in one step: whatever happens meanwhile, the folder holds the old one or the new one, whole.

    What is saved is the factored model that ``tune`` was given; ``tunings`` hold what it chose, and ``load``
    makes the tuned model again on a device of the same name.

    Raises:
        PlanError: the model is not what the plan makes, or a tuning is of another model; the message names
            the layer.
        WeightError: a tensor has no values (meta device).
    """
    rewrite.check_applied(model, plan)
    for tuning in tunings:
        rewrite.check_factored(model, tuning.choices)
    named, extra = rewrite.named_tensors(model)
    for name, tensor in named.items():
        if tensor.is_meta:
            raise WeightError(f"tensor {name!r} is on the meta device and holds no values")
    tensors, aliases = codec.storable(named)
    versions = {
        "lrcompress": version("lrcompress"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    codec.write(path, codec.Artefact(plan, tensors, aliases, extra, tuple(tunings)), versions)


def load(
    path: str | Path,
    model: nn.Module,  # any instance of the original architecture, on the meta device too; untouched
    *,
    device: torch.device | str = "cpu",
    tuned: bool = True,  # as the artefact says for a device of this name; False: every layer factored
) -> nn.Module:
    """Rebuild a compressed model from its folder and the original architecture.

    Parameters and buffers come from the folder; whatever else the model holds is copied from ``model``.

    Raises:
        FormatError: the artefact is incomplete, damaged, or its tensors are not those of this architecture.
        PlanError: the stored plan does not fit ``model``; the message names the layer and both shapes.
    """
    artefact = codec.read(path)
    model = rewrite.with_linears(model)
    if artefact.plan.removals:
        means = reconstruct.no_means(model, artefact.plan.removals)
        model = removal.removed(model, artefact.plan.removals, means, hollow=True)
    old = rewrite.check_fits(model, artefact.plan)
    new = {
        entry.layer.name: rewrite.factored(old[entry.layer.name], entry.choice.config)
        for entry in artefact.plan
        if entry.choice.config is not None
    }
    tensors = {name: tensor.to(device) for name, tensor in artefact.tensors.items()}
    tensors |= {alias: tensors[name] for alias, name in artefact.aliases.items()}
    hollow = rewrite.replaced(model, new, hollow=True)
    name = measure.device_name(torch.device(device))
    tuning = next((found for found in artefact.tunings if tuned and found.device == name), None)
    try:
        rewrite.fill(hollow, tensors, artefact.buffers)
        return hollow if tuning is None else rewrite.tuned(hollow, tuning.choices, tuning.memory_format)
    except PlanError as error:
        raise FormatError(f"{path}: {error}") from None


def load_plan(path: str | Path) -> Plan:
    """Return the plan stored in an artefact.

    Raises:
        FormatError: the artefact is incomplete or damaged.
    """
    return codec.read_plan(path)
