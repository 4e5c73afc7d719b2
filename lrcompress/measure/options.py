"""The time of every option of every layer: a few of them measured, the ranks between interpolated."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lrcompress import rewrite
from lrcompress.measure.clock import Progress, seconds_of_layers
from lrcompress.types import Layer, LowRank
from lrcompress.types.options import FloatArray, IntArray, OptionTable

_SECONDS = 10.0  # of measuring, about; five rounds at least
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
    and group count, with random factors, while the model runs; between them the time is interpolated. Layers
    alike in all that matters share their times. Holds all measured options in memory: up to 24 times the
    layers' weights for a recipe of many group counts, 4 times for one of one.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tables = [_thinned(table) for table in tables]
    configs = [list(_measured_configs(table)) for table in tables]
    variants: dict[str, dict[str, nn.Module]] = {"dense": dict(modules)}
    for i in range(max(map(len, configs), default=0)):
        variants[str(i)] = {
            layer.name: rewrite.like(modules[layer.name], chosen[i])
            for layer, chosen in zip(layers, configs, strict=True)
            if i < len(chosen)
        }
    samples = seconds_of_layers(model, variants, inputs, device, _SECONDS, progress)
    alike = [(str(modules[x.name]), modules[x.name].weight.dtype, x.calls) for x in layers]
    timed = []
    for key, table, chosen in zip(alike, tables, configs, strict=True):
        same = [layer.name for layer, other in zip(layers, alike, strict=True) if other == key]

        def seconds(variant: str, same: list[str] = same) -> float:
            return statistics.median(s for name in same for s in samples[variant][name])

        times = {config: seconds(str(i)) for i, config in enumerate(chosen)}
        timed.append(_with_latency(table, seconds("dense"), times))
    with_times = tuple(
        replace(layer, latency=int(table.latency[0])) for layer, table in zip(layers, timed, strict=True)
    )
    return _nanoseconds(statistics.median(samples["dense"][""])), with_times, timed


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


def _with_latency(table: OptionTable, dense: float, seconds: Mapping[LowRank, float]) -> OptionTable:
    """Add the column of times, and drop every option that is no faster than the dense layer."""
    latency: IntArray = np.full(len(table), _nanoseconds(dense), np.int64)
    for scheme, groups in _pairs(table):
        same = (table.scheme == scheme) & (table.groups == groups)
        mine = [(c, t) for c, t in seconds.items() if (c.scheme, c.groups) == (scheme, groups)]
        known = sorted((config.rank, time) for config, time in mine)
        ranks, times = zip(*known, strict=True)
        between: FloatArray = np.interp(table.rank[same], ranks, times)
        latency[same] = np.maximum(1, np.rint(1e9 * between)).astype(np.int64)
    timed = replace(table, latency=latency)
    return timed.only((table.groups == 0) | (latency < _nanoseconds(dense)))
