"""The multiple-choice knapsack: the smallest sum of errors, and how far from it a choice may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lrcompress.allocate.fronts import Front, fronts_within, spent
from lrcompress.types.options import FloatArray, IntArray, OptionTable


# Pairs of state and option that the dynamic programme looks at for each layer: milliseconds.
_PAIRS = 2**15

_ROUNDING = 1e-12  # relative; sums that differ by less are the same


@dataclass(frozen=True)
class WeightedSum:
    """Global step: minimise the sum of the layers' errors, exactly where few choices can be the best.

    A price p on cost makes the layers independent: each takes the option of least error + p cost. Lowering p
    walks along the convex hulls of the fronts, steepest step first, until a step does not fit: a part of that
    step gives the bound of the relaxation. Then what still fits is taken, the option that saves most error
    for its cost first. Options whose reduced cost is above the gap between the two cannot be in a better
    choice; over the others, dynamic programming on Pareto states, each bounded by the relaxation of what
    is to come, finds the optimum. Where that takes too many states, those of least bound go on, and the
    least bound of the others is the answer of ``bound``.

    Source: Sinha and Zoltners 1979 (the relaxation); Nemhauser and Ullmann 1969 (the states); Idelbayev and
    Carreira-Perpinan 2020 choose ranks with it.
    """

    def __call__(self, tables: list[OptionTable], cost: str, limit: int) -> list[int]:
        """Return the chosen row of each table.

        Raises:
            BudgetError: even the cheapest rows cost more than ``limit``.
        """
        return self._solved(tables, cost, limit)[0]

    def bound(self, tables: list[OptionTable], cost: str, limit: int) -> float:
        """Return a sum that no choice is below; that of the choice itself where it is the optimum.

        Raises:
            BudgetError: even the cheapest rows cost more than ``limit``.
        """
        return self._solved(tables, cost, limit)[1]

    def objective(self, errors: list[float]) -> float:
        """Return the sum of the errors."""
        return sum(errors)

    def _solved(self, tables: list[OptionTable], cost: str, limit: int) -> tuple[list[int], float]:
        fronts = fronts_within(tables, cost, limit)
        steps = _Steps.of(fronts)
        points, price = _relaxed(fronts, steps, limit)
        points = _repair(fronts, points, limit - spent(fronts, points))
        least = float(steps.least_error(fronts, np.arange(len(fronts)), np.array([limit]))[0])
        points, open_bound = _improved(fronts, steps, points, price, least, limit)
        rows = [int(front.rows[point]) for front, point in zip(fronts, points, strict=True)]
        reached = self.objective([float(t.error[row]) for t, row in zip(tables, rows, strict=True)])
        return rows, min(reached, max(least, open_bound))


@dataclass(frozen=True)
class _Steps:
    """The steps along the convex hulls of all fronts, most error saved for its cost first."""

    layer: IntArray  # [steps]
    point: IntArray  # [steps], where it leads
    cost: IntArray  # [steps], what it adds
    error: FloatArray  # [steps], what it changes: negative

    @staticmethod
    def of(fronts: list[Front]) -> _Steps:
        """Walk along all hulls."""
        found = sorted(_hull_steps(fronts))
        before = [0] * len(fronts)
        cost, error = [], []
        for _, i, point in found:
            cost.append(int(fronts[i].cost[point] - fronts[i].cost[before[i]]))
            error.append(float(fronts[i].error[point] - fronts[i].error[before[i]]))
            before[i] = point
        layers, points = ([step[k] for step in found] for k in (1, 2))
        return _Steps(*(np.array(a, np.int64) for a in (layers, points, cost)), np.array(error, np.float64))

    def least_error(
        self,
        fronts: list[Front],
        layers: IntArray,  # [some]
        limits: IntArray,  # [...]
    ) -> FloatArray:  # [...]; inf where even the cheapest points cost more
        """Return a bound on the sum of errors of some layers: the relaxation, where part of a step can be taken."""
        mine = np.isin(self.layer, layers)
        first = sum(int(fronts[i].cost[0]) for i in layers)
        worst = sum(float(fronts[i].error[0]) for i in layers)
        costs = first + np.concatenate([np.zeros(1), np.cumsum(self.cost[mine])])
        errors = worst + np.concatenate([np.zeros(1), np.cumsum(self.error[mine])])
        bound: FloatArray = np.interp(limits, costs, errors, left=np.inf)
        return bound


def _relaxed(fronts: list[Front], steps: _Steps, limit: int) -> tuple[list[int], float]:
    """Take hull steps while they fit; return the points, and the error that a unit of cost is worth there."""
    points = [0] * len(fronts)
    left = limit - spent(fronts, points)
    for i, point, cost, error in zip(steps.layer, steps.point, steps.cost, steps.error, strict=True):
        if cost > left:
            return points, -float(error) / int(cost)
        left -= int(cost)
        points[i] = int(point)
    return points, 0.0


def _improved(
    fronts: list[Front],
    steps: _Steps,
    points: list[int],  # a choice that fits
    price: float,
    least: float,
    limit: int,
) -> tuple[list[int], float]:  # the best choice found, and the least sum that was not ruled out
    """Search for a better choice by dynamic programming over the layers."""
    reached = sum(float(front.error[point]) for front, point in zip(fronts, points, strict=True))
    target = reached * (1 - _ROUNDING)
    kept = []  # of each front, the points that a better choice may hold
    for front in fronts:
        reduced = front.error + price * front.cost
        kept.append(np.flatnonzero(reduced - reduced.min() <= reached - least + _ROUNDING * reached))
    order = np.argsort([len(few) for few in kept], kind="stable")
    cost, error, bound = np.zeros(1, np.int64), np.zeros(1), np.array([least])
    path: list[tuple[IntArray, IntArray]] = []  # of each layer so far: the state before, the point taken
    dropped = np.inf
    for done, i in enumerate(order):
        room = max(1, _PAIRS // len(kept[i]))
        states = np.arange(len(cost))
        if len(states) > room:
            states = np.argpartition(bound, room)
            dropped = min(dropped, float(bound[states[room:]].min()))
            states = states[:room]
        costs = (cost[states, None] + fronts[i].cost[kept[i]]).ravel()
        errors = (error[states, None] + fronts[i].error[kept[i]]).ravel()
        bounds = errors + steps.least_error(fronts, order[done + 1 :], limit - costs)
        better = np.flatnonzero(bounds < target)
        better = better[np.lexsort((errors[better], costs[better]))]
        least_before = np.minimum.accumulate(np.concatenate(([np.inf], errors[better][:-1])))
        better = better[errors[better] < least_before]
        cost, error, bound = costs[better], errors[better], bounds[better]
        path.append((states[better // len(kept[i])], kept[i][better % len(kept[i])]))
    if not len(error):
        return points, min(reached, dropped)
    found, state = list(points), int(error.argmin())
    best = float(error[state])
    for i, (before, taken) in zip(reversed(order), reversed(path), strict=True):
        found[i] = int(taken[state])
        state = int(before[state])
    return found, min(best, dropped)


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
