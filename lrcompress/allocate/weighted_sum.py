"""The multiple-choice knapsack: the smallest sum of errors, by a price on cost and a greedy repair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lrcompress.allocate.fronts import Front, fronts_within, spent
from lrcompress.types.options import FloatArray, OptionTable


@dataclass(frozen=True)
class WeightedSum:
    """Global step: minimise the sum of the layers' errors.

    A price p on cost makes the layers independent: each takes the option of least error + p cost. Lowering p
    walks along the convex hulls of the fronts, steepest step first; the first step that does not fit ends it,
    so the sum is above the optimum by less than that step saves. Then options off the hulls that still fit
    are taken, the one that saves most error for its cost first.

    Source: Sinha and Zoltners 1979 (the relaxation); Idelbayev and Carreira-Perpinan 2020 choose ranks with
    it.
    """

    def __call__(self, tables: list[OptionTable], cost: str, limit: int) -> list[int]:
        """Return the chosen row of each table.

        Raises:
            BudgetError: even the cheapest rows cost more than ``limit``.
        """
        fronts = fronts_within(tables, cost, limit)
        points = [0] * len(fronts)
        left = limit - spent(fronts, points)
        for _, i, point in sorted(_hull_steps(fronts)):
            price = int(fronts[i].cost[point] - fronts[i].cost[points[i]])
            if price > left:
                break
            left -= price
            points[i] = point
        points = _repair(fronts, points, left)
        return [int(front.rows[point]) for front, point in zip(fronts, points, strict=True)]

    def objective(self, errors: list[float]) -> float:
        """Return the sum of the errors."""
        return sum(errors)


def _hull_steps(fronts: list[Front]) -> list[tuple[float, int, int]]:
    """Return (change of error for each unit of cost, layer, point) of each step along the convex hulls."""
    steps = []
    for i, front in enumerate(fronts):
        point = 0
        while point + 1 < len(front.cost):
            slopes = _slopes(front, point)
            jump = int(np.flatnonzero(slopes == slopes.min())[-1])
            point += jump + 1
            steps.append((float(slopes[jump]), i, point))
    return steps


def _slopes(front: Front, point: int) -> FloatArray:
    """Return the change of error for each unit of cost from one point to all later ones."""
    saved = front.error[point + 1 :] - front.error[point]
    slopes: FloatArray = saved / (front.cost[point + 1 :] - front.cost[point])
    return slopes


def _repair(fronts: list[Front], chosen: list[int], left: int) -> list[int]:
    """Take the affordable point that saves most error for its cost, until none is affordable."""
    points = list(chosen)
    while True:
        candidates = []
        for i, (front, point) in enumerate(zip(fronts, points, strict=True)):
            reach = int(np.searchsorted(front.cost, front.cost[point] + left, side="right")) - 1 - point
            if reach > 0:
                slopes = _slopes(front, point)[:reach]
                candidates.append((float(slopes.min()), i, point + 1 + int(slopes.argmin())))
        if not candidates:
            return points
        _, i, point = min(candidates)
        left -= int(fronts[i].cost[point] - fronts[i].cost[points[i]])
        points[i] = point
