"""Activation-aware local step: options whose error is what the layer's outputs lose on real inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lrcompress import ops
from lrcompress.factorize.encoders import expanded, group_encoders, patch_order
from lrcompress.factorize.fold import fold
from lrcompress.factorize.svd import option_rows, option_table
from lrcompress.types import Layer, PlanError
from lrcompress.types.options import FloatArray, OptionTable
from lrcompress.types.statistics import LayerStatistics

OutputError = Literal["branch", "relative", "absolute", "energy", "fisher"]


@dataclass(frozen=True)
class ActivationAware:
    """Local step: fold scheme x group count x rank, by the error of the layer's outputs.

    With W the weight, S the covariance of its inputs and E the encoders, best for each group by itself, the
    error is that of the best decoder on all inputs together:
    ``e = tr(W S W^T) - tr(W S E^T (E S E^T)^-1 E S W^T)``, the mean squared error of the outputs once their
    mean is right. ``refit=False`` charges each group for itself, as if the groups' inputs were uncorrelated
    and the decoder stayed a truncated SVD: sum of the dropped eigenvalues.

    - ``relative``: e / tr(W S W^T); ``absolute``: e.
    - ``branch``: relative, times the share of the variance that the layer's residual branch has in the sum
      that ends it: 1 for layers outside of branches.
    - ``energy``: -log(1 - relative): the sum over layers is minus the log of the product of energies kept.
    - ``fisher``: outputs weighted by the gradient statistics G, tr(G ...): the second-order loss of K-FAC.

    ``centred=False`` uses E[x x^T] in the place of S. Up to ``ranks`` ranks of each group count are
    evaluated. Options larger than the dense layer are left out. Inputs without variance cost nothing.

    Source: Zhang et al. 2015 (one group, energy); Robin and Jain; Martens and Grosse 2015 (fisher); the
    branches' shares are ours.
    """

    needs_statistics: ClassVar[bool] = True

    error: OutputError = "branch"
    schemes: tuple[int, ...] = (0,)
    groups: tuple[int, ...] | None = None  # None: every divisor of the layer's input channels
    refit: bool = True
    centred: bool = True
    ranks: int = 24

    @property
    def needs_gradients(self) -> bool:
        """Whether the statistics must hold gradients too."""
        return self.error == "fisher"

    def __call__(
        self,
        layers: tuple[Layer, ...],
        weights: tuple[Tensor, ...],  # the layers' weights
        statistics: Mapping[str, LayerStatistics],
    ) -> list[OptionTable]:
        """Return the options of each layer, row 0 the dense one.

        Without statistics a layer's inputs count as uncorrelated, of mean zero and variance one.

        Raises:
            PlanError: ``fisher`` without gradient statistics; ``fisher`` or ``absolute`` without any.
        """
        return [
            self._table(layer, weight.detach().double(), statistics.get(layer.name) or self._unknown(layer))
            for layer, weight in zip(layers, weights, strict=True)
        ]

    def _unknown(self, layer: Layer) -> LayerStatistics:
        if self.error in ("fisher", "absolute"):
            raise PlanError(
                f"layer {layer.name!r} has no statistics: error {self.error!r} has no scale for it"
            )
        side = layer.params // layer.out_channels
        eye = torch.eye(side, dtype=torch.float64).expand(layer.conv_groups, -1, -1)
        return LayerStatistics(eye, torch.zeros(layer.conv_groups, side, dtype=torch.float64), samples=1)

    def _table(self, layer: Layer, weight: Tensor, known: LayerStatistics) -> OptionTable:
        moments = self._moments(known).to(weight.device)
        weight = _weighted(weight, self._metric(layer, known))
        W = weight.flatten(1).unflatten(0, (layer.conv_groups, -1))
        found: list[FloatArray] = []
        for scheme in (s for s in layer.schemes if s in self.schemes):
            rows = fold(weight, layer, scheme)
            for k in self._group_counts(layer):
                affordable = (layer.params - 1) // layer.unit_cost(scheme, k)[0]
                ranks = _spread(min(layer.full_rank(scheme, k), affordable), self.ranks)
                errors = np.zeros(len(ranks))
                for folded, flat, moment in zip(rows, W, moments, strict=True):
                    errors += self._losses(folded, flat, moment, patch_order(layer, scheme), k, ranks)
                found.append(option_rows(layer, scheme, k, ranks, errors))
        total = float(((W @ moments) * W).sum())
        return option_table(layer, [self._scaled(rows, total, known.share) for rows in found])

    def _moments(self, known: LayerStatistics) -> Tensor:  # [conv_groups, d, d]
        """Return the inputs' moments; what rounding took from their eigenvalues is added."""
        moments = known.covariance if self.centred else known.autocorrelation
        powers = known.autocorrelation.diagonal(dim1=1, dim2=2)
        made = [ops.definite(S, power=power).moment for S, power in zip(moments, powers, strict=True)]
        return torch.stack(made)

    def _metric(
        self, layer: Layer, known: LayerStatistics
    ) -> Tensor | None:  # [conv_groups, out, out], G^(1/2)
        if self.error != "fisher":
            return None
        if known.gradient is None:
            raise PlanError(f"layer {layer.name!r}: error 'fisher' needs statistics with gradients=True")
        each = known.gradient.split(layer.out_channels // layer.conv_groups)
        blocks = [rows.split(len(rows), 1)[i] for i, rows in enumerate(each)]
        values, vectors = torch.linalg.eigh(torch.stack(blocks))
        root: Tensor = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
        return root

    def _group_counts(self, layer: Layer) -> list[int]:
        channels = layer.group_channels
        wanted = range(1, channels + 1) if self.groups is None else self.groups
        return [k for k in wanted if channels % k == 0]

    def _losses(
        self,
        folded: Tensor,  # [rows, columns], of one existing group
        weight: Tensor,  # [out, d], the same weight
        moment: Tensor,  # [d, d]
        order: Tensor,  # from `patch_order`
        groups: int,
        ranks: FloatArray,
    ) -> FloatArray:
        """Return what each rank loses of tr(W S W^T)."""
        order = order.to(weight.device)
        inputs = torch.stack([moment[columns][:, columns] for columns in order]).sum(0)
        encoders = group_encoders(folded, inputs, groups)
        wanted = weight @ moment
        total = float((wanted * weight).sum())
        if not self.refit:
            tails: FloatArray = _tails(folded, inputs, encoders, groups)[ranks - 1]
            return tails
        losses = []
        for rank in ranks:
            E = expanded(encoders[:, : int(rank)], order)
            codes, crossed = E @ moment @ E.mT, wanted @ E.mT
            losses.append(max(0.0, total - ops.explained(codes, crossed)))
        return np.array(losses)

    def _scaled(self, rows: FloatArray, total: float, branch: float) -> FloatArray:
        """Turn losses into the error asked for."""
        scale = total if total > 0 else 1.0
        share = np.clip(rows[-1] / scale, 0.0, 1.0)
        if self.error == "relative":
            rows[-1] = share
        elif self.error == "branch":
            rows[-1] = share * branch
        elif self.error == "energy":
            rows[-1] = -np.log(np.maximum(1.0 - share, 1e-300))
        return rows


def _weighted(weight: Tensor, metric: Tensor | None) -> Tensor:
    """Apply G^(1/2) to the outputs of each existing group."""
    if metric is None:
        return weight
    rows = weight.flatten(1).unflatten(0, (len(metric), -1))
    return torch.matmul(metric.to(weight), rows).view_as(weight)


def _spread(full: int, count: int) -> FloatArray:
    """Return all ranks, or about ``count`` of them."""
    if full < 1:
        return np.zeros(0, dtype=np.int64)
    return np.unique(np.linspace(1, full, min(full, count)).round().astype(np.int64))


def _tails(folded: Tensor, inputs: Tensor, encoders: Tensor, groups: int) -> FloatArray:  # [full rank]
    """Return the sum over groups of what each rank drops when every group is judged by itself."""
    width = folded.shape[1] // groups
    lost = np.zeros(encoders.shape[1])
    for i, encoder in enumerate(encoders):
        own = slice(i * width, (i + 1) * width)
        S, M = inputs[own, own], folded[:, own]
        codes, crossed = encoder @ S @ encoder.mT, M @ S @ encoder.mT
        variance = codes.diagonal()  # the encoders' codes are uncorrelated
        gained = torch.where(variance > 0, crossed.square().sum(0) / variance.clamp(min=1e-300), 0.0)
        lost += float((M @ S * M).sum()) - np.cumsum(gained.cpu().numpy())
    return np.maximum(lost, 0.0)
