"""Sets of channels that must be kept or removed together."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """Consecutive indices along a tensor's channel axis: channel after channel, ``width`` indices each."""

    space: int
    channels: int
    width: int


class Channels(NamedTuple):
    """How the channels of a tensor lie along one of its axes."""

    axis: int
    segments: tuple[Segment, ...]


class Spaces:
    """Disjoint sets of channels, joined as the trace finds what shares them."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}  # of the roots that must keep all channels

    def new(self, channels: int) -> tuple[Segment, ...]:
        """Return a new set of channels, one index each."""
        self._parent.append(len(self._parent))
        return (Segment(len(self._parent) - 1, channels, 1),)

    def root(self, space: int) -> int:
        """Return the set that a set has become part of."""
        while self._parent[space] != space:
            space = self._parent[space]
        return space

    def reason(self, space: int) -> str | None:
        """Say why a set must keep all channels; None when it need not."""
        return self._reason.get(self.root(space))

    def hold(self, segments: tuple[Segment, ...], reason: str) -> None:
        """Keep all channels of some sets; the first reason stays."""
        for segment in segments:
            self._reason.setdefault(self.root(segment.space), reason)

    def join(self, left: tuple[Segment, ...], right: tuple[Segment, ...], reason: str) -> None:
        """Join sets side by side; where their channels are cut differently, hold both for ``reason``."""
        cuts = [[(s.channels, s.width) for s in side] for side in (left, right)]
        if cuts[0] != cuts[1]:
            self.hold(left + right, reason)
            return
        for one, other in zip(left, right, strict=True):
            first, second = sorted((self.root(one.space), self.root(other.space)))
            if first == second:
                continue
            self._parent[second] = first
            held = self._reason.pop(second, None)
            if held is not None:
                self._reason.setdefault(first, held)
