"""The options of a layer as columns of numbers. Beside the other types, because only this one needs NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrcompress.types.layer import LowRank, Option

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OptionTable:
    """The options of one layer as columns; one row is the dense layer, with groups 0 and error 0."""

    scheme: IntArray  # [options]
    groups: IntArray  # [options]
    rank: IntArray  # [options]
    relative_rank: FloatArray  # [options], rank / full rank; inf for the dense layer
    params: IntArray  # [options]
    macs: IntArray  # [options]
    error: FloatArray  # [options]

    def __len__(self) -> int:
        return len(self.error)

    def __getitem__(self, row: int) -> Option:
        config = None
        if self.groups[row]:
            config = LowRank(int(self.scheme[row]), int(self.groups[row]), int(self.rank[row]))
        return Option(config, int(self.params[row]), int(self.macs[row]), float(self.error[row]))

    def cost(self, name: str) -> IntArray:
        """Return the column that a budget bounds: ``"params"`` or ``"macs"``."""
        return {"params": self.params, "macs": self.macs}[name]

    def front(self, cost: str) -> IntArray:
        """Return the rows of the Pareto front: cost strictly rising, error strictly falling."""
        order = np.lexsort((self.groups, self.error, self.cost(cost)))  # among equals the fewest groups
        least_before = np.minimum.accumulate(np.concatenate(([np.inf], self.error[order][:-1])))
        return order[self.error[order] < least_before]
