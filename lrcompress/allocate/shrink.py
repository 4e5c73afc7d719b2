"""Widths of many coupled layers under one budget: what a channel costs depends on the others that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrcompress.types import BudgetError
from lrcompress.types.options import FloatArray, IntArray


@dataclass(frozen=True)
class Sizes:
    """What modules cost once couplings lose channels: rows x (columns x unit + extra), summed."""

    rows: FloatArray  # [modules]
    columns: FloatArray  # [modules]
    row_loss: FloatArray  # [modules, couplings], rows that go with each channel
    column_loss: FloatArray  # [modules, couplings], columns that go with each channel
    unit: FloatArray  # [modules], cost of each weight position
    extra: FloatArray  # [modules], further cost of each row: a bias, a batch norm's entries
    fixed: float = 0.0  # cost of everything else

    def cost(
        self,
        gone: FloatArray,  # [..., couplings], channels lost
    ) -> FloatArray:  # [...]
        """Return the cost of the whole network."""
        rows = self.rows - gone @ self.row_loss.T
        columns = self.columns - gone @ self.column_loss.T
        total: FloatArray = self.fixed + (rows * (columns * self.unit + self.extra)).sum(-1)
        return total


def shrink(
    sizes: Sizes,
    counts: Sequence[IntArray],  # of each coupling's options: channels kept, rising; the last one is all
    errors: Sequence[FloatArray],  # of the same options, falling
    limit: float,
) -> list[int]:
    """Return the option of each coupling: a small sum of errors whose cost is at most ``limit``.

    From everything kept, the step of least error for the cost that it saves is taken until the limit holds;
    then steps back that still fit, the one that saves most error for its cost first. Costs are those of the
    network at that moment. A heuristic: the cost is a product of widths, so no Lagrangian bound holds.

    Raises:
        BudgetError: the cheapest options together cost more.
    """
    full = np.array([float(count[-1]) for count in counts])
    state = np.array([len(count) - 1 for count in counts])
    least = float(sizes.cost(full - np.array([float(count[0]) for count in counts])))
    if least > limit:
        raise BudgetError(f"the budget allows {limit:.0f}, the least possible is {least:.0f}")
    while _cost(sizes, counts, full, state) > limit:
        state = _step(sizes, counts, errors, full, state, -1, limit)
    while True:
        wider = _step(sizes, counts, errors, full, state, +1, limit)
        if (wider == state).all():
            return [int(i) for i in state]
        state = wider


def _cost(sizes: Sizes, counts: Sequence[IntArray], full: FloatArray, state: IntArray) -> float:
    kept = np.array([float(count[i]) for count, i in zip(counts, state, strict=True)])
    return float(sizes.cost(full - kept))


def _step(
    sizes: Sizes,
    counts: Sequence[IntArray],
    errors: Sequence[FloatArray],
    full: FloatArray,
    state: IntArray,
    sign: int,  # -1: narrower, +1: wider
    limit: float,
) -> IntArray:
    """Change one coupling: least error for the cost saved, or most error saved for a cost that fits."""
    kept = np.array([float(count[i]) for count, i in zip(counts, state, strict=True)])
    now = float(sizes.cost(full - kept))
    best, found = np.inf, state
    for j, (count, error) in enumerate(zip(counts, errors, strict=True)):
        options = np.arange(state[j]) if sign < 0 else np.arange(state[j] + 1, len(count))
        gone = np.repeat((full - kept)[None], len(options), 0)
        gone[:, j] = full[j] - count[options]
        cost = sizes.cost(gone)
        change = error[options] - error[state[j]]  # positive for narrower, negative for wider
        price = np.abs(cost - now)
        fits = (price > 0) & ((cost <= limit) | (sign < 0))
        value = np.where(fits, change / np.where(price > 0, price, 1.0), np.inf)
        if len(value) and value.min() < best:
            best, found = float(value.min()), state.copy()
            found[j] = options[int(value.argmin())]
    return found
