"""Truncated singular value decomposition of many matrices of different shapes."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrcompress.ops._arrays import as_matrices

Factors = tuple[Tensor, Tensor, Tensor]


def truncated_svd(
    matrices: Sequence[Any],  # each [rows, columns]; tensors, NumPy or CuPy arrays, on one device
    ranks: Sequence[int],  # of each matrix, 1 to min(rows, columns)
) -> list[Factors]:  # float64: U [rows, rank], S [rank] descending, V [rank, columns]
    """Compute the best approximation ``U diag(S) V`` of each rank, with orthonormal U and V.

    Matrices of one shape and rank are solved as one batch. The eigenvectors Q of the smaller Gram matrix,
    formed in float64, span one side; the product Q^T W, orthogonalised by QR, gives the other. That QR keeps
    V orthonormal where the Gram matrix has lost the small singular values (below 1e-8 of the largest), also
    for rank-deficient W.

    Raises:
        TypeError: an item is no floating array.
        ValueError: an item is not a matrix, a rank is out of range, or an item holds nan or infinity.
    """
    tensors = as_matrices(matrices)
    if len(ranks) != len(tensors):
        raise ValueError(
            f"ranks must hold one rank for each of the {len(tensors)} matrices, got {len(ranks)}"
        )
    batches: dict[tuple[torch.Size, int], list[int]] = defaultdict(list)
    for i, (matrix, rank) in enumerate(zip(tensors, ranks, strict=True)):
        if not 1 <= rank <= min(matrix.shape):
            raise ValueError(
                f"ranks[{i}] must be 1 to {min(matrix.shape)} for {tuple(matrix.shape)}, got {rank}"
            )
        if not matrix.isfinite().all():
            raise ValueError(f"matrices[{i}] must be finite, got nan or infinity")
        batches[matrix.shape, rank].append(i)
    factors: dict[int, Factors] = {}
    for (_, rank), members in batches.items():
        solved = _truncate(torch.stack([tensors[i].to(torch.float64) for i in members]), rank)
        factors.update(zip(members, zip(*solved, strict=True), strict=True))
    return [factors[i] for i in range(len(tensors))]


def _truncate(
    matrices: Tensor,  # float64 [batch, rows, columns]
    rank: int,
) -> Factors:  # U [batch, rows, rank], S [batch, rank], V [batch, rank, columns]
    """Solve one batch of equal shapes."""
    rows, columns = matrices.shape[1:]
    if rows > columns:
        right, values, left = _truncate(matrices.mT, rank)
        return left.mT, values, right.mT
    scale = matrices.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    matrices = matrices / scale  # so that squares neither overflow nor vanish
    basis = torch.linalg.eigh(matrices @ matrices.mT).eigenvectors[..., -rank:].flip(-1)
    right, triangle = torch.linalg.qr(matrices.mT @ basis)  # W^T Q = V^T R, and R is diagonal up to rounding
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    values, order = diagonal.abs().sort(descending=True)
    right = right * torch.where(diagonal < 0, -1.0, 1.0)[:, None, :]
    left = basis.gather(2, order[:, None, :].expand_as(basis))
    right = right.gather(2, order[:, None, :].expand_as(right))
    return left, values * scale[..., 0], right.mT
