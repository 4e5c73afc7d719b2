"""Low rank on top of removed neurons: another step's options, their errors counted from the wider network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from lrcompress.factorize.activation import ActivationAware
from lrcompress.types import Layer
from lrcompress.types.options import OptionTable
from lrcompress.types.statistics import LayerStatistics


class Shares(NamedTuple):
    """Of the variance of the outputs that a layer had, those that stay: what the fit lost, what it gives."""

    lost: float = 0.0
    given: float = 1.0


@dataclass(frozen=True)
class OnTop:
    """Local step: a layer with weight P, fitted to outputs y by least squares, replaced by low rank Q.

    ``E|y - Q x|^2 = E|y - P x|^2 + E|P x - Q x|^2``, because what least squares leaves is orthogonal to x:
    the error is ``lost + given e`` with e the step's share of the variance of P x; where the step's error is
    weighted by residual branches, so is ``lost``.

    Source: Pythagoras.
    """

    needs_statistics: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False

    step: ActivationAware
    shares: Mapping[str, Shares]  # of fitted layers
    same: Mapping[str, OptionTable]  # the step's, of layers that no removal touched

    def __call__(
        self,
        layers: tuple[Layer, ...],
        weights: tuple[Any, ...],  # the layers' weight tensors
        statistics: Mapping[str, LayerStatistics],
    ) -> list[OptionTable]:
        """Return one table a layer."""
        shares = [self.shares.get(layer.name, Shares()) for layer in layers]
        known = [statistics.get(layer.name) for layer in layers]
        branches = [k.share if k is not None and self.step.error == "branch" else 1.0 for k in known]
        other = [i for i, layer in enumerate(layers) if layer.name not in self.same]
        found = self.step(tuple(layers[i] for i in other), tuple(weights[i] for i in other), statistics)
        tables = {**self.same, **{layers[i].name: table for i, table in zip(other, found, strict=True)}}
        return [
            replace(tables[layer.name], error=branch * share.lost + share.given * tables[layer.name].error)
            for layer, share, branch in zip(layers, shares, branches, strict=True)
        ]
