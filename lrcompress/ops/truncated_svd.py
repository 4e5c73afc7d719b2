"""Truncated singular value decomposition of many matrices of different shapes."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrcompress.ops._arrays import as_matrices
from lrcompress.ops._eigh import eigh_of

Factors = tuple[Tensor, Tensor, Tensor]


def truncated_svd(
    matrices: Sequence[Any],  # each [rows, columns]; tensors, NumPy or CuPy arrays, on one device
    ranks: Sequence[int],  # of each matrix, 1 to min(rows, columns)
) -> list[Factors]:  # float64: U [rows, rank], S [rank] descending, V [rank, columns]
    """Compute the best approximation ``U diag(S) V`` of each rank, with orthonormal U and V.

    Matrices of one shape and rank are one batch; on CUDA all eigenvectors of one size class are one call of
    cuSOLVER's batched solver. The eigenvectors Q of the smaller Gram matrix,
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
    stacks = [torch.stack([tensors[i].to(torch.float64) for i in members]) for members in batches.values()]
    wide = [_scaled(stack) for stack in stacks]
    bases = eigh_of([each @ each.mT for each, _ in wide])
    factors: dict[int, Factors] = {}
    for ((rows, columns), rank), (each, scale), (_, basis) in zip(batches, wide, bases, strict=True):
        left, values, found = _truncated(each, basis[..., -rank:].flip(-1))
        U, V = (left, found.mT) if rows <= columns else (found, left.mT)
        solved = zip(U, values * scale, V, strict=True)
        factors.update(zip(batches[torch.Size((rows, columns)), rank], solved, strict=True))
    return [factors[i] for i in range(len(tensors))]


def _scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:  # [batch, rows, columns], rows <= columns; [batch, 1]
    """Lay the matrices down, and divide so that squares neither overflow nor vanish."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    scale = wide.abs().amax((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
    return wide / scale[:, None, None], scale[:, None]


def _truncated(
    matrices: Tensor,  # float64 [batch, rows, columns]
    basis: Tensor,  # [batch, rows, rank], leading eigenvectors of their Gram matrices
) -> Factors:  # [batch, rows, rank], [batch, rank], [batch, columns, rank]
    """Find the other side of one batch."""
    right, triangle = torch.linalg.qr(matrices.mT @ basis)  # W^T Q = V^T R, and R is diagonal up to rounding
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    values, order = diagonal.abs().sort(descending=True)
    right = right * torch.where(diagonal < 0, -1.0, 1.0)[:, None, :]
    left = basis.gather(2, order[:, None, :].expand_as(basis))
    right = right.gather(2, order[:, None, :].expand_as(right))
    return left, values, right
