"""Singular values of many matrices of different shapes, for many ways to cut their columns into groups."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lrcompress.ops._arrays import as_matrices
from lrcompress.ops.symmetric_eigenvalues import symmetric_eigenvalues

# Gram matrices held at once, in float64 entries: 256 MiB, so that memory stays bounded for large models.
_WORKSPACE = 1 << 25


def singular_values(
    matrices: Sequence[Any],  # each [rows, columns]; tensors, NumPy or CuPy arrays, on one device
    groups: Iterable[int] | Sequence[Iterable[int]] = (1,),  # group counts for all, or of each matrix
) -> list[dict[int, Tensor]]:  # of each matrix: groups -> float64 [groups, rank], descending
    """Compute the singular values of each block of columns, ``rank = min(rows, columns / groups)``.

    They are the roots of the eigenvalues of W W^T or W^T W, whichever is smaller, formed in float64. One
    product serves every group count: W^T W of a group is a diagonal block of a coarser group's, and W W^T of
    a group is the sum of its finer groups'. Values above 1e-4 of the largest have a relative error of at most
    1e-6, the others an absolute error of at most 1e-7 of the largest. A group count that does not divide a
    matrix's columns is left out of its dict. Not differentiable. A block with nan or infinity gives
    nan. Entries should lie within 1e-150 and 1e150 in magnitude, so that their squares are float64 numbers.

    Raises:
        TypeError: an item is no floating array.
        ValueError: an item is not a matrix, a group count is below 1, or the items lie on different devices.
    """
    tensors = as_matrices(matrices)
    counts = [
        sorted({count for count in chosen if matrix.shape[1] % count == 0})
        for matrix, chosen in zip(tensors, _groups_of_each(groups, len(tensors)), strict=True)
    ]
    found: list[dict[int, Tensor]] = []
    for part in _parts(tensors, counts):
        grams = [_grams(tensors[i], counts[i]) for i in part]
        found += _roots_of_eigenvalues(grams)
    return found


def _groups_of_each(groups: Iterable[int] | Sequence[Iterable[int]], matrices: int) -> list[list[int]]:
    """Return the group counts of each matrix."""
    given = list(groups)
    if all(isinstance(count, int) for count in given):
        each = [cast("list[int]", given)] * matrices
    else:
        each = [list(cast("Iterable[int]", counts)) for counts in given]
    if len(each) != matrices:
        raise ValueError(
            f"groups must be one list or one for each of the {matrices} matrices, got {len(each)}"
        )
    if any(count < 1 for counts in each for count in counts):
        raise ValueError(f"group counts must be at least 1, got {min(min(c, default=1) for c in each)}")
    return each


def _parts(tensors: list[Tensor], counts: list[list[int]]) -> Iterator[range]:
    """Cut the list into runs whose Gram matrices fit the workspace together."""
    start = size = 0
    for i, (tensor, chosen) in enumerate(zip(tensors, counts, strict=True)):
        rows, columns = tensor.shape
        needed = sum(count * min(rows, columns // count) ** 2 for count in chosen)
        if size and size + needed > _WORKSPACE:
            yield range(start, i)
            start, size = i, 0
        size += needed
    yield range(start, len(tensors))


def _grams(
    matrix: Tensor,  # [rows, columns]
    counts: list[int],  # divisors of columns
) -> dict[int, Tensor]:  # groups -> float64 [groups, side, side]; blocks may be views of each other
    """Form the smaller Gram matrix of every block of columns."""
    rows, columns = matrix.shape
    exact = matrix.to(torch.float64)
    grams: dict[int, Tensor] = {}
    for count in (c for c in counts if columns // c <= rows):  # W^T W, coarse to fine
        width = columns // count
        coarser = next((c for c in grams if count % c == 0), None)
        if coarser is None:
            blocks = exact.reshape(rows, count, width).transpose(0, 1)
            grams[count] = blocks.mT @ blocks
        else:
            parts = (count // coarser, width)
            cut = grams[coarser].unflatten(-1, parts).unflatten(1, parts)
            grams[count] = cut.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(count, width, width)
    wide: dict[int, Tensor] = {}
    for count in (c for c in reversed(counts) if columns // c > rows):  # W W^T, fine to coarse
        finer = next((c for c in reversed(wide) if c % count == 0), None)
        if finer is None:
            blocks = exact.reshape(rows, count, columns // count).transpose(0, 1)
            wide[count] = blocks @ blocks.mT
        else:
            wide[count] = wide[finer].unflatten(0, (count, -1)).sum(1)
    return grams | wide


def _roots_of_eigenvalues(grams: list[dict[int, Tensor]]) -> list[dict[int, Tensor]]:
    """Turn each Gram matrix into singular values, all of them in one batched solve."""
    blocks = [block for each in grams for block in each.values()]
    if not blocks:
        return [{} for _ in grams]
    offsets, start = [], 0
    for block in blocks:
        offsets.append(start)
        start += block.numel()
    problems = torch.cat(
        [
            torch.stack([offset + torch.arange(count) * side * side, *torch.full((2, count), side)], 1)
            for offset, (count, side) in zip(offsets, (block.shape[:2] for block in blocks), strict=True)
        ]
    )
    values = symmetric_eigenvalues(torch.cat([block.flatten() for block in blocks]), problems)
    shapes = [block.shape[:2] for block in blocks]
    roots = values.clamp(min=0).sqrt().split([math.prod(shape) for shape in shapes])
    descending = (root.view(shape).flip(1) for root, shape in zip(roots, shapes, strict=True))
    return [{count: next(descending) for count in each} for each in grams]
