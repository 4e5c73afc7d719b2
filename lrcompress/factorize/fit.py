"""A weight of given low-rank structure, fitted to second moments of inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompress.factorize.encoders import (
    RIDGE,
    expanded,
    group_encoders,
    least_squares,
    patch_order,
)
from lrcompress.factorize.fold import fold
from lrcompress.types import Layer, LowRank, Refinement

_CUT = 1e-10


def fitted_weight(
    layer: Layer,
    weight: Tensor,  # [out, in / conv_groups, *kernel]
    config: LowRank,
    xx: Tensor,  # [conv_groups, d, d], second moment of the layer's inputs; centred or not
    yx: Tensor,  # [conv_groups, out / conv_groups, d], of wanted outputs and inputs, likewise
    how: Refinement,
) -> Tensor:  # float64, like weight
    """Return the weight, of exactly the rank and groups asked for, that gives the outputs best.

    Lowers ``tr(M R M^T) - 2 tr(M R_yx^T) + p |M - W|^2`` over M = D E, with p the prior times the mean of R's
    diagonal; see ``Refinement``. Sweeps are for scheme 0. An existing group whose inputs are all constant
    gets zeros: its outputs are constants, and the bias has them.

    Source: algebra of the normal equations; the sweeps are block coordinate descent with exact steps.
    """
    folded = fold(weight.detach().double(), layer, config.scheme)
    order = patch_order(layer, config.scheme).to(weight.device)
    assert how.prior is not None  # `refined` knows which
    noise = how.prior * xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    rows = weight.detach().double().flatten(1).unflatten(0, (len(xx), -1))
    xx, yx = xx + noise * torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device), yx + noise * rows
    fitted = [
        _fit_group(matrix, order, config, r, c, how) for matrix, r, c in zip(folded, xx, yx, strict=True)
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
    D = least_squares(E @ xx @ E.mT, yx @ E.mT)
    if config.scheme == 0:
        for _ in range(how.sweeps if config.groups > 1 else min(how.sweeps, 1)):  # of one group, one is exact
            E = _swept(D @ E, xx, yx, config)
            D = least_squares(E @ xx @ E.mT, yx @ E.mT)
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
    ridge = RIDGE * xx.diagonal().mean()
    for start in range(0, len(xx), width):
        own = slice(start, start + width)
        values, vectors = torch.linalg.eigh(xx[own, own])
        live = values > _CUT * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
        whitening = vectors * torch.where(live, (values + ridge).clamp(min=1e-300).rsqrt(), 0.0)
        left = yx[:, own] - M @ xx[:, own] + M[:, own] @ xx[own, own]
        U, s, V = torch.linalg.svd(left @ whitening, full_matrices=False)
        encoder = V[: config.rank] @ whitening.mT
        M[:, own] = (U[:, : config.rank] * s[: config.rank]) @ encoder
        encoders.append(encoder)
    block: Tensor = torch.block_diag(*encoders)
    return block
