"""The same relative rank in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lrcompress.allocate.fronts import fronts_within, spent
from lrcompress.types.options import OptionTable


@dataclass(frozen=True)
class ConstantRatio:
    """Global step: the largest ratio a such that the ranks of at most a x full rank meet the limit together.

    A layer whose least rank is above the ratio takes that rank. Source: Denton et al. 2014, as torchprune's
    SVD.
    """

    def __call__(self, tables: list[OptionTable], cost: str, limit: int) -> list[int]:
        """Return the chosen row of each table.

        Raises:
            BudgetError: even the cheapest rows cost more than ``limit``.
        """
        fronts = fronts_within(tables, cost, limit)
        relative = [table.relative_rank[front.rows] for table, front in zip(tables, fronts, strict=True)]
        points = [0] * len(fronts)
        for ratio in np.unique(
            np.concatenate([np.zeros(1), *relative])
        ):  # the total cost rises with the ratio
            wider = [max(0, int((ranks <= ratio).sum()) - 1) for ranks in relative]
            if spent(fronts, wider) > limit:
                break
            points = wider
        return [int(front.rows[point]) for front, point in zip(fronts, points, strict=True)]

    def objective(self, errors: list[float]) -> float:
        """Return the largest error."""
        return max(errors, default=0.0)

    def bound(self, tables: list[OptionTable], cost: str, limit: int) -> None:
        """Return nothing: a rule, not an optimum."""
