"""The story of a compression: plan, apply, verify, fold, save, load. The only file that knows the order."""

from __future__ import annotations

import platform
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lrcompress import calibrate, codec, measure, planning, presets, reconstruct, refine, removal, rewrite
from lrcompress.factorize import svd_factors
from lrcompress.types import (
    Budget,
    Folding,
    FormatError,
    Plan,
    PlanError,
    Recipe,
    Reconstruction,
    Refinement,
    Split,
    Tuning,
)


def plan(
    model: nn.Module,
    budget: Budget,
    recipe: Recipe | Reconstruction | None = None,  # None: activation_aware() with statistics, else alds()
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
    to count multiply-accumulates and, for ``lnr``, to follow the channels.
    ``lnr`` looks at data: at ``statistics``, which are of the original network, so that ``top-down`` chooses
    neurons as ``parallel`` does; or, without them, at ``example_inputs``, of which it then takes thousands.
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
    recipe = recipe or _default_recipe(statistics is not None)
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if isinstance(recipe, Reconstruction):
        if weights or min_keep:
            raise PlanError(f"{recipe} takes no weights and no min_keep, got {weights} and {min_keep}")
        return _narrower(model, budget, recipe, example_inputs, statistics, ignored)
    wishes = planning.Wishes(weights or {}, min_keep, unreached)
    return planning.factored(model, budget, recipe, example_inputs, statistics, ignored, wishes, progress)


def _default_recipe(data: bool) -> Recipe:
    """Return the best method for what is known: with data, and without."""
    return presets.activation_aware() if data else presets.alds()


def _narrower(
    model: nn.Module,
    budget: Budget,
    recipe: Reconstruction,
    example_inputs: Any,
    statistics: calibrate.Statistics | None,
    ignored: tuple[str, ...],
    batches: list[Any] | None = None,  # that the plan will be fitted to; None: the statistics, or the inputs
) -> Plan:
    """Plan the removal of neurons; of several splits with low rank the one whose outputs are nearest."""
    model = rewrite.with_opened(model, refine.named(None, statistics))
    if example_inputs is None:
        raise PlanError(
            "removing neurons needs example_inputs, to follow the channels and, without statistics, "
            "to calibrate on"
        )
    if statistics is not None:
        refine.check_statistics(model, statistics)
    parts = calibrate.in_parts(example_inputs)
    data = parts if statistics is None else statistics
    plans = planning.narrower(model, budget, recipe, example_inputs, data, ignored)
    if recipe.low_rank is None:
        return plans[0]
    own = statistics if batches is None else None
    measured = batches or parts  # on which each split is, fitted to the statistics or to batches
    return planning.nearest(
        plans, measured, own is None, lambda made, fitted: _tried(model, made, measured, fitted, own)
    )


def _tried(
    model: nn.Module,
    made: Plan,
    batches: Sequence[Any],  # measured on
    fitted: Sequence[Any],  # fitted to, where there are no statistics
    statistics: calibrate.Statistics | None,
) -> Split:
    """Fit the plan of one split and measure it."""
    model = rewrite.with_opened(model, refine.named(made, statistics))
    if statistics is not None:
        small, samples = _applied(model, made, statistics, None, Refinement()), 0
    else:
        small = _applied(model, made, None, list(fitted), Refinement())
        samples = sum(calibrate.samples_in(batch) for batch in fitted)
    return replace(made.splits[0], output_error=measure.output_error(model, small, batches), samples=samples)


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    statistics: calibrate.Statistics | None = None,  # from `collect`
    batches: Iterable[Any] | None = None,  # unlabelled; held in memory
    refinement: Refinement | None = None,  # how weights are fitted to either; None: the default
    example_inputs: Any = None,  # to see that the factored layers run; None: the first batch, if there is one
    progress: measure.Progress | None = None,  # of the fit: called with the layers done, and all of them
) -> nn.Module:
    """Return a copy of the model with its planned layers factored; ``model`` is untouched.

    Without data, factors are those of truncated SVDs. With ``statistics``, each layer's are fitted to what
    the original layer gives; with ``batches``, layer after layer, on what the compressed layers before it
    give, which is better and takes a run of the model for each layer. Re-estimate no batch norm after that.
    Where the plan removes neurons one of the two is needed, and the layers behind them are fitted first; with
    ``statistics`` each by itself, whatever the chaining.

    Factors keep the dtype, device, memory format, mode and ``requires_grad`` of the weights that they
    replace. What was chosen dense is copied, ``Conv1D`` of transformers
    as the ``nn.Linear`` of the same values. Before a layer is replaced, its factors are multiplied out and
    compared with the weight. Functions, methods and hooks that lead to the original are made again around the
    copy; on inputs both are run once, and each factored layer that they reach must have run.

    Raises:
        PlanError: the plan does not fit the model, the message names the layer and both shapes; or the
            statistics are of another model; or something in the model cannot be copied, or would go on using
            a layer as it was.
        WeightError: a weight is not finite, or on the meta device.
        CompressionError: ``batches`` is empty, what a layer gets or gives holds nan or infinity, or a
            weight's type does not hold its fit; the message names the layer.
    """
    model = rewrite.with_opened(rewrite.with_linears(model), refine.named(plan, statistics))
    held = None if batches is None else list(batches)
    small = _applied(model, plan, statistics, held, refinement or Refinement(), progress)
    inputs = held[0] if held and example_inputs is None else example_inputs
    if inputs is not None:
        measure.check_runs(model, small, inputs)
    return small


