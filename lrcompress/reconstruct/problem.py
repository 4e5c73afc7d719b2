"""The group lasso of a coupling, set up from what is known of the layers that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress import calibrate, rewrite
from lrcompress.factorize import columns
from lrcompress.types import Coupling, PlanError

Moments = Mapping[str, calibrate.Moments]
Data = calibrate.Statistics | Sequence[Any]  # moments of the original network, or batches to run


def moments_of(model: nn.Module, names: Sequence[str], data: Data) -> Moments:
    """Return the moments of layers' inputs and outputs in the original network.

    Raises:
        CompressionError: there are no batches, or a layer does not run on them.
        PlanError: a layer has no statistics.
    """
    if not isinstance(data, calibrate.Statistics):
        return calibrate.cross_moments(model, model, names, data)
    found = {}
    for name in names:
        layer = layer_of(model, name)
        if name not in data.layers:
            raise PlanError(f"the statistics must hold layer {name!r}, got {sorted(data.layers)}")
        (found[name],) = calibrate.own_moments(layer, data.layers[name])
    return found


def consumers_of(couplings: Iterable[Coupling]) -> list[str]:
    """Return the layers that read channels of the couplings."""
    return list(dict.fromkeys(slot.name for coupling in couplings for slot in coupling.consumers))


def layer_of(model: nn.Module, name: str) -> rewrite.Dense:
    """Return a layer that has a weight matrix."""
    layer = model.get_submodule(name)
    if not isinstance(layer, rewrite.Dense):
        raise PlanError(f"layer {name!r} must be a Linear or a convolution, got {type(layer).__name__}")
    return layer


def columns_of(coupling: Coupling, name: str, layer: rewrite.Dense) -> tuple[Tensor, Tensor]:
    """Return a coupling's columns of a layer's unfolded weight, and the channel of each."""
    area = layer.weight[0, 0].numel()
    owned = [
        (column * area + k, channel)
        for slot in coupling.consumers
        if slot.name == name
        for channel in range(coupling.channels)
        for column in range(slot.offset + channel * slot.width, slot.offset + (channel + 1) * slot.width)
        for k in range(area)
    ]
    found, channels = torch.tensor(owned).T
    return found, channels


def problem_of(
    model: nn.Module,
    coupling: Coupling,
    moments: Moments,
    rows: Mapping[str, list[int]]
    | None = None,  # outputs that are still needed, of layers where some are not
) -> columns.ColumnProblem:
    """Set up the group lasso of a coupling: what its columns have to give, the other columns as they are."""
    consumers = []
    for name in consumers_of([coupling]):
        layer = layer_of(model, name)
        own, channel = columns_of(coupling, name, layer)
        xx, yx, yy = moments[name].centred
        weight = layer.weight.detach().double().cpu().flatten(1)
        needed = torch.tensor((rows or {}).get(name, range(len(weight))))
        yx, yy, weight = yx[needed], yy[needed], weight[needed]
        scale = float(yy.sum())
        other = torch.ones(len(xx), dtype=torch.bool)
        other[own] = False
        if other.any():
            given, crossed = weight[:, other], xx[other]
            yy = yy - 2 * (given * yx[:, other]).sum(1) + (given @ crossed[:, other] * given).sum(1)
            yx = yx - given @ crossed
        consumers.append(columns.Consumer(xx[own][:, own], yx[:, own], float(yy.sum()), scale, channel))
    return columns.problem_of(consumers, coupling.channels)
