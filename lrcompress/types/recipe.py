"""The grammar of a method: a local step and a global step."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lrcompress.types.errors import PlanError
from lrcompress.types.layer import Layer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lrcompress.types.options import OptionTable
    from lrcompress.types.statistics import LayerStatistics


class LocalStep(Protocol):
    """Weights -> options: what a method can do to each layer, at what cost and what error."""

    needs_statistics: ClassVar[bool]

    @property
    def needs_gradients(self) -> bool:
        """Whether the statistics must hold gradients too."""
        ...

    def __call__(
        self,
        layers: tuple[Layer, ...],
        weights: tuple[Any, ...],  # the layers' weight tensors
        statistics: Mapping[str, LayerStatistics],  # by layer; empty where there is no data
    ) -> list[OptionTable]:
        """Return one table a layer."""
        ...


class GlobalStep(Protocol):
    """Options of all layers and a limit -> one option a layer."""

    def __call__(self, tables: list[OptionTable], cost: str, limit: int) -> list[int]:
        """Return the chosen row of each table; their total ``cost`` is at most ``limit``.

        Raises:
            BudgetError: even the cheapest rows together cost more.
        """
        ...

    def objective(self, errors: list[float]) -> float:
        """Combine the layers' errors into the number that the step minimises."""
        ...

    def bound(self, tables: list[OptionTable], cost: str, limit: int) -> float | None:
        """Return what no choice within the limit has an objective below; None where nothing is known."""
        ...


Chaining = Literal["parallel", "top-down", "bottom-up", "bottom-up+top-down"]


@dataclass(frozen=True)
class Reconstruction:
    """A method that removes neurons: how the layers' supports and weights depend on each other.

    ``parallel``: each layer is solved on the original network. ``top-down``: from the first layer on, each
    sees what the reduced layers before it give. ``bottom-up``: from the last layer back, each has to give
    only the outputs that the next one keeps. ``bottom-up+top-down``: supports from the one, weights from the
    other.
    What the reduced layers give takes batches: with statistics alone ``top-down`` means ``parallel``.
    Without ``debias`` the weights are those of the group lasso, shrunk by its penalty.
    With ``low_rank`` the neurons go down to several sizes between the whole network and the budget, what is
    left is factored by that recipe down to the budget, all are fitted and run on all samples, and the one
    whose outputs are nearest is taken. Where fits are to batches, layer after layer, all are first fitted to
    an eighth of the batches, of at least 100 samples, and only the better half then to all.

    Source: Robin and Jain, Linear Neural Reconstruction.
    """

    chaining: Chaining = "bottom-up+top-down"
    debias: bool = True
    penalties: int = 24  # along each layer's path, geometric
    smallest: float = 1e-3  # the last penalty over the first
    low_rank: Recipe | None = None  # whose errors are shares of the outputs' variance
    splits: int = 6  # sizes that are tried, all neurons and low rank alone among them

    def __post_init__(self) -> None:
        if self.chaining not in typing.get_args(Chaining):
            raise PlanError(f"chaining must be one of {typing.get_args(Chaining)}, got {self.chaining!r}")
        if self.penalties < 2 or not 0 < self.smallest < 1:
            raise PlanError(
                f"a path needs at least 2 penalties down to a share in (0, 1), got {self.penalties} "
                f"and {self.smallest}"
            )
        if self.splits < 2:
            raise PlanError(f"splits must be at least 2, for either alone, got {self.splits}")

    @property
    def sequential(self) -> bool:
        """Whether weights are fitted to what the reduced layers before them give."""
        return self.chaining.endswith("top-down")

    def __str__(self) -> str:
        own = f"lnr: {self.chaining}, {'debiased' if self.debias else 'not debiased'}"
        return own if self.low_rank is None else f"{own}, with {self.low_rank}"


@dataclass(frozen=True)
class Recipe:
    """A compression method. Both steps are values that print what they do."""

    name: str
    local_step: LocalStep
    global_step: GlobalStep

    def __str__(self) -> str:
        return f"{self.name}: {self.local_step} -> {self.global_step}"
