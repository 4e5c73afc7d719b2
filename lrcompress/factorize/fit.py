"""A weight of given low-rank structure, fitted to second moments of inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompress import ops
from lrcompress.factorize.encoders import expanded, group_encoders, patch_order
from lrcompress.factorize.fold import fold
from lrcompress.types import Layer, LowRank, Refinement

_CUT = 1e-10


def fitted_weight(
    layer: Layer,
    weight: Tensor,  # [out, in / conv_groups, *kernel]
    config: LowRank,
    xx: Tensor,  # [conv_groups, d, d], second moment of the layer's inputs x; centred or not
    missing: Tensor,  # [conv_groups, out / conv_groups, d], of y - W x and x, y the outputs wanted; likewise
    how: Refinement,
) -> Tensor:  # float64, like weight
    """Return the weight, of exactly the rank and groups asked for, that gives the outputs best.

    Lowers ``E|y - M x|^2 + p |M - W|^2`` over M = D E, with p the prior times the mean of R's diagonal; see
    ``Refinement``. That is ``tr((M - T) S (M - T)^T)`` and a constant, with S = R + p and T = W + missing
    S^-1: where nothing is missing and every weight has the rank, W itself comes back. Inputs of which xx
    says nothing weigh alike. Sweeps are for scheme 0.

    Source: algebra of the normal equations; the sweeps are block coordinate descent with exact steps.
    """
    W = weight.detach().double()
    order = patch_order(layer, config.scheme).to(weight.device)
    assert how.prior is not None  # `refined` knows which
    noise = how.prior * xx.diagonal(dim1=1, dim2=2).mean(1)
    moments = []
    for R, p in zip(xx, noise, strict=True):
        dead = R.diagonal() + p <= 0
        moments.append(ops.definite(R + (p + dead.double() * (R.diagonal().mean() or 1.0)).diag()).moment)
    targets = W.flatten(1).unflatten(0, (len(xx), -1))
    targets = torch.stack(
        [T + ops.least_squares(S, c) for T, S, c in zip(targets, moments, missing, strict=True)]
    )
    if config.rank >= layer.full_rank(config.scheme, config.groups):
        return targets.view(weight.shape)
    folded = fold(W, layer, config.scheme)
    fitted = [
        _fit_group(matrix, order, config, S, T @ S, how)
        for matrix, S, T in zip(folded, moments, targets, strict=True)
    ]
    return torch.cat(fitted).view(weight.shape)


def _fit_group(
    folded: Tensor,  # [rows, columns]
    order: Tensor,  # from `patch_order`
    config: LowRank,
    xx: Tensor,  # [d, d]
    yx: Tensor,  # [out, d]
    how: Refinement,
) -> Tensor:  # [out, d]
    """Fit one existing group."""
    if how.encoder == "inputs":
        moment = sum(xx[columns][:, columns] for columns in order)
    else:
        moment = torch.eye(folded.shape[1], dtype=xx.dtype, device=xx.device)
    assert isinstance(moment, Tensor)
    E = expanded(group_encoders(folded, moment, config.groups)[:, : config.rank], order)
    D = ops.least_squares(E @ xx @ E.mT, yx @ E.mT)
    if config.scheme == 0:
        for _ in range(how.sweeps if config.groups > 1 else min(how.sweeps, 1)):  # of one group, one is exact
            E = _swept(D @ E, xx, yx, config)
            D = ops.least_squares(E @ xx @ E.mT, yx @ E.mT)
    fitted: Tensor = D @ E
    return fitted


def _swept(
    fitted: Tensor,  # [out, d]
    xx: Tensor,  # [d, d]
    yx: Tensor,  # [out, d]
    config: LowRank,
) -> Tensor:  # encoders as one matrix, [groups rank, d]
    """Replace each group's part by the best of its rank given the others, in turn; return the encoders.

    What the others leave has the regression C S^-1 on the group's inputs, C its moment with them and S
    theirs; the best part of rank r is the truncated SVD of C S^(-1/2), times S^(-1/2).
    """
    width = len(xx) // config.groups
    M, encoders = fitted.clone(), []
    for start in range(0, len(xx), width):
        own = slice(start, start + width)
        values, vectors = torch.linalg.eigh(xx[own, own])
        live = values > _CUT * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
        whitening = vectors * torch.where(live, values, 1.0).rsqrt() * live
        left = yx[:, own] - M @ xx[:, own] + M[:, own] @ xx[own, own]
        U, s, V = torch.linalg.svd(left @ whitening, full_matrices=False)
        encoder = V[: config.rank] @ whitening.mT
        M[:, own] = (U[:, : config.rank] * s[: config.rank]) @ encoder
        encoders.append(encoder)
    block: Tensor = torch.block_diag(*encoders)
    return block
