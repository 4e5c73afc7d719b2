"""Sets of channels that must be kept or removed together."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """Consecutive indices along a tensor's channel axis: channel after channel, ``width`` indices each."""

    space: int
    channels: int
    width: int


Segments = tuple[Segment, ...]


class Channels(NamedTuple):
    """How the channels of a tensor lie along one of its axes."""

    axis: int
    segments: Segments


def size_of(segments: Segments) -> int:
    """Return how many indices the channels own."""
    return sum(segment.channels * segment.width for segment in segments)


class Spaces:
    """Disjoint sets of channels, joined as the trace finds what shares them."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}  # of the roots that must keep all channels
        self._open: set[int] = set()  # roots that take the layout of what they are joined with
        self._bound: dict[int, Segments] = {}  # that layout

    def new(self, channels: int) -> Segments:
        """Return a new set of channels, one index each."""
        self._parent.append(len(self._parent))
        return (Segment(len(self._parent) - 1, channels, 1),)

    def open(self, indices: int) -> Segments:
        """Return indices that become the channels of what they are joined with, as a batch norm's do."""
        found = self.new(indices)
        self._open.add(found[0].space)
        return found

    def root(self, space: int) -> int:
        """Return the set that a set has become part of."""
        while self._parent[space] != space:
            space = self._parent[space]
        return space

    def resolved(self, segments: Segments) -> Segments:
        """Return the channels that segments are made of by now."""
        found: list[Segment] = []
        for segment in segments:
            root = self.root(segment.space)
            if root in self._bound:
                parts = self.resolved(self._bound[root])
                found += [part._replace(width=part.width * segment.width) for part in parts]
            else:
                found.append(segment._replace(space=root))
        return tuple(found)

    def reason(self, space: int) -> str | None:
        """Say why a set must keep all channels; None when it need not."""
        return self._reason.get(self.root(space))

    def hold(self, segments: Segments, reason: str) -> None:
        """Keep all channels of some sets; the first reason stays."""
        for segment in self.resolved(segments):
            self._reason.setdefault(segment.space, reason)

    def join(self, left: Segments, right: Segments, reason: str) -> None:
        """Join sets side by side; where their channels are cut differently, hold both for ``reason``."""
        left, right = self.resolved(left), self.resolved(right)
        if left == right or self._bind(left, right) or self._bind(right, left):
            return
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

    def _bind(self, left: Segments, right: Segments) -> bool:
        """Give open indices the layout of what they are joined with."""
        if len(left) != 1 or left[0].space not in self._open or size_of(left) != size_of(right):
            return False
        space, _, width = left[0]
        if any(part.width % width for part in right) or any(part.space == space for part in right):
            return False
        self._bound[space] = tuple(part._replace(width=part.width // width) for part in right)
        self._open.discard(space)
        held = self._reason.pop(space, None)
        if held is not None:
            self.hold(right, held)
        return True
