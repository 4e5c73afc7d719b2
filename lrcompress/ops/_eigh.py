"""Eigenvalues and eigenvectors of batches of matrices of different sides, with few calls of the library."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrcompress.ops import _cusolver

Solve = Callable[[Tensor], tuple[Tensor, Tensor]]
_CLASS = 64  # sides are rounded up to a multiple: more matrices a call for at most so many rows more


def eigh_of(
    batches: Sequence[Tensor],  # each float64 [batch, side, side], finite; lower triangles are read
    vectors: bool = True,
) -> list[tuple[Tensor, Tensor]]:  # of each batch: [batch, side] ascending; [batch, side, side], columns
    """Solve every matrix; on CUDA all of one size class in one call of cuSOLVER's batched solver.

    Without ``vectors``, what stands in their place means nothing.
    """
    on_cuda = any(batch.is_cuda for batch in batches)
    library = _cusolver.loaded_library() if on_cuda else None
    if library is None:
        return [
            torch.linalg.eigh(batch) if vectors else (torch.linalg.eigvalsh(batch), batch)
            for batch in batches
        ]
    with torch.cuda.device(batches[0].device):
        stream = torch.cuda.current_stream().cuda_stream
        return by_classes(batches, lambda padded: _cusolver.eigh(library, padded, stream, vectors))


def by_classes(batches: Sequence[Tensor], solve: Solve) -> list[tuple[Tensor, Tensor]]:
    """Solve matrices of one class of sides together.

    Padding adds eigenvalues below all others, whose eigenvectors are zero outside of the padding.
    """
    classes: dict[int, list[int]] = defaultdict(list)
    for i, batch in enumerate(batches):
        classes[-(-batch.shape[-1] // _CLASS) * _CLASS].append(i)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for side, members in classes.items():
        padded = torch.cat([_padded(batches[i], side) for i in members])
        values, bases = solve(padded)
        at = 0
        for i in members:
            count, own = batches[i].shape[:2]
            rows = slice(at, at + count)
            found[i] = values[rows, side - own :], bases[rows, :own, side - own :]
            at += count
    return [found[i] for i in range(len(batches))]


def _padded(batch: Tensor, side: int) -> Tensor:
    """Extend matrices to the side, with a diagonal below every eigenvalue."""
    lower = batch.tril()
    bound = 2 * (lower + lower.tril(-1).mT).abs().sum(-1).amax(-1) + 1  # Gershgorin
    own = batch.shape[-1]
    padded = batch.new_zeros(len(batch), side, side)
    padded[:, :own, :own] = lower
    padded.diagonal(dim1=-2, dim2=-1)[:, own:] = -bound[:, None]
    return padded
