"""Encoders that keep what the outputs need, as the inputs' second moment tells."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompress.types import Layer, encoder_axes

# Directions of the inputs below this share of the strongest are rounding, not signal.
_CUT = 1e-10


def patch_order(layer: Layer, scheme: int) -> Tensor:  # int64 [decoder area, in / conv_groups * encoder area]
    """Return the columns of ``weight.flatten(1)`` that each decoder position reads, channel-major."""
    axes = encoder_axes(scheme, len(layer.kernel))
    columns = torch.arange(layer.params // layer.out_channels)
    grid = columns.view(layer.group_channels, *layer.kernel)
    decoder = [i + 1 for i, mine in enumerate(axes) if not mine]
    encoder = [i + 1 for i, mine in enumerate(axes) if mine]
    _, area = layer.kernel_areas(scheme)
    return grid.permute(*decoder, 0, *encoder).reshape(area, -1)


def group_encoders(
    folded: Tensor,  # float64 [rows, columns], one existing group's weight as `fold` gives it
    moment: Tensor,  # float64 [columns, columns], of the encoder's inputs
    groups: int,
) -> Tensor:  # [groups, full rank, columns / groups], most important first
    """Return each group's optimal encoders of all ranks: the first r rows serve rank r.

    For a group with weight M and inputs of second moment S, rank r loses least of tr(M S M^T) with U^T M, U
    the leading r eigenvectors of M S M^T; where that is the larger side, with V^T S^(-1/2), V the leading
    eigenvectors of S^(1/2) M^T M S^(1/2), directions without variance cut. Uncorrelated with each other.
    """
    width = folded.shape[1] // groups
    M = folded.unflatten(1, (groups, width)).transpose(0, 1)  # [groups, rows, width]
    S = torch.stack([moment[i : i + width, i : i + width] for i in range(0, folded.shape[1], width)])
    if M.shape[1] <= width:
        basis = torch.linalg.eigh(M @ S @ M.mT).eigenvectors.flip(-1)
        return torch.matmul(basis.mT, M)
    values, vectors = torch.linalg.eigh(S)
    live = values > _CUT * values[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    root = vectors * torch.where(live, values, 0.0).sqrt()[:, None, :]
    whitening = vectors * torch.where(live, values, 1.0).rsqrt().mul(live)[:, None, :]
    basis = torch.linalg.eigh(root.mT @ (M.mT @ M) @ root).eigenvectors.flip(-1)
    return torch.matmul(basis.mT, whitening.mT)


def expanded(
    encoders: Tensor,  # [groups, rank, columns / groups]
    order: Tensor,  # from `patch_order`
) -> Tensor:  # [decoder area * groups * rank, d]
    """Write the encoder as a matrix on whole patches: its codes at every position that the decoder reads."""
    block = torch.block_diag(*encoders)
    area, columns = order.shape
    whole = block.new_zeros(area, len(block), area * columns)
    for position in range(area):
        whole[position][:, order[position]] = block
    return torch.flatten(whole, 0, 1)
