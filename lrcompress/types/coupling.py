"""Channels that several modules share, and which of them a smaller network keeps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from lrcompress.types.errors import PlanError


@dataclass(frozen=True)
class Slot:
    """Where channels lie in a module: channel c owns the indices offset + c width + [0, width)."""

    name: str
    offset: int = 0
    width: int = 1

    def __post_init__(self) -> None:
        if self.offset < 0 or self.width < 1:
            raise PlanError(
                f"slot {self.name!r} must have offset >= 0 and width >= 1, got {self.offset} and {self.width}"
            )


@dataclass(frozen=True)
class Coupling:
    """Channels that can only be removed together, from everything that makes, carries or reads them."""

    channels: int
    producers: tuple[str, ...]  # layers whose output channels these are; none for the network's inputs
    followers: tuple[Slot, ...]  # batch norms, depthwise convolutions: their channels go too
    consumers: tuple[Slot, ...]  # layers whose input columns go

    def __post_init__(self) -> None:
        if self.channels < 1 or not self.consumers:
            raise PlanError(f"a coupling needs channels and consumers, got {self.channels} and none")

    @property
    def name(self) -> str:
        """What makes the channels: the first producer, or the inputs of the reading layer."""
        return self.producers[0] if self.producers else f"inputs of {self.consumers[0].name}"


@dataclass(frozen=True)
class Held:
    """Output channels that all stay, and why."""

    producers: tuple[str, ...]
    channels: int
    reason: str


@dataclass(frozen=True)
class Wiring:
    """What a trace found: the channels that can be removed, and those that cannot."""

    couplings: tuple[Coupling, ...]
    held: tuple[Held, ...]


@dataclass(frozen=True)
class Removal:
    """The channels of one coupling that stay.

    Raises:
        PlanError: ``kept`` is empty, not strictly rising, or names a channel that does not exist.
    """

    coupling: Coupling
    kept: tuple[int, ...]  # rising
    error: float = math.nan  # share of the consumers' output variance lost; nan: not evaluated
    penalty: float = 0.0  # of the group lasso whose shrunk weights are used; 0: least squares

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < math.inf:
            raise PlanError(f"{self.coupling.name!r}: penalty must be a number >= 0, got {self.penalty}")
        kept, channels = self.kept, self.coupling.channels
        rising = all(a < b for a, b in itertools.pairwise(kept))
        if not kept or not rising or kept[0] < 0 or kept[-1] >= channels:
            raise PlanError(
                f"{self.coupling.name!r}: kept must be rising channels out of {channels}, got {list(kept)}"
            )

    def indices(self, slot: Slot) -> list[int]:
        """Return which indices of a slot's module stay, among those that the coupling owns."""
        return [slot.offset + c * slot.width + i for c in self.kept for i in range(slot.width)]

    def gone(self, slot: Slot) -> list[int]:
        """Return which indices of a slot's module go."""
        kept = set(self.kept)
        channels = [c for c in range(self.coupling.channels) if c not in kept]
        return [slot.offset + c * slot.width + i for c in channels for i in range(slot.width)]