def _applied(
    model: nn.Module,
    plan: Plan,
    statistics: calibrate.Statistics | None,
    batches: list[Any] | None,
    refinement: Refinement,
    progress: measure.Progress | None = None,
) -> nn.Module:
    """Do what ``apply`` does, but run nothing that a fit does not need."""
    if plan.removals:
        model, statistics = _without_neurons(model, plan, statistics, batches)
    old = rewrite.check_fits(model, plan)
    for name, module in old.items():
        rewrite.check_weight(name, module.weight)
    if statistics is not None or batches is not None:
        model = refine.refined(model, plan, statistics, batches, refinement, progress)
        old = rewrite.check_fits(model, plan)
    entries = [entry for entry in plan if entry.choice.config is not None]
    layers = [entry.layer for entry in entries]
    configs = [entry.choice.config for entry in entries if entry.choice.config is not None]
    factors = svd_factors(layers, [old[layer.name].weight for layer in layers], configs)
    new = {}
    for layer, config, found in zip(layers, configs, factors, strict=True):
        new[layer.name] = rewrite.factored(old[layer.name], config)
        rewrite.fill_factors(layer.name, new[layer.name], old[layer.name], found.U, found.V, found.error)
    return rewrite.forget_folds(rewrite.replaced(model, new))


def _without_neurons(
    model: nn.Module, plan: Plan, statistics: calibrate.Statistics | None, batches: list[Any] | None
) -> tuple[nn.Module, calibrate.Statistics | None]:
    """Make a plan's removals; return the statistics of what is left, where these are what it is fitted to."""
    removal.check_fits(model, plan.removals)
    if batches is not None:
        return reconstruct.reduced(model, plan.removals, batches, plan.sequential), None
    if statistics is None:
        raise PlanError(
            "a plan that removes neurons needs batches or statistics, unlabelled, to fit what is left"
        )
    refine.check_statistics(model, statistics)
    small = reconstruct.reduced(model, plan.removals, statistics, sequential=False)
    return small, removal.narrowed(statistics, small, model, plan.removals)


