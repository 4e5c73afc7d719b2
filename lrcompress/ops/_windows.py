"""Which products of shifted images the blocks of an autocorrelation share."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor

Triple = tuple[int, int, int]
_LEAST_SHARE = 1 << 10  # pixels for whose sum a block is worth its while


@dataclass(frozen=True)
class Axis:
    """One axis of an image and of the kernel that slides along it."""

    size: int  # pixels, without padding
    kernel: int = 1
    stride: int = 1
    padding: int = 0  # zeros before the first pixel
    dilation: int = 1
    out: int = 1  # places of the kernel

    @property
    def span(self) -> int:
        """Pixels from the first to the last that lie under the kernel."""
        return self.dilation * (self.kernel - 1) + 1

    def window(self, u: int, v: int) -> range:
        """Pixels that lie under kernel position ``u`` while the one under ``v`` is a pixel too."""
        first = u * self.dilation - self.padding
        low, high = max(0, (u - v) * self.dilation), min(self.size, self.size + (u - v) * self.dilation)
        start = first + self.stride * max(0, -((first - low) // self.stride))
        return range(start, min(high, first + self.stride * self.out), self.stride)


@dataclass(frozen=True)
class Cell:
    """A box of pixels, ``stride`` apart."""

    start: Triple
    count: Triple


@dataclass(frozen=True)
class Offset:
    """Pairs of kernel positions (u, v) at one distance, whose windows share a lattice of pixels.

    With ``P(cell) = sum of x[q] x[q + distance]^T`` over the pixels q of a cell, block (u, v) of the
    autocorrelation is the sum of P over the cells of the window.
    """

    distance: Triple  # pixels; first entry that is not zero: positive
    cells: list[Cell]  # disjoint, none empty
    windows: list[tuple[int, int, list[int]]]  # u, v >= u, both row-major; indices of cells


_Member = tuple[int, int, range]  # u, v, window
_Class = tuple[int, list[_Member]]  # distance, members


def _classes(axis: Axis) -> list[_Class]:
    """Sort the pairs of kernel positions of one axis by distance and lattice."""
    found: dict[tuple[int, int], list[_Member]] = defaultdict(list)
    for u, v in product(range(axis.kernel), repeat=2):
        lattice = (u * axis.dilation - axis.padding) % axis.stride
        found[v - u, lattice].append((u, v, axis.window(u, v)))
    return [(steps * axis.dilation, members) for (steps, _), members in found.items()]


def _cut(members: list[_Member]) -> tuple[list[range], list[list[int]]]:
    """Cut the union of windows where one begins or ends; return the parts and those of each window."""
    windows = [window for _, _, window in members]
    ends = sorted({end for window in windows if window for end in (window[0], window[-1] + window.step)})
    pieces = [range(low, high, windows[0].step) for low, high in pairwise(ends)]
    parts = [piece for piece in pieces if any(piece[0] in window for window in windows)]
    return parts, [[i for i, part in enumerate(parts) if part[0] in window] for window in windows]


def offsets(axes: tuple[Axis, Axis, Axis]) -> Iterator[Offset]:
    """Enumerate the distances of kernel positions, one of each pair of opposite ones.

    A kernel of n positions has n (n + 1) / 2 blocks on and above the diagonal. At stride 1 they need one
    product of whole images a distance, 13 for 3 x 3 rather than 45, and thin strips along the border.
    """
    cut = [[(distance, members, *_cut(members)) for distance, members in _classes(axis)] for axis in axes]
    for triple in product(*cut):
        distance = (triple[0][0], triple[1][0], triple[2][0])
        if distance < (0, 0, 0):
            continue
        indices: dict[tuple[int, ...], int] = {}
        cells: list[Cell] = []
        for place in product(*(range(len(parts)) for _, _, parts, _ in triple)):
            z, y, x = (parts[i] for i, (_, _, parts, _) in zip(place, triple, strict=True))
            indices[place] = len(cells)
            cells.append(Cell((z[0], y[0], x[0]), (len(z), len(y), len(x))))
        windows = []
        for places in product(*(range(len(members)) for _, members, _, _ in triple)):
            u = v = 0
            for i, (_, members, _, _), axis in zip(places, triple, axes, strict=True):
                u, v = u * axis.kernel + members[i][0], v * axis.kernel + members[i][1]
            inside = product(*(of[i] for i, (_, _, _, of) in zip(places, triple, strict=True)))
            windows.append((u, v, [indices[place] for place in inside]))
        yield Offset(distance, cells, windows)


@lru_cache(maxsize=256)
def centre(axes: tuple[Axis, Axis, Axis]) -> list[Offset]:
    """Return the offsets of distance zero: their windows are those of single kernel positions."""
    return [offset for offset in offsets(axes) if offset.distance == (0, 0, 0)]


@lru_cache(maxsize=256)
def tables(axes: tuple[Axis, Axis, Axis], device: torch.device) -> list[Tensor]:
    """Write all offsets, cells, windows and parts as the kernel's int64 tables, one row an item.

    A model calls for the same few again and again, and those of large kernels take milliseconds.
    """
    offset_rows: list[tuple[int, ...]] = []
    cell_rows: list[tuple[int, ...]] = []
    window_rows: list[tuple[int, ...]] = []
    parts: list[int] = []
    for offset in offsets(axes):
        first = (len(cell_rows), len(window_rows))
        for u, v, inside in offset.windows:
            window_rows.append((u, v, len(parts), len(parts) + len(inside)))
            parts += (first[0] + i for i in inside)
        cell_rows += ((*cell.start, *cell.count) for cell in offset.cells)
        offset_rows.append((*offset.distance, first[0], len(cell_rows), first[1], len(window_rows)))
    rows = (offset_rows, cell_rows, window_rows, parts)
    return [torch.tensor(table, dtype=torch.int64, device=device) for table in rows]


@dataclass(frozen=True)
class Rounds:
    """How the CUDA kernel cuts its work: in rounds whose cells' products fit a workspace."""

    splits: int  # shares of a cell's pixels, each with products of its own
    ranges: list[tuple[int, int, int, int]]  # first and end of the cells, then of the windows, of a round
    cells: int  # of the largest round


def rounds(
    axes: tuple[Axis, Axis, Axis],
    pixels: int,  # of all images
    products: int,  # of one cell, all groups: entries of 8 bytes
    blocks: int,  # of one cell
    wanted: int,  # blocks, so that the device is busy
    room: int,  # bytes, exceeded only where a single offset needs more
) -> Rounds:
    """Choose how many shares there are, and which neighbouring offsets go together."""
    table: list[list[int]] = tables(axes, torch.device("cpu"))[0].tolist()
    most = max(end - first for *_, first, end, _, _ in table)
    splits = min(
        wanted // (blocks * len(table)), pixels // _LEAST_SHARE, room // (8 * products * max(1, most))
    )
    splits = max(1, splits)
    limit = room // (8 * products * splits)
    ranges: list[tuple[int, int, int, int]] = []
    for *_, first, end, first_window, end_window in table:
        if ranges and end - ranges[-1][0] <= limit:
            ranges[-1] = (ranges[-1][0], end, ranges[-1][2], end_window)
        else:
            ranges.append((first, end, first_window, end_window))
    return Rounds(splits, ranges, max(end - first for first, end, _, _ in ranges))
