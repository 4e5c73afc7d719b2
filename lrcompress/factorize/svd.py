"""Grouped SVD: each group of input channels gets factors of its own (ALDS; with one group, plain SVD)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrcompress import ops
from lrcompress.factorize.fold import fold, unfold_factors
from lrcompress.types import Layer, LowRank
from lrcompress.types.options import FloatArray, OptionTable
from lrcompress.types.statistics import LayerStatistics

ErrorKind = Literal["released", "bound", "sum_bound", "exact", "frobenius", "squared"]

# Ranks at which `exact` is evaluated for each group count: each needs an eigenvalue problem of its own.
_EXACT_RANKS = 32


class _Spectrum(NamedTuple):
    """The singular values of one folded weight, cut into groups."""

    values: FloatArray  # [conv_groups, groups, full rank], descending
    norm: float  # spectral norm of the whole operator
    energy: float  # squared Frobenius norm of the whole weight


def _dropped(values: FloatArray) -> FloatArray:
    """Return sigma_{rank + 1} of each group for rank = 1 ... full rank, with 0 after the last."""
    return np.concatenate((values[..., 1:], np.zeros_like(values[..., :1])), axis=-1)


def _tail_energy(spectrum: _Spectrum) -> FloatArray:
    """Return the sum over all groups of the squared values dropped at each rank."""
    squares = (_dropped(spectrum.values) ** 2).sum((0, 1))
    tails: FloatArray = np.cumsum(squares[::-1])[::-1]
    return tails


def _released(spectrum: _Spectrum) -> FloatArray:
    error: FloatArray = _dropped(spectrum.values).max((0, 1)) / spectrum.norm
    return error


def _bound(spectrum: _Spectrum) -> FloatArray:
    error: FloatArray = _released(spectrum) * np.sqrt(spectrum.values.shape[1])
    return error


def _sum_bound(spectrum: _Spectrum) -> FloatArray:
    error: FloatArray = np.sqrt((_dropped(spectrum.values) ** 2).sum(1).max(0)) / spectrum.norm
    return error


def _frobenius(spectrum: _Spectrum) -> FloatArray:
    error: FloatArray = np.sqrt(_tail_energy(spectrum) / spectrum.energy)
    return error


_ERRORS: dict[str, Callable[[_Spectrum], FloatArray]] = {
    "released": _released,
    "bound": _bound,
    "sum_bound": _sum_bound,
    "frobenius": _frobenius,
    "squared": _tail_energy,
}


@dataclass(frozen=True)
class GroupedSVD:
    """Local step: fold scheme x group count x rank.

    With s_i the singular values of column group i, k groups, and W the folded weight, a rank r has the error

    - ``released``: max_i s_i[r+1] / |W|. Not a bound for k > 1, yet the best data-free choice on trained
      networks.
    - ``bound``: sqrt(k) max_i s_i[r+1] / |W|, theorem 1 of the paper.
    - ``sum_bound``: sqrt(sum_i s_i[r+1]^2) / |W|, a tighter bound.
    - ``exact``: the relative spectral norm of what is dropped, at most 32 ranks for each k > 1.
    - ``frobenius``: the relative Frobenius norm of what is dropped.
    - ``squared``: the squared Frobenius norm of what is dropped, not relative.

    Where the layer has groups already, each of them is such a W, and the errors are those of the whole
    operator. Options larger than the dense layer, in parameters or multiply-accumulates, are left out.

    Source: Liebenwein et al. 2021, section 2 and theorem 1; ``released`` is what the authors' code computes.
    """

    needs_statistics: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    error: ErrorKind = "released"
    schemes: tuple[int, ...] = (0,)
    groups: tuple[int, ...] | None = None  # None: every divisor of the layer's input channels

    def __call__(
        self,
        layers: tuple[Layer, ...],
        weights: tuple[Tensor, ...],  # the layers' weights
        statistics: Mapping[str, LayerStatistics],  # not used: these errors are of weights alone
    ) -> list[OptionTable]:
        """Return the options of each layer, row 0 the dense one."""
        jobs = [
            (i, scheme)
            for i, layer in enumerate(layers)
            for scheme in layer.schemes
            if scheme in self.schemes
        ]
        folded = [fold(weights[i], layers[i], scheme) for i, scheme in jobs]
        counts = [self._group_counts(layers[i]) for i, _ in jobs]
        values = ops.singular_values(
            [matrix.transpose(0, 1).flatten(1) for matrix in folded],  # existing groups side by side
            [[layers[i].conv_groups * k for k in {1, *ks}] for (i, _), ks in zip(jobs, counts, strict=True)],
        )
        columns: list[list[FloatArray]] = [[] for _ in layers]
        for (i, scheme), matrix, ks, spectra in zip(jobs, folded, counts, values, strict=True):
            existing = layers[i].conv_groups
            whole = spectra[existing].cpu().numpy()
            norm, energy = float(whole.max(initial=0)) or 1.0, float((whole**2).sum()) or 1.0
            for k in ks:
                spectrum = spectra[existing * k].cpu().numpy().reshape(existing, k, -1)
                ranks, errors = self._errors(matrix, _Spectrum(spectrum, norm, energy))
                columns[i].append(option_rows(layers[i], scheme, k, ranks, errors))
        return [option_table(layer, found) for layer, found in zip(layers, columns, strict=True)]

    def _group_counts(self, layer: Layer) -> list[int]:
        channels = layer.group_channels
        wanted = range(1, channels + 1) if self.groups is None else self.groups
        return [k for k in wanted if channels % k == 0]

    def _errors(
        self,
        matrix: Tensor,  # [conv_groups, rows, columns]
        spectrum: _Spectrum,
    ) -> tuple[FloatArray, FloatArray]:  # ranks, errors
        full = spectrum.values.shape[-1]
        if self.error != "exact":
            return np.arange(1, full + 1), _ERRORS[self.error](spectrum)
        if spectrum.values.shape[1] == 1:
            return np.arange(1, full + 1), _released(spectrum)
        ranks = np.unique(np.linspace(1, full, min(full, _EXACT_RANKS)).round().astype(int))
        return ranks, _residual_norms(matrix, spectrum.values.shape[1], ranks) / spectrum.norm


def _residual_norms(
    matrix: Tensor,  # [conv_groups, rows, columns]
    groups: int,
    ranks: FloatArray,  # of each group
) -> FloatArray:
    """Return the spectral norm of what each rank drops, over all existing groups."""
    blocks = [block for existing in matrix for block in existing.chunk(groups, 1)]
    factors = ops.truncated_svd(blocks, [min(blocks[0].shape)] * len(blocks))
    residuals = []
    for rank in ranks:
        dropped = [(U[:, rank:] * S[rank:]) @ V[rank:] for U, S, V in factors]
        residuals += list(torch.stack(dropped).unflatten(0, (-1, groups)).transpose(1, 2).flatten(2))
    norms = [
        float(values[1].max()) if values[1].numel() else 0.0 for values in ops.singular_values(residuals)
    ]
    worst: FloatArray = np.array(norms).reshape(len(ranks), -1).max(1)
    return worst


def option_rows(layer: Layer, scheme: int, groups: int, ranks: FloatArray, errors: FloatArray) -> FloatArray:
    """Return the columns of an option table, [7, ranks], for one scheme and group count."""
    params, macs = layer.unit_cost(scheme, groups)
    same = np.ones(len(ranks))
    relative = ranks / layer.full_rank(scheme, groups)
    return np.stack(
        [scheme * same, groups * same, ranks, relative, params * ranks, np.rint(macs * ranks), errors]
    )


def option_table(layer: Layer, found: list[FloatArray]) -> OptionTable:
    """Join the columns behind the dense option, without what is larger than dense."""
    dense = np.array([[0.0], [0.0], [0.0], [np.inf], [layer.params], [layer.macs], [0.0]])
    rows = np.concatenate([dense, *found], axis=1)
    smaller = (rows[4] < layer.params) & (rows[5] <= layer.macs)
    smaller[0] = True
    scheme, groups, rank, relative, params, macs, error = rows[:, smaller]
    whole = [column.astype(np.int64) for column in (scheme, groups, rank, params, macs)]
    sizes = whole[3] * layer.itemsize
    return OptionTable(whole[0], whole[1], whole[2], relative, whole[3], whole[4], error, bytes=sizes)


class Factors(NamedTuple):
    """A layer's weight as two."""

    U: Tensor  # float64, decoder weight
    V: Tensor  # float64, encoder weight
    error: float  # relative Frobenius norm of what was dropped, from the singular values kept