def compress(
    model: nn.Module,
    budget: Budget,
    recipe: Recipe | Reconstruction | None = None,  # None: activation_aware() with batches, else alds()
    *,
    example_inputs: Any = None,  # None: the first batch
    batches: Iterable[Any] | None = None,  # unlabelled, for recipes that look at data, and to refine
    ignore: str | Sequence[str] = (),
) -> tuple[nn.Module, Plan]:
    """Collect, plan and apply in one call. Raises what these raise."""
    held = None if batches is None else list(batches)
    recipe = recipe or _default_recipe(held is not None)
    statistics = None
    if held is not None and (isinstance(recipe, Reconstruction) or recipe.local_step.needs_statistics):
        gradients = isinstance(recipe, Recipe) and recipe.local_step.needs_gradients
        statistics = refine.collect(model, held, ignore=ignore, gradients=gradients)
    if example_inputs is None and held:
        example_inputs = held[0]
    if isinstance(recipe, Reconstruction):
        ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        dense = rewrite.with_linears(model)
        made = _narrower(dense, budget, recipe, example_inputs, statistics, ignored, held)
    else:
        made = plan(
            model, budget, recipe, example_inputs=example_inputs, statistics=statistics, ignore=ignore
        )
    return apply(model, made, batches=held, example_inputs=example_inputs), made


def fold(
    model: nn.Module,  # in evaluation mode, dense or factored, tuned or not; untouched
    example_inputs: Any,  # a tensor, a tuple of positional or a mapping of keyword arguments
) -> nn.Module:
    """Copy the model with batch norms and activations as parts of the layers in front of them.

    For inference only: the last step, before or after ``tune``. Scale and shift of a batch norm go into the
    weight, or the decoder, and the bias; ReLU, SiLU and the exact GELU behind a factored layer become its
    ``activation``, which its kernels apply. What is gone is an ``nn.Identity``, so names stay. The model is
    run once on the example inputs: a module is folded only if it alone reads the output of that layer, both
    run once, and nothing else reads their parameters. Functions, such as ``F.relu``, and modules called
    several times stay; ``foldable`` says what is folded, and why not the rest.

    A folded model is not saved: save the one that ``apply`` returned, with ``folding=foldable(...)`` if
    ``load`` shall return a folded model.

    Raises:
        PlanError: the model is in training mode.
    """
    return rewrite.folded(model, foldable(model, example_inputs))


def foldable(model: nn.Module, example_inputs: Any) -> Folding:
    """Find what ``fold`` would make part of which layer; each batch norm and activation that stays is listed.

    Raises:
        PlanError: the model is in training mode.
    """
    if model.training:
        raise PlanError("the model must be in evaluation mode, got training mode: call model.eval() first")
    parts = rewrite.foldable_parts(model)
    uses = calibrate.uses(model, parts, lambda: calibrate.run(model, example_inputs), example_inputs)
    return rewrite.foldable(model, uses)


