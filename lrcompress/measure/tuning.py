"""Which way each factored layer runs fastest here: fused, as two library calls, or multiplied out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrcompress import calibrate, rewrite
from lrcompress.measure.clock import Progress, device_name, seconds_in_turn
from lrcompress.types import LayerTuning, PlanError, Tuning

_LAYER_SECONDS = 0.15  # of measuring, for each distinct layer and memory format
_MODEL_SECONDS = 4.0


def tune(
    model: nn.Module,  # with factored layers; untouched
    example_inputs: Any,  # a tensor, a tuple of positional or a mapping of keyword arguments
    *,
    progress: Progress | None = None,
) -> tuple[nn.Module, Tuning]:
    """Measure how the model runs fastest in inference on its device; return a copy that does, and the table.

    Each factored layer is timed on the inputs that it sees: fused kernel, two library calls, and one dense
    layer with the factors multiplied out; the fastest is kept. This is done with all weights contiguous and
    with all in channels_last. Then whole models are timed in turn: as given, each of these, and each
    multiplied out altogether; the fastest is returned. So neither what was given nor the dense model is
    faster than the copy, as far as the clock can tell: for inputs of these shapes and the present number of
    threads. Takes seconds to a minute, and the memory of some copies of the model.

    Raises:
        PlanError: the model has no factored layer, or none that runs.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    formats = rewrite.memory_formats(model)
    timed: dict[str, tuple[LayerTuning, ...]] = {}
    for i, form in enumerate(formats):
        same = rewrite.tuned(model, {}, form)
        timed[form] = _fastest_ways(same, example_inputs, device, _part_of(progress, i, len(formats)))
    if not any(timed.values()):
        raise PlanError("the model has no factored layer that runs on the example inputs")
    candidates: list[tuple[str, dict[str, str]]] = [("as given", {})]
    for form, layers in timed.items():
        candidates.append((form, {layer.name: layer.choice for layer in layers}))
        candidates.append((form, {layer.name: "merged" for layer in layers}))
    models = nn.ModuleList(rewrite.tuned(model, chosen, form) for form, chosen in candidates)
    with calibrate.inference(models):
        runs = {str(i): _running(each, example_inputs) for i, each in enumerate(models)}
        seconds = list(seconds_in_turn(runs, device, _MODEL_SECONDS).values())
    best = seconds.index(min(seconds))
    form, chosen = candidates[best]
    layers = timed.get(form, timed[formats[0]])
    return models[best], Tuning(
        device_name(device),
        torch.get_num_threads(),
        _described(example_inputs),
        form,
        seconds[0],
        seconds[best],
        tuple(replace(layer, choice=chosen.get(layer.name, "auto")) for layer in layers),
    )


def _running(module: nn.Module, inputs: Any) -> Callable[[], object]:
    return lambda: calibrate.run(module, inputs)


def _part_of(progress: Progress | None, part: int, parts: int) -> Progress:
    """Return the callback of one of several equal parts of the work."""
    if progress is None:
        return lambda done, of: None
    return lambda done, of: progress(part * of + done, parts * of)


def _described(inputs: Any) -> str:
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)


def _fastest_ways(
    model: nn.Module, inputs: Any, device: torch.device, progress: Progress
) -> tuple[LayerTuning, ...]:
    """Time every way of every factored layer that runs; layers alike in all that matters only once."""
    layers = {name: module for name, module in model.named_modules() if rewrite.is_factored(module)}
    calls: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        calls.setdefault(name, []).append(x.clone())

    known: dict[object, dict[str, float]] = {}
    timed = []
    with calibrate.inference(model):
        with calibrate.observed(layers, see):
            calibrate.run(model, inputs)
        for done, (name, seen) in enumerate(calls.items(), 1):
            shapes = tuple((tuple(x.shape), x.stride(), x.dtype) for x in seen)
            alike = (str(layers[name]), layers[name].U.dtype, shapes)
            if alike not in known:
                known[alike] = _time_ways(layers[name], seen, device)
            seconds = known[alike]
            choice = min((way for way in seconds if not math.isnan(seconds[way])), key=lambda w: seconds[w])
            timed.append(LayerTuning(name, choice, **seconds))
            progress(done, len(calls))
    return tuple(timed)


def _time_ways(layer: rewrite.Factored, inputs: list[Tensor], device: torch.device) -> dict[str, float]:
    """Return the seconds of each way to run these calls; nan where there is no such way."""
    fused, composed = copy.copy(layer), copy.copy(layer)  # the same parameters
    fused.kernel, composed.kernel = "fused", "composed"
    merged = rewrite.multiplied_out(layer)
    rewrite.set_memory_format(merged, rewrite.memory_format_of(layer))
    ways: dict[str, nn.Module] = {"fused": fused, "composed": composed, "merged": merged}
    if not all(fused.runs_fused(x) for x in inputs):
        del ways["fused"]

    def calling(module: nn.Module) -> Callable[[], object]:
        return lambda: [module(x) for x in inputs]

    runs = {way: calling(module) for way, module in ways.items()}
    return {"fused": math.nan, **seconds_in_turn(runs, device, _LAYER_SECONDS)}
