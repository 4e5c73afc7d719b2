"""The options of a layer as columns of numbers. Beside the other types, because only this one needs NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from lrcompress.types.layer import LowRank, Option

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OptionTable:
    """The options of one layer as columns; one row is the dense layer, with groups 0 and error 0.

    ``latency`` is empty where nothing was measured.
    """

    scheme: IntArray  # [options]
    groups: IntArray  # [options]
    rank: IntArray  # [options]
    relative_rank: FloatArray  # [options], rank / full rank; inf for the dense layer
    params: IntArray  # [options]
    macs: IntArray  # [options]
    error: FloatArray  # [options]
    latency: IntArray = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # [options], ns; []: not measured

    bytes: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # [options], of the weights

    def __len__(self) -> int:
        return len(self.error)

    def __getitem__(self, row: int) -> Option:
        config = None
        if self.groups[row]:
            config = LowRank(int(self.scheme[row]), int(self.groups[row]), int(self.rank[row]))
        latency = int(self.latency[row]) if len(self.latency) else 0
        return Option(config, int(self.params[row]), int(self.macs[row]), float(self.error[row]), latency)

    def only(
        self,
        rows: npt.NDArray[np.bool_],  # [options], which to keep
    ) -> OptionTable:
        """Return a table of some of the rows."""
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        return OptionTable(
            **{name: column[rows] if len(column) else column for name, column in columns.items()}
        )

    def cost(self, name: str) -> IntArray:
        """Return the column that a budget bounds: ``"params"``, ``"macs"``, ``"bytes"`` or ``"latency"``."""
        known = {"params": self.params, "macs": self.macs, "bytes": self.bytes, "latency": self.latency}
        return known[name]

    def front(self, cost: str) -> IntArray:
        """Return the rows of the Pareto front: cost strictly rising, error strictly falling."""
        order = np.lexsort((self.groups, self.error, self.cost(cost)))  # among equals the fewest groups
        least_before = np.minimum.accumulate(np.concatenate(([np.inf], self.error[order][:-1])))
        return order[self.error[order] < least_before]
