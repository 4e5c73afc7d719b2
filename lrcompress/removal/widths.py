"""Numbers that code reads from the shapes of tensors, and what becomes of them in a narrower network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lrcompress.removal.spaces import Segments


class Watcher(Protocol):
    """What is told how widths are used."""

    def used(self, width: Width, name: str) -> None:
        """Take note of an operator whose result a smaller number would change."""

    def equal(self, one: Width, other: Width) -> None:
        """Take note of two widths that code found equal."""


class Width(int):
    """How many indices some channels own, or a multiple of it: smaller when channels go.

    The product with a plain number is one, too. Whatever else is computed from it or decided on it is told to
    the watcher. A call of torch that gets it sees an int, and the trace sees which channels it counts.
    """

    segments: Segments
    layer: str  # whose weight it is read from, in place of segments
    watcher: Watcher

    def __new__(cls, value: int, watcher: Watcher, segments: Segments = (), layer: str = "") -> Width:
        """Return a number that its watcher hears of."""
        found = super().__new__(cls, value)
        found.segments, found.layer, found.watcher = segments, layer, watcher
        return found

    def __mul__(self, other: Any) -> Any:
        if type(other) is int:
            return Width(int.__mul__(self, other), self.watcher, self.segments, self.layer)
        return self._computed("__mul__", other)

    def __rmul__(self, other: Any) -> Any:
        return self * other if type(other) is int else self._computed("__rmul__", other)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Width) and int.__eq__(self, other):
            self.watcher.equal(self, other)
            return True
        return bool(self._computed("__eq__", other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __reduce__(self) -> Any:
        return int, (int.__add__(self, 0),)  # a copy is a plain number

    def _computed(self, operation: str, *args: Any) -> Any:
        for width in (self, *(arg for arg in args if isinstance(arg, Width))):
            width.watcher.used(width, operation.strip("_"))
        return getattr(int, operation)(self, *args)


def _watched(operation: str) -> Callable[..., Any]:
    def compute(self: Width, *args: Any) -> Any:
        return self._computed(operation, *args)

    return compute


_BINARY = "add sub floordiv truediv mod divmod pow and or xor lshift rshift"
_OTHERS = "neg pos abs invert int float round floor ceil trunc lt le gt ge"
_NAMES = [f"__{side}{name}__" for name in _BINARY.split() for side in ("", "r")]
for _name in (*_NAMES, *(f"__{name}__" for name in _OTHERS.split())):
    setattr(Width, _name, _watched(_name))
