"""Which way each factored layer runs fastest here: fused, as two library calls, or multiplied out."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress import calibrate, rewrite
from lrcompress.measure.clock import Progress, device_name, seconds_of_layers, seconds_of_models
from lrcompress.types import LayerTuning, PlanError, Tuning

_LAYERS_SHARE = 0.3  # of the time to spend: all layers, in each memory format; the rest is whole models
_WAYS = ("fused", "composed", "merged")


def tune(
    model: nn.Module,  # with factored layers; untouched
    example_inputs: Any,  # a tensor, a tuple of positional or a mapping of keyword arguments
    *,
    seconds: float = 10.0,  # to spend on measuring, about
    progress: Progress | None = None,  # called with the steps done, and all of them
) -> tuple[nn.Module, Tuning]:
    """Measure how the model runs fastest in inference on its device; return a copy that does, and the table.

    Each factored layer is timed while the model runs: fused kernel, two library calls, and one dense layer
    with the factors multiplied out; the fastest is kept. This is done with all weights contiguous and with
    all in channels_last. Then whole models are timed in turn: as given, each of these, each with two library
    calls for every layer, and each multiplied out altogether; the fastest is returned. So neither what was
    given nor the library nor the dense model is faster than the copy, as far as the clock can tell: for
    inputs of these shapes and the present number of threads. Takes seconds to a minute, and the memory of
    some copies of the model.

    Raises:
        PlanError: the model has no factored layer, or none that runs.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    formats = rewrite.memory_formats(model)
    each = _LAYERS_SHARE * seconds
    timed: dict[str, tuple[LayerTuning, ...]] = {}
    for i, form in enumerate(formats):
        same = rewrite.tuned(model, {}, form)
        timed[form] = _fastest_ways(same, example_inputs, device, each, _part_of(progress, i, len(formats)))
    candidates: list[tuple[str, dict[str, str]]] = [("as given", {})]
    for form, layers in timed.items():
        candidates.append((form, {layer.name: layer.choice for layer in layers}))
        candidates += [(form, {layer.name: way for layer in layers}) for way in ("composed", "merged")]
    models = {str(i): rewrite.tuned(model, chosen, form) for i, (form, chosen) in enumerate(candidates)}
    spent = seconds_of_models(models, example_inputs, device, seconds - each * len(formats))
    best = min(spent, key=lambda i: spent[i])
    form, chosen = candidates[int(best)]
    layers = timed.get(form, timed[formats[0]])
    return models[best], Tuning(
        device_name(device),
        torch.get_num_threads(),
        _described(example_inputs),
        form,
        spent["0"],
        spent[best],
        tuple(replace(layer, choice=chosen.get(layer.name, "auto")) for layer in layers),
    )


def _part_of(progress: Progress | None, part: int, parts: int) -> Progress:
    """Return the callback of one of several equal parts of the work."""
    return lambda done, of: progress(part * of + done, parts * of) if progress else None


def _described(inputs: Any) -> str:
    tensors = [tensor for _, tensor in calibrate.tensors_in(inputs)]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)


def _fastest_ways(
    model: nn.Module, inputs: Any, device: torch.device, seconds: float, progress: Progress
) -> tuple[LayerTuning, ...]:
    """Time every way of every factored layer that runs; layers alike share their times."""
    layers = {name: module for name, module in model.named_modules() if rewrite.is_factored(module)}
    seen: dict[str, list[Tensor]] = {}
    with (
        calibrate.inference(model, inputs),
        calibrate.observed(layers, lambda name, x, _: seen.setdefault(name, []).append(x)),
    ):
        calibrate.run(model, inputs)
    if not seen:
        raise PlanError(f"no factored layer runs on the example inputs; the model has {list(layers)}")
    variants = {way: {name: _as(way, layers[name]) for name in seen} for way in _WAYS}
    with torch.no_grad():
        fusing = [n for n, xs in seen.items() if all(variants["fused"][n].runs_fused(x) for x in xs)]
    alike = {
        n: (str(layers[n]), layers[n].U.dtype, *((x.shape, x.stride()) for x in xs)) for n, xs in seen.items()
    }
    seen.clear()
    samples = seconds_of_layers(model, variants, inputs, device, seconds, progress)
    timed = []
    for name in alike:
        same = [other for other in alike if alike[other] == alike[name]]
        times = {way: statistics.median(s for other in same for s in samples[way][other]) for way in _WAYS}
        if name not in fusing:
            times["fused"] = math.nan
        choice = min((way for way in _WAYS if not math.isnan(times[way])), key=lambda way: times[way])
        timed.append(LayerTuning(name, choice, **times))
    return tuple(timed)


def _as(way: str, layer: rewrite.Factored) -> Any:
    """Return a module that runs a layer's own parameters, or their product, in one of the ways."""
    if way == "merged":
        merged = rewrite.multiplied_out(layer)
        rewrite.set_memory_format(merged, rewrite.memory_format_of(layer))
        return merged
    same = copy.copy(layer)
    same.kernel = "fused" if way == "fused" else "composed"
    return same
