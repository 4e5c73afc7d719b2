"""What the commands do: options -> values, and the steps of a compression with their progress on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from lrcompress import measure, pipeline, presets, refine, rewrite, sources
from lrcompress.arguments import ChainingKind, ErrorKind, Fit, Preset
from lrcompress.calibrate import Statistics
from lrcompress.sources import Inputs
from lrcompress.types import Budget, Folding, Plan, Recipe, Reconstruction, Tuning

_COMPARED_SECONDS = 2.0  # of timing the dense model beside what was made of it


def budget(**options: str | None) -> Budget:
    """Read the budget options; exactly one must be given."""
    given = {name: text for name, text in options.items() if text is not None}
    if len(given) != 1:
        known = "--params, --macs, --bytes, --latency and --latency-ms"
        raise typer.BadParameter(f"give a budget: exactly one of {known}", param_hint="--params")
    ((name, text),) = given.items()
    try:
        return Budget(**{name: int(text) if text.isdecimal() else float(text)})
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name.replace('_', '-')}") from None


def recipe(
    preset: Preset | None,
    error: ErrorKind | None,
    chaining: ChainingKind | None,
    low_rank: bool,
    inputs: Path | None,
) -> Recipe | Reconstruction:
    """Return the method that the options name."""
    if preset is None:
        preset = Preset.alds if inputs is None or error else Preset.activation_aware
    if error is not None and preset is not Preset.alds:
        raise typer.BadParameter(f"{preset.value} has an error of its own", param_hint="--error")
    if (chaining or low_rank) and preset is not Preset.lnr:
        hint = "--chaining" if chaining else "--low-rank"
        raise typer.BadParameter(f"{preset.value} removes no neurons", param_hint=hint)
    if error is not None:
        return presets.alds(error=error.value)
    options: dict[str, Any] = {"chaining": chaining.value} if chaining else {}
    if low_rank:
        options["low_rank"] = presets.activation_aware()
    made: Recipe | Reconstruction = getattr(presets, preset.value)(**options)
    looks = isinstance(made, Reconstruction) or made.local_step.needs_statistics
    if looks and inputs is None:
        raise typer.BadParameter(f"{preset.value} calibrates on samples: give them", param_hint="--inputs")
    return made


def planned(
    network: nn.Module,
    budget: Budget,
    recipe: Recipe | Reconstruction,
    data: Inputs,
    ignore: list[str] | None,
) -> tuple[Plan, Statistics | None]:
    """Plan; also return the statistics that were collected for it."""
    ignored, statistics = ignore or (), None
    if isinstance(recipe, Recipe) and recipe.local_step.needs_statistics:
        gradients = recipe.local_step.needs_gradients
        statistics = collected(network, data, ignored, gradients)
    example = data.every if isinstance(recipe, Reconstruction) else data.example
    with sources.step("planning") as report:
        made = pipeline.plan(
            network,
            budget,
            recipe,
            example_inputs=example,
            statistics=statistics,
            ignore=ignored,
            progress=report,
        )
    return made, statistics


def collected(
    network: nn.Module, data: Inputs, ignored: Sequence[str], gradients: bool = False
) -> Statistics:
    """Collect statistics of the samples."""
    batches = data.batches or []
    with sources.step("collecting statistics") as report:
        return refine.collect(
            network,
            batches,
            ignore=ignored,
            gradients=gradients,
            progress=lambda done: report(done, len(batches)),
        )


def fitted(
    network: nn.Module, made: Plan, data: Inputs, fit: Fit | None, statistics: Statistics | None
) -> nn.Module:
    """Apply a plan, fitted as asked for; by default to the batches where there are any."""
    if data.batches is None or fit is Fit.nothing:
        with sources.step("compressing"):
            return pipeline.apply(network, made)
    if fit is Fit.statistics:
        known = statistics or collected(network, data, ())
        with sources.step("fitting"):
            return pipeline.apply(network, made, statistics=known)
    with sources.step("fitting") as report:
        return pipeline.apply(network, made, batches=data.batches, progress=report)


def tuned(
    network: nn.Module, small: nn.Module, folding: Folding | None, data: Inputs, device: str
) -> tuple[list[Tuning], dict[str, float]]:
    """Tune; return the choice, and the milliseconds of the dense and of the tuned model, timed in turn.

    Where the one is folded the other is, too.
    """
    dense = network
    if folding is not None:
        dense, small = pipeline.fold(network, data.example), rewrite.folded(small, folding)
    with sources.step("tuning") as report:
        fast, tuning = measure.tune(small, data.example, progress=report)
        models = {"dense": dense, "compressed": fast}
        seconds = measure.seconds_of_models(models, data.example, torch.device(device), _COMPARED_SECONDS)
    return [tuning], {name: 1000 * value for name, value in seconds.items()}
