"""The time of every option of every layer: a few of them measured, the ranks between interpolated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrcompress import calibrate, rewrite
from lrcompress.measure.clock import Progress, seconds_in_turn
from lrcompress.types import Layer, LowRank
from lrcompress.types.options import FloatArray, IntArray, OptionTable

_MODEL_SECONDS = 2.0  # of measuring
_LAYER_SECONDS = 0.5  # for each distinct layer, its options together; five rounds at least
_RANKS = 4  # measured for each scheme and group count: the least, the largest and some between
_GROUP_COUNTS = 6  # of each scheme, spread evenly over the divisors
_WIDTH = 8  # of which the channels between the two parts are a multiple: what vectors and tensor cores like


def timed_options(
    model: nn.Module,
    modules: Mapping[str, rewrite.Dense],  # of the model, the layers of the tables
    layers: tuple[Layer, ...],
    tables: list[OptionTable],
    inputs: Any,
    progress: Progress | None = None,
) -> tuple[int, tuple[Layer, ...], list[OptionTable]]:  # nanoseconds of the whole model; with times
    """Measure the model, its layers and their options in inference, on the device and shapes at hand.

    Kept are at most six group counts of a scheme, ranks at which ``groups x rank`` is a multiple of 8 (where
    there are such), and of these what is faster than the dense layer. Four ranks are measured for each scheme
    and group count, as ``apply`` would make the layer, with arbitrary factors; between them the time is
    interpolated. Layers alike in all that matters are measured once.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    calls: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        calls.setdefault(name, []).append(x.clone())

    with calibrate.inference(model):
        with calibrate.observed(modules, see):
            calibrate.run(model, inputs)
        whole = seconds_in_turn({"": lambda: calibrate.run(model, inputs)}, device, _MODEL_SECONDS)[""]
        known: dict[object, dict[LowRank | None, float]] = {}
        timed = []
        for done, (layer, table) in enumerate(zip(layers, tables, strict=True), 1):
            module, seen = modules[layer.name], calls[layer.name]
            table = _thinned(table)
            chosen = list(_measured_configs(table))
            shapes = tuple((tuple(x.shape), x.stride(), x.dtype) for x in seen)
            alike = (str(module), module.weight.dtype, module.weight.stride(), shapes, tuple(chosen))
            if alike not in known:
                known[alike] = _seconds_of(module, chosen, seen, device)
            timed.append(_with_latency(table, known[alike]))
            if progress:
                progress(done, len(layers))
    with_times = tuple(
        replace(layer, latency=int(table.latency[0])) for layer, table in zip(layers, timed, strict=True)
    )
    return _nanoseconds(whole), with_times, timed


def _nanoseconds(seconds: float) -> int:
    return max(1, round(1e9 * seconds))


def _pairs(table: OptionTable) -> list[tuple[int, int]]:
    """List the pairs of scheme and group count of a table, without the dense row."""
    factored = table.groups > 0
    return sorted(set(zip(table.scheme[factored].tolist(), table.groups[factored].tolist(), strict=True)))


def _thinned(table: OptionTable) -> OptionTable:
    """Keep the dense row, some group counts of each scheme, and the ranks that devices like."""
    kept = table.groups == 0
    pairs = _pairs(table)
    for scheme in {scheme for scheme, _ in pairs}:
        counts = [groups for s, groups in pairs if s == scheme]
        spread = np.linspace(0, len(counts) - 1, min(len(counts), _GROUP_COUNTS)).round().astype(int)
        for groups in (counts[i] for i in spread):
            same = (table.scheme == scheme) & (table.groups == groups)
            liked = same & (table.rank * groups % _WIDTH == 0)
            kept |= liked if liked.any() else same
    return table.only(kept)


def _measured_configs(table: OptionTable) -> Iterator[LowRank]:
    for scheme, groups in _pairs(table):
        ranks = np.unique(table.rank[(table.scheme == scheme) & (table.groups == groups)])
        spread = np.linspace(0, len(ranks) - 1, min(len(ranks), _RANKS)).round().astype(int)
        yield from (LowRank(scheme, groups, int(rank)) for rank in ranks[spread])


def _seconds_of(
    module: rewrite.Dense, configs: list[LowRank], inputs: list[Tensor], device: torch.device
) -> dict[LowRank | None, float]:
    """Return the seconds of the dense layer (None) and of each configuration, all measured in turn."""

    def calling(layer: nn.Module) -> Callable[[], object]:
        return lambda: [layer(x) for x in inputs]

    choices: list[LowRank | None] = [None, *configs]
    made = [module, *(rewrite.like(module, config) for config in configs)]
    seconds = seconds_in_turn({str(i): calling(m) for i, m in enumerate(made)}, device, _LAYER_SECONDS)
    return dict(zip(choices, seconds.values(), strict=True))


def _with_latency(table: OptionTable, seconds: Mapping[LowRank | None, float]) -> OptionTable:
    """Add the column of times, and drop every option that is no faster than the dense layer."""
    latency: IntArray = np.full(len(table), _nanoseconds(seconds[None]), np.int64)
    for scheme, groups in _pairs(table):
        same = (table.scheme == scheme) & (table.groups == groups)
        known = sorted(
            (c.rank, t) for c, t in seconds.items() if c and (c.scheme, c.groups) == (scheme, groups)
        )
        ranks, times = zip(*known, strict=True)
        between: FloatArray = np.interp(table.rank[same], ranks, times)
        latency[same] = np.maximum(1, np.rint(1e9 * between)).astype(np.int64)
    timed = replace(table, latency=latency)
    return timed.only((table.groups == 0) | (latency < latency[table.groups == 0].min()))
