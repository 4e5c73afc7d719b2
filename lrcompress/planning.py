"""Plans of low-rank factors: the options of every layer, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from lrcompress import allocate, calibrate, measure, reconstruct, refine, removal
from lrcompress.factorize import ActivationAware, OnTop
from lrcompress.subject import Subject, opened, surveyed
from lrcompress.types import (
    Budget,
    BudgetError,
    LayerPlan,
    Option,
    Plan,
    PlanError,
    Recipe,
    Reconstruction,
    Split,
    Tradeoff,
)
from lrcompress.types.options import OptionTable

_CURVE_POINTS = 32  # of a layer's error curve kept in a plan: enough for a plot, small enough for JSON
_TRADEOFF_POINTS = 24
# Splits of a budget are first fitted to one batch of so many, of at least so many samples.
_SHARE, _LEAST = 8, 100
_NEED_INPUTS = {"macs": "know how often each layer runs", "latency": "measure on"}


@dataclass(frozen=True)
class Wishes:
    """What a user wants of single layers; see ``lrcompress.plan``."""

    weights: Mapping[str, float]
    min_keep: float | Mapping[str, float]
    unreached: str


NO_WISHES = Wishes({}, 0.0, "dense")


def factored(
    model: nn.Module,
    budget: Budget,
    recipe: Recipe,
    example_inputs: Any,
    statistics: calibrate.Statistics | None,
    ignored: tuple[str, ...],
    wishes: Wishes,
    progress: measure.Progress | None,
) -> Plan:
    """Choose the factors of every layer; see ``lrcompress.plan``."""
    if budget.cost in _NEED_INPUTS and example_inputs is None:
        raise PlanError(f"a budget in {budget.cost} needs example_inputs, to {_NEED_INPUTS[budget.cost]}")
    run = None if example_inputs is None else lambda: calibrate.run(model, example_inputs)
    open_model, reasons = opened(model, ignored, run, example_inputs, refine.named(None, statistics))
    subject = surveyed(open_model, ignored, example_inputs)
    subject.left_alone = [replace(x, reason=reasons.get(x.name, x.reason)) for x in subject.left_alone]
    if recipe.local_step.needs_statistics:
        subject.left_alone += refine.without_statistics(
            subject.model, subject.modules, statistics, wishes.unreached
        )
    layers = subject.layers()
    known = {} if statistics is None else statistics.layers
    matrices = tuple(module.weight.detach() for module in subject.modules.values())
    tables = allocate.floored(layers, recipe.local_step(layers, matrices, known), wishes.min_keep)
    factors = allocate.factors([layer.name for layer in layers], wishes.weights)
    latency = 0
    if budget.cost == "latency":
        timed = measure.timed_options(
            subject.model, subject.modules, layers, tables, example_inputs, progress
        )
        latency, layers, tables = timed
    total = subject.total(budget.cost) if budget.cost != "latency" else latency
    fixed = total - sum(getattr(layer, budget.cost) for layer in layers)

    def choose(tables: list[OptionTable]) -> list[int]:
        _check_reachable(budget, tables, fixed, total)
        return recipe.global_step(allocate.weighed(tables, factors), budget.cost, budget.limit(total) - fixed)

    if budget.cost == "latency":
        tables, rows = measure.corrected(
            subject.model, subject.modules, layers, tables, example_inputs, choose, budget.limit(total), total
        )
    else:
        rows = choose(tables)
    weighed = allocate.weighed(tables, factors)
    taken = sum(int(table.cost(budget.cost)[row]) for table, row in zip(tables, rows, strict=True))
    left = max(budget.limit(total) - fixed, taken)  # a plan in time may miss its budget, with a warning
    entries = tuple(
        LayerPlan(layer, table[row], _curve(table, budget.cost, row))
        for layer, table, row in zip(layers, tables, rows, strict=True)
    )
    return Plan(
        str(recipe),
        budget,
        subject.total("params"),
        subject.macs,
        entries,
        tuple(subject.left_alone),
        _tradeoff(recipe, weighed, budget.cost, fixed, total),
        latency,
        objective=_objective(recipe, weighed, rows),
        bound=recipe.global_step.bound(weighed, budget.cost, left),
        bytes=subject.total("bytes"),
    )


def narrower(
    model: nn.Module,
    budget: Budget,
    recipe: Reconstruction,
    example_inputs: Any,
    data: reconstruct.Data,
    ignored: tuple[str, ...],
) -> list[Plan]:
    """Choose the neurons that go; where low rank competes with that, return a plan for every split.

    Raises:
        BudgetError: no split meets the budget.
        PlanError: the errors of ``low_rank`` do not add up with those of removed neurons.
    """
    if recipe.low_rank is None:
        return [reconstruct.planned(model, budget, recipe, example_inputs, data, ignored)]
    return _splits(model, budget, recipe, recipe.low_rank, example_inputs, data, ignored)


def _step_of(low_rank: Recipe) -> ActivationAware:
    """Return the local step; refuse errors that do not add up with those of removed neurons."""
    step = low_rank.local_step
    if isinstance(step, ActivationAware) and step.error in ("branch", "relative") and step.centred:
        return step
    raise PlanError(f"low_rank must have the relative errors of activation_aware(), got {low_rank}")


def _splits(
    model: nn.Module,
    budget: Budget,
    recipe: Reconstruction,
    low_rank: Recipe,
    example_inputs: Any,
    data: reconstruct.Data,
    ignored: tuple[str, ...],
) -> list[Plan]:
    """Remove neurons down to several sizes, and factor what is left down to the budget."""
    own = _step_of(low_rank)
    first = calibrate.in_parts(example_inputs)[0]
    known = data if isinstance(data, calibrate.Statistics) else refine.collect(model, data, ignore=ignored)
    model, _ = opened(model, ignored, None, known=refine.named(None, known))
    subject, wiring, paths = reconstruct.prepared(model, budget, recipe, example_inputs, data, ignored)
    total = subject.total(budget.cost)
    limit = budget.limit(total)
    whole = _tables(subject, own, known)
    found: list[Plan] = []
    refused = None
    for size in np.unique(np.geomspace(min(limit, total), total, recipe.splits).astype(int)):
        try:
            removals = paths.chosen(int(size)) if size < total else []
            small = reconstruct.reduced(model, removals, known, sequential=False)
            touched = removal.check_fits(model, removals)
            same = {name: table for name, table in whole.items() if name not in touched}
            step = OnTop(own, reconstruct.shares_of(model, small, removals, paths.moments), same)
            left = removal.narrowed(known, small, model, removals)
            way = Recipe(low_rank.name, step, low_rank.global_step)
            low = factored(small, Budget(**{budget.cost: limit}), way, first, left, ignored, NO_WISHES, None)
        except BudgetError as error:
            refused = error
            continue
        plan = reconstruct.plan_of(subject, wiring, removals, budget, recipe, first, ignored)
        found.append(_on_top(plan, low, int(size) / total))
    if refused is not None and not found:
        raise refused
    return found


def _tables(subject: Subject, step: ActivationAware, known: calibrate.Statistics) -> dict[str, OptionTable]:
    """Return the options of every layer of the whole network: removals leave those that they do not touch."""
    pairs = [
        (layer, module.weight.detach())
        for layer, module in zip(subject.layers(), subject.modules.values(), strict=True)
        if layer.name in known.layers
    ]
    layers, weights = tuple(layer for layer, _ in pairs), tuple(weight for _, weight in pairs)
    tables = step(layers, weights, known.layers)
    return {layer.name: table for layer, table in zip(layers, tables, strict=True)}


def _on_top(plan: Plan, low: Plan, fraction: float) -> Plan:
    """Return the plan of the removals with the choices for the layers that are left."""
    names = {item.name for item in plan.left_alone}
    more = tuple(item for item in low.left_alone if item.name not in names)
    return replace(
        plan,
        layers=low.layers,
        left_alone=plan.left_alone + more,
        objective=low.objective,
        splits=(Split(fraction, low.objective or 0.0),),
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


def nearest(
    plans: Sequence[Plan],  # of the splits of a budget
    batches: Sequence[Any],  # on which they are measured
    by_batches: bool,  # they are fitted to batches, not to statistics
    tried: Callable[[Plan, Sequence[Any]], Split],  # measures a plan that is fitted to some of the batches
) -> Plan:
    """Return the plan whose outputs are nearest on all batches, with what every split was measured at.

    A fit to batches takes a run for each layer: the better half of a fit to few of them goes on to all, and
    so does what is nearer than the best of that half after all.
    """
    few = calibrate.thinned(batches, _SHARE, _LEAST) if by_batches else batches
    splits = [tried(made, few) for made in plans]
    order = sorted(range(len(plans)), key=lambda i: splits[i].output_error)
    rough = set(order) if len(few) < len(batches) else set()
    again = set(order[: (len(order) + 1) // 2])
    while again := again & rough:
        for i in again:
            splits[i] = tried(plans[i], batches)
        rough -= again
        again = {min(order, key=lambda i: splits[i].output_error)}
    best = min(order, key=lambda i: splits[i].output_error)
    return replace(plans[best], splits=tuple(splits))