def save(
    model: nn.Module,  # what `apply` returned, fine-tuned or not
    plan: Plan,
    path: str | Path,
    *,
    tunings: Sequence[Tuning] = (),  # from `tune`, one a device
    folding: Folding | None = None,  # from `foldable`: what `load` folds
) -> None:
    """Write the folder ``path``: config.json and one safetensors file, no pickle.

    Factors are stored as ordinary tensors ``<layer>.U`` and ``<layer>.V``. An artefact already there is
    replaced in one step: whatever happens meanwhile, the folder holds the old one or the new one, whole, and
    so it does for any number of processes that save and load at once. Other files in it are left alone.

    What is saved is the factored model that ``tune`` was given; ``tunings`` hold what it chose, and ``load``
    makes the tuned model again on a device of the same name. With ``folding`` it folds that, too, for
    inference; ``folded=False`` there leaves the model as it was saved.

    What a module's ``get_extra_state`` gives is saved where it is made of JSON's values, tuples and tensors.

    Raises:
        PlanError: the model is not what the plan makes, or was folded, or a tuning or the folding is of
            another model; the message names the layer. Or a module's extra state holds something else.
        WeightError: a tensor has no values (meta device), or is of a kind that safetensors cannot hold, such
            as quantised ones; the message names it.
        FormatError: the folder holds a model that is not ours, such as the original's checkpoint.
        OSError: the folder cannot be written. After each of these the folder is as it was.
    """
    rewrite.check_applied(model, plan)
    rewrite.check_unfolded(model)
    for tuning in tunings:
        rewrite.check_factored(model, tuning.choices)
    folds = () if folding is None else folding.folds
    rewrite.check_folds(model, folds)
    named, extra = rewrite.named_tensors(model)
    found = [codec.State.of(name, value) for name, value in rewrite.extra_states(model).items()]
    tensors, aliases = codec.storable(dict(ChainMap(named, *(inside for _, inside in found))))
    states = tuple(state for state, _ in found)
    versions = {
        "lrcompress": version("lrcompress"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    artefact = codec.Artefact(plan, tensors, aliases, extra, tuple(tunings), folds, states)
    codec.write(path, artefact, versions)


def load(
    path: str | Path,
    model: nn.Module,  # any instance of the original architecture, on the meta device too; untouched
    *,
    device: torch.device | str = "cpu",
    tuned: bool = True,  # as the artefact says for a device of this name; False: every layer factored
    folded: bool = True,  # as the artefact says, for inference; False: as it was saved, to train on
) -> nn.Module:
    """Rebuild a compressed model from its folder and the original architecture.

    Parameters, buffers and what modules give as ``get_extra_state`` come from the folder; whatever else the
    model holds is copied from ``model``. Buffers that a forward makes are there if they were saved.

    Raises:
        FormatError: the artefact is incomplete, damaged, or its tensors are not those of this architecture.
        PlanError: the stored plan does not fit ``model``; the message names the layer and both shapes.
    """
    with codec.reading(path) as stored:
        artefact = stored.artefact
        opened = rewrite.with_opened(rewrite.with_linears(model), refine.named(artefact.plan))
        hollow = _hollow(opened, artefact.plan)
        name = measure.device_name(torch.device(device))
        tuning = next((found for found in artefact.tunings if tuned and found.device == name), None)
        try:
            _fill(hollow, stored, device)
            if folded and artefact.folds:
                hollow = rewrite.folded(hollow.eval(), Folding(artefact.folds, ()))
            return hollow if tuning is None else rewrite.tuned(hollow, tuning.choices, tuning.memory_format)
        except PlanError as error:
            raise FormatError(f"{path}: {error}") from None


def _fill(hollow: nn.Module, stored: codec.Stored, device: torch.device | str) -> None:
    """Check that an artefact is of a model, and give it all that is stored."""
    artefact = stored.artefact
    inside = {name for state in artefact.states for name in state.names()}  # no tensors of modules
    expected = {name: t for name, t in artefact.named(artefact.tensors).items() if name not in inside}
    rewrite.add_buffers(hollow, expected, artefact.buffers)
    rewrite.check_fill(hollow, expected, artefact.buffers, [state.module for state in artefact.states])
    tensors = artefact.named(stored.values(device))
    states = {state.module: state.decoded(tensors) for state in artefact.states}
    rewrite.fill(hollow, {name: tensors[name] for name in expected}, states)


def _hollow(model: nn.Module, plan: Plan) -> nn.Module:
    """Return the model that a plan makes, without values."""
    if plan.removals:
        removal.check_fits(model, plan.removals)
        means = reconstruct.no_means(model, plan.removals)
        model = removal.removed(model, plan.removals, means, hollow=True)
    old = rewrite.check_fits(model, plan)
    new = {
        entry.layer.name: rewrite.factored(old[entry.layer.name], entry.choice.config)
        for entry in plan
        if entry.choice.config is not None
    }
    return rewrite.forget_folds(rewrite.replaced(model, new, hollow=True))


def load_plan(path: str | Path) -> Plan:
    """Return the plan stored in an artefact.

    Raises:
        FormatError: the artefact is incomplete or damaged.
    """
    return codec.read_plan(path)
