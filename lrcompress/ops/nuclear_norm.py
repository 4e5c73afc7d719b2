"""Soft low rank: singular-value shrinkage of a weight as its inputs see it."""

import torch
from torch import Tensor

from lrcompress.ops._second_moments import moments


def nuclear_norm(
    R: Tensor,  # E[x x^T], [in, in], symmetric and positive semi-definite
    weight: Tensor,  # [out, in]
    penalty: float,
) -> tuple[Tensor, Tensor]:  # float64: U [out, rank], V [rank, in]
    """Minimise ``1/2 E||W x - M x||^2 + penalty ||M T||_*`` over M = U V, where R = T T^T.

    The minimum shrinks each singular value of W T by the penalty, so it is exact and takes one
    eigendecomposition: of W R W^T, whose eigenvalues are their squares. With its eigenvectors Q and
    f = (1 - penalty / s)_+ it is M = Q diag(f) Q^T W, which needs no inverse of T: R may be singular. The
    rank is the number of singular values above the penalty and above what rounding leaves of the largest,
    the root of its type's epsilon times the larger side of W, and may be 0.

    Raises:
        ValueError: a shape, value or device is not as annotated, or R is not symmetric or has a negative
            eigenvalue, beyond rounding.
    Source: Cai, Candes and Shen (2010), theorem 2.1, in the coordinates M T.
    """
    given = moments(R, weight, None)
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"penalty must be at least 0 and finite, got {penalty}")
    W = weight.detach().to(torch.float64)
    squares, vectors = torch.linalg.eigh(given.cross @ W.T)
    values = squares.clamp(min=0).sqrt()
    rounding = (max(W.shape) * torch.finfo(torch.float64).eps) ** 0.5  # of the squares: eps a term
    noise = values.amax() * rounding if len(values) else values.sum()
    kept = (values > penalty) & (values > noise)
    roots = (1 - penalty / values[kept]).sqrt().flip(0)
    basis = vectors[:, kept].flip(1)
    return basis * roots, roots[:, None] * (basis.T @ W)
