"""Every op in plain torch and float64: the truth that tests compare with."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.clone,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


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
    activation: str = "none",
) -> Tensor:  # [batch, out, out height, out width]
    """Convolve twice."""
    z = F.conv2d(input.double(), V.double(), None, stride, padding, dilation, groups)
    return _ACTIVATIONS[activation](F.conv2d(z, U.double(), None if bias is None else bias.double()))


def lowrank_linear(
    x: Tensor,  # [..., in]
    U: Tensor,  # [out, groups rank]
    V: Tensor,  # [groups rank, in / groups]
    bias: Tensor | None,  # [out]
    groups: int = 1,
    activation: str = "none",
) -> Tensor:  # [..., out]
    """Multiply by V as one block-diagonal matrix, then by U."""
    blocks = (
        torch.block_diag(*V.double().chunk(groups)) if V.shape[0] else V.new_zeros(0, x.shape[-1]).double()
    )
    z = F.linear(x.double(), blocks)
    return _ACTIVATIONS[activation](F.linear(z, U.double(), None if bias is None else bias.double()))


def autocorrelation(
    x: Tensor,  # [..., in] or [batch, in, *size]
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],  # before and after each axis
    dilation: Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor, int]:  # products [groups, d, d], sums [groups, d], count
    """Store every patch and multiply."""
    if not kernel:
        patches = x.double().reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)
        return patches.mT @ patches, patches.sum(1), patches.shape[1]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    x = F.pad(x.double(), [end for pad in reversed(padding) for end in pad], mode=mode)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    places = range(2, 2 + len(kernel))
    inside = range(2 + len(kernel), x.ndim)
    patches = x.permute(0, *places, 1, *inside).flatten(0, len(kernel)).flatten(1)
    patches = patches.unflatten(1, (groups, -1)).transpose(0, 1)
    return patches.mT @ patches, patches.sum(1), patches.shape[1]


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
