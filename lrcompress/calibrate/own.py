"""What a layer's inputs tell of its own outputs."""

from __future__ import annotations

import torch

from lrcompress.calibrate.cross import Layer, Moments, weight_and_bias
from lrcompress.types.statistics import LayerStatistics

_ROUNDING = 8  # units in the last place of what statistics are added up in


def own_moments(layer: Layer, known: LayerStatistics) -> list[Moments]:  # of each channel group
    """Return the moments of a layer's inputs, where the outputs ``W x + b`` that it gives are wanted."""
    eps = torch.finfo(torch.promote_types(layer.weight.dtype, torch.float32)).eps
    found = []
    for W, b, R, x in zip(
        *weight_and_bias(layer), known.autocorrelation.cpu(), known.mean.cpu(), strict=True
    ):
        nothing = torch.zeros_like(b)
        found.append(
            Moments(W, b, R, x, torch.zeros_like(W), nothing, nothing, rounding=max(_ROUNDING * eps, 1e-12))
        )
    return found
