"""The one solve on second moments, for moments that rounding or few samples have left singular."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of each diagonal entry: what is added first. Sums of thousands of float64 products are no better known.
_SHARE = 1e-12
_GROWTH = 8.0  # from one try to the next


class Definite(NamedTuple):
    """A positive definite moment ``A`` and the Cholesky factor of ``A / (root root^T)``."""

    moment: Tensor  # float64 [n, n]
    factor: Tensor  # [n, n], lower
    root: Tensor  # [n], of A's diagonal; 1 where that is zero


def definite(
    xx: Tensor,  # float64 [n, n], a second moment, symmetric but for rounding
    share: float = _SHARE,
    power: Tensor | None = None,  # [n], in whose units the shares are; None: the diagonal
) -> Definite:
    """Return ``xx + t diag(power)`` with the least of t = share, 8 share, ... for which it is definite.

    Rounding goes by the size of each input, so entries are judged as correlations: an input a million times
    larger than the others hides nothing of them. Inputs with a diagonal of zero get zero rows.

    Raises:
        ValueError: an entry is nan or infinite.
    """
    if not xx.isfinite().all():
        raise ValueError("a second moment must be finite, got nan or infinity")
    xx = (xx + xx.mT) / 2
    diagonal = xx.diagonal().clamp(min=0)
    live = diagonal > 0
    noise = torch.where(live, diagonal if power is None else power.to(xx), 0.0)
    while True:
        root = (diagonal + share * noise).sqrt()
        root = torch.where(root > 0, root, 1.0)
        scaled = (xx / root / root[:, None]).clamp(-1, 1) * live * live[:, None]
        scaled.diagonal().fill_(1.0)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not int(failed):
            moment = scaled * root * root[:, None]
            moment.diagonal().mul_(live)
            return Definite(moment, factor, root)
        share *= _GROWTH


def least_squares(
    xx: Tensor,  # [n, n], second moment of inputs
    yx: Tensor,  # [out, n], of outputs and inputs
) -> Tensor:  # float64 [out, n]
    """Return ``yx xx^-1``, where xx need not be definite; inputs without power get zeros."""
    _, factor, root = definite(xx)
    solved: Tensor = torch.cholesky_solve((yx / root).mT, factor).mT / root
    return solved * (xx.diagonal() > 0)


def explained(
    xx: Tensor,  # [n, n]
    yx: Tensor,  # [out, n]
) -> float:
    """Return the power of the outputs' regression on the inputs, ``tr(yx xx^-1 yx^T)``."""
    _, factor, root = definite(xx)
    live = xx.diagonal() > 0
    return float(torch.linalg.solve_triangular(factor, (yx * live / root).mT, upper=False).square().sum())
