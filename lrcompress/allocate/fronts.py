"""What every global step shares: Pareto fronts, and the least size that can be reached."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompress.types import BudgetError
from lrcompress.types.options import FloatArray, IntArray, OptionTable


@dataclass(frozen=True)
class Front:
    """The Pareto front of one table: cost strictly rising, error strictly falling."""

    rows: IntArray  # [points], into the table
    cost: IntArray  # [points]
    error: FloatArray  # [points]


def fronts_within(tables: list[OptionTable], cost: str, limit: int) -> list[Front]:
    """Return the fronts of all tables.

    Raises:
        BudgetError: the cheapest options together cost more than ``limit``; the message says what they cost.
    """
    rows = [table.front(cost) for table in tables]
    fronts = [Front(r, table.cost(cost)[r], table.error[r]) for table, r in zip(tables, rows, strict=True)]
    least = sum(int(front.cost[0]) for front in fronts)
    if least > limit:
        raise BudgetError(f"{cost} of at most {limit} cannot be met: the least possible is {least}")
    return fronts


def spent(fronts: list[Front], points: list[int]) -> int:
    """Return the total cost of one point of each front."""
    return sum(int(front.cost[point]) for front, point in zip(fronts, points, strict=True))
