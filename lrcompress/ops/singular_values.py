"""Singular values of many matrices of different shapes, for many ways to cut their columns into groups."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lrcompress.ops._arrays import as_matrices
from lrcompress.ops.gram import gram
from lrcompress.ops.symmetric_eigenvalues import symmetric_eigenvalues

# Gram matrices held at once, in float64 entries: 64 MiB, some times the largest layers', so that memory stays
# bounded for large models, and new pages, which cost as much as the products, are few.
_WORKSPACE = 1 << 23


class _Layout(NamedTuple):
    """How the Gram matrices of one matrix come about; each group count is in one of the three."""

    products: list[int]  # multiplied out
    cuts: dict[int, int]  # count -> the coarser product that has its W^T W on the diagonal
    sums: dict[int, int]  # count -> the finer count whose W W^T add up to its own, finest first

    def size(self, rows: int, columns: int) -> int:
        """Return the entries of the workspace that they fill."""
        return sum(count * min(rows, columns // count) ** 2 for count in (*self.products, *self.sums))


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
    layouts = [
        _layout(matrix.shape[0], matrix.shape[1], chosen)
        for matrix, chosen in zip(tensors, counts, strict=True)
    ]
    sizes = [layout.size(*matrix.shape) for matrix, layout in zip(tensors, layouts, strict=True)]
    parts = list(_parts(sizes))
    largest = max(sum(sizes[part.start : part.stop]) for part in parts)
    workspace = torch.empty(largest, dtype=torch.float64, device=tensors[0].device if tensors else None)
    found: list[dict[int, Tensor]] = []
    for part in parts:
        span = slice(part.start, part.stop)
        found += _solve(tensors[span], counts[span], layouts[span], workspace)
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


def _layout(
    rows: int,
    columns: int,
    counts: list[int],  # ascending divisors of columns
) -> _Layout:
    """Choose the fewest products from which every group count's smaller Gram matrices follow."""
    layout = _Layout([], {}, {})
    for count in (c for c in counts if columns // c <= rows):  # W^T W, coarse to fine
        coarser = next((c for c in layout.products if count % c == 0), None)
        if coarser is None:
            layout.products.append(count)
        else:
            layout.cuts[count] = coarser
    finer: list[int] = []
    for count in (c for c in reversed(counts) if columns // c > rows):  # W W^T, fine to coarse
        nearest = next((c for c in reversed(finer) if c % count == 0), None)
        if nearest is None:
            layout.products.append(count)
        else:
            layout.sums[count] = nearest
        finer.append(count)
    return layout


def _parts(sizes: list[int]) -> Iterator[range]:
    """Cut the list into runs whose Gram matrices fit the workspace together."""
    start = total = 0
    for i, size in enumerate(sizes):
        if total and total + size > _WORKSPACE:
            yield range(start, i)
            start, total = i, 0
        total += size
    yield range(start, len(sizes))


def _solve(
    matrices: list[Tensor],  # each [rows, columns]
    counts: list[list[int]],  # of each matrix
    layouts: list[_Layout],  # of each matrix
    workspace: Tensor,  # float64 [at least the sum of the layouts' sizes]
) -> list[dict[int, Tensor]]:  # of each matrix: groups -> [groups, rank], descending
    """Form all Gram matrices in the workspace, and turn their eigenvalues into singular values."""
    wanted = [
        (matrix, count) for matrix, made in zip(matrices, layouts, strict=True) for count in made.products
    ]
    products = iter(gram([_blocks(matrix, count) for matrix, count in wanted], workspace))
    grams = [{count: next(products) for count in layout.products} for layout in layouts]
    used = sum(blocks.numel() for each in grams for blocks in each.values())
    for each, layout in zip(grams, layouts, strict=True):
        for count, finer in layout.sums.items():
            terms = each[finer].unflatten(0, (count, -1))  # [count, finer / count, side, side]
            size = count * terms[0, 0].numel()
            each[count] = torch.sum(terms, 1, out=workspace[used : used + size].view_as(terms[:, 0]))
            used += size
    problems = [
        _problems(each[layout.cuts.get(count, count)], count)
        for each, layout, chosen in zip(grams, layouts, counts, strict=True)
        for count in chosen
    ]
    if not problems:
        return [{} for _ in matrices]
    roots = symmetric_eigenvalues(workspace, torch.cat(problems)).clamp(min=0).sqrt()
    solved = iter(roots.split([int(table[:, 2].sum()) for table in problems]))
    return [{count: next(solved).view(count, -1).flip(1) for count in chosen} for chosen in counts]


def _blocks(matrix: Tensor, count: int) -> Tensor:  # [count, side, terms], side <= terms
    """View each group of columns, transposed if it is tall, so that A A^T is its smaller Gram matrix."""
    exact = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    blocks: Tensor = exact.unflatten(1, (count, exact.shape[1] // count)).transpose(0, 1)
    return blocks.mT if blocks.shape[2] <= blocks.shape[1] else blocks


def _problems(
    grams: Tensor,  # [batch, side, side], a view of the workspace; batch divides count
    count: int,
) -> Tensor:  # int64 [count, 3]: offset, row stride and side, as `symmetric_eigenvalues` takes them
    """List the `count` diagonal blocks of all Gram matrices together."""
    batch, side, _ = grams.shape
    width = side * batch // count
    block = torch.arange(count, device="cpu")
    inside = block % (count // batch)
    offsets = (
        int(grams.storage_offset()) + block // (count // batch) * side * side + inside * width * (side + 1)
    )
    return torch.stack([offsets, torch.full_like(block, side), torch.full_like(block, width)], 1)
