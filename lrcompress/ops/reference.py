"""Every op in plain torch and float64: the truth that tests compare with."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def singular_values(
    matrices: Sequence[Tensor],  # each [rows, columns]
    groups: Sequence[Iterable[int]],  # of each matrix
) -> list[dict[int, Tensor]]:  # of each matrix: groups -> [groups, rank]
    """Compute the singular values of each block of columns by a full SVD."""
    return [
        {count: torch.linalg.svdvals(torch.stack(matrix.double().chunk(count, 1))) for count in counts}
        for matrix, counts in zip(matrices, groups, strict=True)
    ]


def truncated_svd(
    matrices: Sequence[Tensor],  # each [batch, rows, columns]
    ranks: Sequence[int],
) -> list[tuple[Tensor, Tensor, Tensor]]:  # U [batch, rows, rank], S [batch, rank], V [batch, rank, columns]
    """Truncate the full SVD of each matrix."""
    factors = []
    for matrix, rank in zip(matrices, ranks, strict=True):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        factors.append((left[..., :rank], values[..., :rank], right[..., :rank, :]))
    return factors


def symmetric_eigenvalues(
    matrices: Sequence[Tensor],  # each [side, side], symmetric
) -> list[Tensor]:  # each [side], ascending
    """Compute the eigenvalues of each matrix."""
    return [torch.linalg.eigvalsh(matrix.double()) for matrix in matrices]


def gram(
    batches: Sequence[Tensor],  # each [batch, side, terms]
) -> list[Tensor]:  # each [batch, side, side], zero above the diagonal
    """Multiply each matrix by its transpose."""
    return [(batch.double() @ batch.double().mT).tril() for batch in batches]


def lowrank_conv2d(
    input: Tensor,  # [batch, channels, height, width]
    U: Tensor,  # [out, groups rank, 1, 1]
    V: Tensor,  # [groups rank, channels / groups, kernel height, kernel width]
    bias: Tensor | None,  # [out]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # [batch, out, out height, out width]
    """Convolve twice."""
    z = F.conv2d(input.double(), V.double(), None, stride, padding, dilation, groups)
    return F.conv2d(z, U.double(), None if bias is None else bias.double())


def group_lasso(
    R: Tensor,  # [in, in]
    weight: Tensor,  # [out, in]
    penalty: float,
    ids: Tensor,  # int64 [in], the group of each column
    iterations: int,
) -> Tensor:  # [out, in]
    """Take proximal-gradient steps with Nesterov's momentum, from zero."""
    R, W = R.double(), weight.double()
    step = 1 / torch.linalg.eigvalsh(R)[-1]
    M = previous = torch.zeros_like(W)
    for n in range(1, iterations + 1):
        point = M + (n - 1) / (n + 2) * (M - previous)
        moved = point - step * (point - W) @ R
        norms = torch.zeros(int(ids.max()) + 1).double().index_add_(0, ids, moved.square().sum(0)).sqrt()
        factors = (1 - step * penalty / norms.clamp(min=1e-300)).clamp(min=0)
        previous, M = M, moved * factors[ids]
    return M


def nuclear_norm(
    R: Tensor,  # [in, in]
    weight: Tensor,  # [out, in]
    penalty: float,
) -> Tensor:  # M [out, in]
    """Shrink the singular values of W R^(1/2), and divide by the root."""
    values, vectors = torch.linalg.eigh(R.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    left, shrunk, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    M: Tensor = (left * (shrunk - penalty).clamp(min=0)) @ right @ torch.linalg.pinv(root, hermitian=True)
    return M
