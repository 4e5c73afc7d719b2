"""Groups of columns: their partition, and coordinates in which each group's own block is diagonal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrcompress.ops._second_moments import Moments

Groups = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None
LANES = 4  # the native solver's vectors


class Partition(NamedTuple):
    """Which group each column is in."""

    ids: Tensor  # int64 [columns], 0 to groups - 1
    groups: int
    size: int | None  # of each group, where they are consecutive columns


def partition(groups: Groups, columns: int, device: torch.device) -> Partition:
    """Number the group of each column: None is every column, an int that many consecutive columns.

    Raises:
        ValueError: the groups are no partition of the columns.
    """
    size = 1 if groups is None else groups
    if not isinstance(size, int):
        ids = _group_ids(size, columns)
        return Partition(ids.to(device), int(ids.max()) + 1 if columns else 0, None)
    if size < 1 or columns % size:
        raise ValueError(f"groups of {size} columns do not divide the {columns} columns")
    ids = torch.arange(columns, device=device)
    return Partition(ids if size == 1 else ids // size, columns // size, size)


def _group_ids(
    groups: Sequence[int] | Sequence[Sequence[int]] | Tensor, columns: int
) -> Tensor:  # int64 [columns]
    if isinstance(groups, Tensor):
        groups = groups.tolist()
    if all(isinstance(group, int) for group in groups):
        if len(groups) != columns:
            raise ValueError(f"groups must name a group for each of the {columns} columns, got {len(groups)}")
        numbers: Tensor = torch.unique(
            torch.tensor(groups, dtype=torch.int64, device="cpu"), return_inverse=True
        )[1]
        return numbers
    ids = torch.full((columns,), -1, dtype=torch.int64, device="cpu")
    for number, group in enumerate(groups):
        assert not isinstance(group, int)
        if len(group) == 0:
            raise ValueError(f"groups[{number}] is empty")
        for column in group:
            if not 0 <= column < columns:
                raise ValueError(
                    f"groups[{number}] holds column {column}, but columns are 0 to {columns - 1}"
                )
            if ids[column] >= 0:
                raise ValueError(f"column {column} is in groups {int(ids[column])} and {number}")
            ids[column] = number
    if (ids < 0).any():
        raise ValueError(f"column {int((ids < 0).int().argmax())} is in no group")
    return ids


# Of each size above 1: rows [count * size], None for all, and orthonormal columns [count, size, size].
Rotation = list[tuple[Tensor | None, Tensor]]


@dataclass(frozen=True)
class Problem:
    """The group lasso for ``N``, where the rows of M^T are sorted by group and each group is rotated.

    ``M^T[columns] = rotation N basis^T``: norms of groups stay what they are. Dead columns, those with
    R_jj = 0, are in no row.
    """

    curvature: Tensor  # [rows, rows], diagonal within each group
    linear: Tensor  # [rows, outputs], outputs padded with zeros to whole vectors
    weight: Tensor | None  # [rows, outputs], of the moments
    energy: float
    group: Tensor  # int64 [rows], ascending, numbers of the groups that are left
    starts: Tensor  # int64 [groups + 1]
    kept: Tensor  # int64 [groups], their numbers in the caller's order
    columns: Tensor | slice  # int64 [rows], or all of them in their order
    rotation: Rotation
    basis: Tensor | None  # [out, outputs], orthonormal, where there are more outputs than inputs

    def norms(
        self,
        matrix: Tensor,  # [..., rows, outputs]
    ) -> Tensor:  # [..., groups]
        """Return the Frobenius norm of each group."""
        squares = matrix.square().sum(-1)
        return (
            squares.new_zeros(*squares.shape[:-1], len(self.kept)).index_add_(-1, self.group, squares).sqrt()
        )

    def into(
        self,
        M: Tensor,  # [out, in]
    ) -> Tensor:  # [rows, outputs]
        """Change to the coordinates of N."""
        return _into(M, self.columns, self.rotation, self.basis)

    def out_of(
        self,
        N: Tensor,  # [rows, outputs]
        shape: torch.Size,  # out, in
    ) -> Tensor:  # [out, in]
        """Change back; dead columns are zero."""
        width = shape[0] if self.basis is None else self.basis.shape[1]
        inner = rotate(N[:, :width], self.rotation, back=True).T
        outer = inner.contiguous() if self.basis is None else self.basis @ inner
        if isinstance(self.columns, slice):
            return outer
        return N.new_zeros(shape).index_copy_(1, self.columns, outer)


def rotate(
    matrix: Tensor,  # [rows, any]
    rotation: Rotation,
    back: bool,
) -> Tensor:
    """Multiply each group of rows by its rotation."""
    for rows, vectors in rotation:
        turn = vectors if back else vectors.mT
        part = matrix if rows is None else matrix[rows]
        turned: Tensor = (turn @ part.unflatten(0, vectors.shape[:2])).flatten(0, 1)
        matrix = turned if rows is None else matrix.index_copy(0, rows, turned)
    return matrix


def make_problem(
    moments: Moments,
    parts: Partition,
) -> Problem:
    """Drop dead columns, sort by group, rotate, and drop what the outputs have beyond the inputs."""
    R, cross = moments.R, moments.cross
    alive = R.diagonal() > 0
    columns: Tensor | slice = slice(None)
    if parts.size is not None and alive.all():
        kept, group = torch.arange(parts.groups, device=R.device), parts.ids
        starts = torch.arange(0, len(group) + 1, parts.size, device=R.device)
    else:
        columns = torch.argsort(parts.ids, stable=True)
        columns = columns[alive[columns]]
        kept, group, sizes = torch.unique_consecutive(
            parts.ids[columns], return_inverse=True, return_counts=True
        )
        starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    R = R[columns][:, columns]
    rotation = [] if parts.size == 1 else _rotation(R, starts)
    if rotation:
        R = rotate(rotate(R, rotation, back=False).T, rotation, back=False)
        R.diagonal().clamp_(min=0)
    basis = None
    if cross.shape[0] > len(group):
        # M = basis N: the norms of columns stay, and what is orthogonal to the targets' span is zero.
        basis = torch.linalg.qr(cross[:, columns]).Q
    linear = _into(cross, columns, rotation, basis)
    weight = None if moments.weight is None else _into(moments.weight, columns, rotation, basis)
    energy = moments.energy
    return Problem(R.contiguous(), linear, weight, energy, group, starts, kept, columns, rotation, basis)


def _rotation(
    R: Tensor,  # [rows, rows]
    starts: Tensor,  # int64 [groups + 1]
) -> Rotation:
    """Return the eigenvectors of each group's own block."""
    sizes = starts.diff()
    rotation: Rotation = []
    for size in sorted(set(sizes.tolist()) - {1}):
        alike = sizes == size
        rows = starts[:-1][alike, None] + torch.arange(size, device=R.device)
        vectors = torch.linalg.eigh(R[rows[:, :, None], rows[:, None, :]]).eigenvectors
        rotation.append((None if alike.all() else rows.flatten(), vectors))
    return rotation


def _into(
    M: Tensor,  # [out, in]
    columns: Tensor | slice,
    rotation: Rotation,
    basis: Tensor | None,
) -> Tensor:  # [rows, outputs]
    inner = M[:, columns] if basis is None else basis.T @ M[:, columns]
    rows = rotate(inner.T, rotation, back=False)
    missing = -rows.shape[1] % LANES
    return torch.nn.functional.pad(rows, (0, missing)).contiguous() if missing else rows.contiguous()
