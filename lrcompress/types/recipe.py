"""The grammar of a method: a local step and a global step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lrcompress.types.layer import Layer

if TYPE_CHECKING:
    from lrcompress.types.options import OptionTable


class LocalStep(Protocol):
    """Weights -> options: what a method can do to each layer, at what cost and what error."""

    def __call__(
        self,
        layers: tuple[Layer, ...],
        weights: tuple[Any, ...],  # the layers' weight tensors
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


@dataclass(frozen=True)
class Recipe:
    """A compression method. Both steps are values that print what they do."""

    name: str
    local_step: LocalStep
    global_step: GlobalStep

    def __str__(self) -> str:
        return f"{self.name}: {self.local_step} -> {self.global_step}"
