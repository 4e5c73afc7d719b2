"""The ALDS global step solved exactly: the smallest possible largest error."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from lrcompress.allocate.fronts import Front, fronts_within, spent
from lrcompress.types.options import OptionTable


@dataclass(frozen=True)
class MinMax:
    """Global step: minimise the largest error of a layer, then spend what is left on the worst layers.

    For a threshold t each layer takes its cheapest option with error <= t, independently of the others, and
    the total cost falls as t rises: bisection over the finite set of errors finds the optimum of the problem
    that Liebenwein et al. 2021 (section 2.2) alternate on. Then the rank of the layer with the largest error
    is raised, its groups kept, as often as the limit allows, and so on down to the best layer: no rank could
    be raised alone. Keeping the groups makes each raise an improvement in every norm, since the factors'
    subspaces are nested.
    """

    def __call__(self, tables: list[OptionTable], cost: str, limit: int) -> list[int]:
        """Return the chosen row of each table.

        Raises:
            BudgetError: even the cheapest rows cost more than ``limit``.
        """
        fronts = fronts_within(tables, cost, limit)
        points = _least_threshold(fronts, limit)
        rows = [int(front.rows[point]) for front, point in zip(fronts, points, strict=True)]
        return _spend(tables, cost, rows, limit - spent(fronts, points))

    def objective(self, errors: list[float]) -> float:
        """Return the largest error."""
        return max(errors, default=0.0)

    def bound(self, tables: list[OptionTable], cost: str, limit: int) -> float:
        """Return the least possible largest error, which is that of the choice.

        Raises:
            BudgetError: even the cheapest rows cost more than ``limit``.
        """
        fronts = fronts_within(tables, cost, limit)
        points = _least_threshold(fronts, limit)
        return self.objective(
            [float(front.error[point]) for front, point in zip(fronts, points, strict=True)]
        )


def _least_threshold(fronts: list[Front], limit: int) -> list[int]:
    """Return the cheapest points below the least threshold at which they fit together."""

    def cheapest(threshold: float) -> list[int]:  # -error rises along a front
        return [int(np.searchsorted(-front.error, -threshold)) for front in fronts]

    thresholds = np.unique(np.concatenate([np.zeros(1), *(front.error for front in fronts)]))
    low, high = 0, len(thresholds) - 1  # at the last threshold every layer takes its cheapest option
    while low < high:
        middle = (low + high) // 2
        fits = spent(fronts, cheapest(float(thresholds[middle]))) <= limit
        low, high = (low, middle) if fits else (middle + 1, high)
    return cheapest(float(thresholds[low]))


def _spend(tables: list[OptionTable], cost: str, chosen: list[int], left: int) -> list[int]:
    """Raise the worst layer's rank while that fits; a layer that no longer can is done."""
    rows = list(chosen)
    worst = [(-float(table.error[row]), i) for i, (table, row) in enumerate(zip(tables, rows, strict=True))]
    heapq.heapify(worst)
    while worst:
        _, i = heapq.heappop(worst)
        costs, better = tables[i].cost(cost), _next_rank(tables[i], rows[i])
        if better is not None and costs[better] - costs[rows[i]] <= left:
            left -= int(costs[better] - costs[rows[i]])
            rows[i] = better
            heapq.heappush(worst, (-float(tables[i].error[better]), i))
    return rows


def _next_rank(table: OptionTable, row: int) -> int | None:
    """Return the row of the next rank with the same groups; after the last of them the dense row."""
    if table.groups[row] == 0:
        return None
    same = (table.groups == table.groups[row]) & (table.scheme == table.scheme[row])
    higher = np.flatnonzero(same & (table.rank > table.rank[row]))
    if len(higher):
        return int(higher[table.rank[higher].argmin()])
    return int(np.flatnonzero(table.groups == 0)[0])