def svd_factors(
    layers: list[Layer],
    weights: list[Tensor],
    configs: list[LowRank],
) -> list[Factors]:
    """Compute the factors of each layer, the roots of the singular values folded into both sides."""
    blocks: list[list[Tensor]] = []
    for layer, weight, config in zip(layers, weights, configs, strict=True):
        folded = fold(weight.detach(), layer, config.scheme)
        blocks.append([block for existing in folded for block in existing.chunk(config.groups, 1)])
    ranks = [config.rank for config, parts in zip(configs, blocks, strict=True) for _ in parts]
    solved = iter(ops.truncated_svd([block for parts in blocks for block in parts], ranks))
    found = []
    for layer, weight, config, parts in zip(layers, weights, configs, blocks, strict=True):
        left, values, right = map(torch.stack, zip(*(next(solved) for _ in parts), strict=True))
        root = values.sqrt()
        shape = (layer.conv_groups, config.groups)
        U, V = unfold_factors(
            (left * root[:, None, :]).unflatten(0, shape),
            (root[:, :, None] * right).unflatten(0, shape),
            layer,
            config,
        )
        energy = float(weight.detach().double().square().sum())
        dropped = max(0.0, 1.0 - float(values.square().sum()) / energy) if energy else 0.0
        found.append(Factors(U, V, dropped**0.5))
    return found
