"""What the weights behind removed channels become."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrcompress import calibrate, removal, rewrite
from lrcompress.factorize import columns
from lrcompress.reconstruct.problem import (
    Data,
    Moments,
    columns_of,
    consumers_of,
    layer_of,
    moments_of,
    problem_of,
)
from lrcompress.types import CompressionError, Removal


def reduced(
    model: nn.Module,
    removals: Sequence[Removal],
    data: Data,
    sequential: bool,
) -> nn.Module:
    """Copy the model without the channels that go, the weights behind them fitted to the data."""
    return removal.removed(reconstructed(model, removals, data, sequential), removals)


def reconstructed(
    model: nn.Module,
    removals: Sequence[Removal],
    data: Data,
    sequential: bool,  # needs batches: with statistics each layer is fitted by itself
) -> nn.Module:
    """Copy the model with the columns that go at zero, and the others fitted to give what these gave.

    Weight and bias of each consumer become the least-squares fit to its original outputs, or, where a removal
    names a penalty, the group lasso's. ``sequential`` fits each to the inputs that it will see.

    Raises:
        CompressionError: there are no batches, or a consumer does not run on them.
    """
    wide = rewrite.copied(model)
    names = consumers_of(r.coupling for r in removals)
    fitted = {name: [r for r in removals if name in consumers_of([r.coupling])] for name in names}
    if isinstance(data, calibrate.Statistics) or not sequential:
        for name, moments in moments_of(model, names, data).items():
            _fit(wide, name, fitted[name], moments)
        return wide
    if not data:
        raise CompressionError("batches must hold at least one batch, got none")
    for name in calibrate.in_order_of_calls(model, names, data):
        _fit(wide, name, fitted[name], calibrate.cross_moments(model, wide, [name], data)[name])
    return wide


def _fit(model: nn.Module, name: str, removals: Sequence[Removal], moments: calibrate.Moments) -> None:
    """Give a layer its weight on the columns that stay, in place."""
    if all(item.penalty == 0 for item in removals):
        refit(model, name, removals, moments)
        return
    for item in removals:
        _shrink(model, name, item, {name: moments})


def no_means(model: nn.Module, removals: Sequence[Removal]) -> dict[str, Tensor]:
    """Return zero means of every consumer's inputs: for the shape of what a refit makes, biases included."""
    names = consumers_of(item.coupling for item in removals)
    return {name: torch.zeros(layer_of(model, name).weight.shape[1]) for name in names}


def refit(model: nn.Module, name: str, removals: Sequence[Removal], moments: calibrate.Moments) -> None:
    """Give a layer the least-squares weight on the columns that stay, in place.

    They make up for what is missing and for the columns that go; where nothing is, they stay as they are.
    """
    layer = layer_of(model, name)
    area = layer.weight[0, 0].numel()
    gone = {
        column
        for item in removals
        for slot in item.coupling.consumers
        if slot.name == name
        for column in item.gone(slot)
    }
    goes = torch.tensor([j // area in gone for j in range(len(moments.xx))])
    weight = columns.refitted(moments.weight, goes, moments.covariance, moments.missing, moments.noise)
    _set(layer, weight, moments)


def _shrink(model: nn.Module, name: str, item: Removal, moments: Moments) -> None:
    """Give a layer the group lasso's weight on the columns of one coupling, in place."""
    layer = layer_of(model, name)
    slots = tuple(slot for slot in item.coupling.consumers if slot.name == name)
    coupling = dataclasses.replace(item.coupling, consumers=slots)
    problem = problem_of(model, coupling, moments)
    own, _ = columns_of(coupling, name, layer)
    scale = float(moments[name].centred[2].sum()) ** 0.5
    weight = layer.weight.detach().double().cpu().flatten(1).clone()
    weight[:, own] = scale * columns.shrunk_columns(problem, item.kept, item.penalty)
    _set(layer, weight, moments[name])


def _set(layer: rewrite.Dense, weight: Tensor, moments: calibrate.Moments) -> None:
    """Put a weight in its place, and the bias with which the mean output is right; both keep their types."""
    bias = moments.bias_of(weight)
    like = layer.weight if layer.bias is None else layer.bias
    layer.weight.data = weight.reshape(layer.weight.shape).to(layer.weight)
    layer.bias = nn.Parameter(bias.to(like), requires_grad=like.requires_grad)
