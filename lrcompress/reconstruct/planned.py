"""Plans that remove neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lrcompress import calibrate, removal, rewrite
from lrcompress.reconstruct.choose import Paths
from lrcompress.reconstruct.fit import no_means
from lrcompress.reconstruct.problem import Data
from lrcompress.subject import Subject, surveyed
from lrcompress.types import Budget, Held, LayerPlan, Plan, PlanError, Reconstruction, Removal, Wiring


def prepared(
    model: nn.Module,
    budget: Budget,
    recipe: Reconstruction,
    example_inputs: Any,
    data: Data,
    ignored: tuple[str, ...],
) -> tuple[Subject, Wiring, Paths]:
    """Survey the model, follow its channels and solve the paths of all couplings.

    Raises:
        PlanError: another budget than in params or macs, or the model cannot be traced.
    """
    if budget.cost not in ("params", "macs"):
        raise PlanError(f"removing neurons takes a budget in params or macs, got {budget}")
    first = calibrate.in_parts(example_inputs)[0]
    subject = surveyed(model, ignored, first)
    subject.layers()  # refuses weights that are not finite
    wiring = _covered(removal.trace(model, first, ignored), data)
    return subject, wiring, Paths.of(subject, wiring.couplings, recipe, data, budget.cost)


def _covered(wiring: Wiring, data: Data) -> Wiring:
    """Hold the channels that are read by a layer without statistics."""
    if not isinstance(data, calibrate.Statistics):
        return wiring
    couplings, held = [], list(wiring.held)
    for coupling in wiring.couplings:
        missing = [slot.name for slot in coupling.consumers if slot.name not in data.layers]
        if missing:
            held.append(Held(coupling.producers, coupling.channels, f"no statistics of {missing[0]!r}"))
        else:
            couplings.append(coupling)
    return Wiring(tuple(couplings), tuple(held))


def planned(
    model: nn.Module,
    budget: Budget,
    recipe: Reconstruction,
    example_inputs: Any,
    data: Data,
    ignored: tuple[str, ...],
) -> Plan:
    """Choose the channels of every coupling that stay; the layers of the narrower network are then dense."""
    subject, wiring, paths = prepared(model, budget, recipe, example_inputs, data, ignored)
    removals = paths.chosen(budget.limit(subject.total(budget.cost)))
    return plan_of(subject, wiring, removals, budget, recipe, calibrate.in_parts(example_inputs)[0], ignored)


def plan_of(
    subject: Subject,
    wiring: Wiring,
    removals: Sequence[Removal],
    budget: Budget,
    recipe: Reconstruction,
    example_inputs: Any,
    ignored: tuple[str, ...],
) -> Plan:
    """Return the plan of these removals, all layers of the narrower network dense."""
    small = removal.removed(subject.model, removals, no_means(subject.model, removals))
    after = surveyed(small, ignored, example_inputs)
    held = [
        rewrite.left_out(name, subject.model.get_submodule(name), f"its outputs all stay: {held.reason}")
        for held in wiring.held
        for name in held.producers
    ]
    params, held_bytes = subject.total("params"), subject.total("bytes")
    return Plan(
        str(recipe),
        budget,
        params,
        subject.macs,
        tuple(LayerPlan(layer, layer.dense) for layer in after.layers()),
        tuple(after.left_alone + held),
        removals=tuple(removals),
        saved_params=params - after.total("params"),
        saved_macs=subject.macs - after.macs,
        sequential=recipe.sequential,
        bytes=held_bytes,
        saved_bytes=held_bytes - after.total("bytes"),
    )
