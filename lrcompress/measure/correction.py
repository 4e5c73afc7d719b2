"""Plans in time that hold on the clock: what single layers saved, corrected by what their plan saves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from lrcompress import rewrite
from lrcompress.measure.clock import share_of_dense
from lrcompress.types import BudgetError, Layer
from lrcompress.types.options import IntArray, OptionTable

_ROUNDS = 4
_NEAR = 0.97  # of the budget: nearer than noise lets a further round come
_LEAST = 0.05  # of the savings that the layers promised: of less nothing can be planned
_SECONDS = 4.0  # of measuring a plan, about

Choose = Callable[[list[OptionTable]], list[int]]


def corrected(
    model: nn.Module,
    modules: Mapping[str, rewrite.Dense],  # the layers of the tables
    layers: tuple[Layer, ...],
    tables: list[OptionTable],  # with times
    inputs: Any,
    choose: Choose,  # rows that meet the budget; raises BudgetError
    allowed: int,  # nanoseconds of the whole model
    total: int,  # nanoseconds that the dense model took
) -> tuple[list[OptionTable], list[int]]:
    """Measure the whole network that the tables lead to, scale their savings to what it saved, and repeat.

    Single layers were measured among dense ones, a few of their options, and the fastest of many noisy times
    is too good to be true: their sum is not the network's time. In the tables returned the chosen rows cost
    what the clock said. Of the networks within the budget the slowest is taken, which lost least.

    Warns where no network met the budget; the fastest is then returned.

    Raises:
        BudgetError: by the tables' own times no network meets the budget.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[tuple[int, list[OptionTable], list[int]]] = []
    for _ in range(_ROUNDS):
        try:
            rows = choose(tables)
        except BudgetError:
            if not found:
                raise
            break
        chosen = {
            layer.name: rewrite.like(modules[layer.name], config)
            for layer, table, row in zip(layers, tables, rows, strict=True)
            if (config := table[row].config) is not None
        }
        if not chosen:
            return tables, rows
        saved = sum(int(_dense(table) - table.latency[row]) for table, row in zip(tables, rows, strict=True))
        took = round(total * share_of_dense(model, chosen, inputs, device, _SECONDS))
        scale = max((total - took) / saved, _LEAST)
        tables = [_scaled(table, scale) for table in tables]
        found.append((took, tables, rows))
        if _NEAR * allowed <= took <= allowed:
            break
    within = [one for one in found if one[0] <= allowed]
    if within:
        return max(within, key=itemgetter(0))[1:]
    took, tables, rows = min(found, key=itemgetter(0))
    warnings.warn(
        f"the plan takes {took} nanoseconds where the budget allows {allowed}: the layers save less together "
        "than each by itself",
        stacklevel=4,
    )
    return tables, rows


def _dense(table: OptionTable) -> int:
    return int(table.latency[table.groups == 0][0])


def _scaled(table: OptionTable, scale: float) -> OptionTable:
    """Scale what each option saves; the dense row stays."""
    dense = _dense(table)
    latency: IntArray = np.maximum(1, np.rint(dense - scale * (dense - table.latency))).astype(np.int64)
    return replace(table, latency=latency)
