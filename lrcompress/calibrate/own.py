"""What a layer's inputs tell of its own outputs."""

from __future__ import annotations

import torch
from torch import nn

from lrcompress.calibrate.cross import Layer, Moments
from lrcompress.types.statistics import LayerStatistics


def own_moments(layer: Layer, known: LayerStatistics) -> list[Moments]:  # of each channel group
    """Return the moments of a layer's inputs and of the outputs ``W x + b`` that it gives on them."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    split = (groups, -1)
    weights = layer.weight.detach().double().cpu().flatten(1).unflatten(0, split)
    bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().cpu()
    biases = bias.double().unflatten(0, split)
    found = []
    for W, b, R, x in zip(weights, biases, known.autocorrelation.cpu(), known.mean.cpu(), strict=True):
        given = W @ x
        yx = W @ R + b[:, None] * x
        yy = (W @ R * W).sum(1) + 2 * b * given + b.square()
        found.append(Moments(R, x, yx, given + b, yy))
    return found
