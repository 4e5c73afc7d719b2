"""Factored layers to ordinary ones that compute the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.nn import LayersInRow, LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from lrcompress.rewrite.layers import Dense, Factored, check_factored
from lrcompress.rewrite.swap import replaced

_PLAIN: dict[type[nn.Module], type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    LowRankConv1d: nn.Conv1d,
    LowRankConv2d: nn.Conv2d,
    LowRankConv3d: nn.Conv3d,
}
_GEOMETRY = ("stride", "padding", "dilation", "padding_mode")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def merge(
    model: nn.Module,  # with factored layers; untouched
    layers: Iterable[str] | None = None,  # names of factored layers; None: all of them
) -> nn.Module:
    """Copy the model with factored layers multiplied out into ordinary dense ones: the same function.

    For exporters, for another round of compression, or where dense runs faster.

    Raises:
        PlanError: a name that is not that of a factored layer.
    """
    return replaced(model, {name: multiplied_out(module) for name, module in _chosen(model, layers).items()})


def unfuse(
    model: nn.Module,  # with factored layers; untouched
) -> nn.Module:
    """Copy the model with every factored layer as an ``nn.Sequential`` of ordinary layers: the same function.

    That has the ``weight``, ``bias`` and sizes of the dense layer, for code around it that reads them.

    For exporters and runtimes that know neither this package nor its operators. No ordinary layer applies a
    grouped matrix to the last axis of any input, so the encoder of a Linear with groups becomes a
    block-diagonal ``nn.Linear``, zeros included; where that makes it no smaller than the dense layer, the
    layer is multiplied out instead.
    """
    return replaced(model, {name: _as_two(module) for name, module in _chosen(model, None).items()})


def _chosen(model: nn.Module, layers: Iterable[str] | None) -> dict[str, Factored]:
    """Return the factored layers of the given names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Factored)}
    if layers is None:
        return found
    layers = tuple(layers)
    check_factored(model, layers)
    return {name: found[name] for name in layers}


def multiplied_out(module: Factored) -> Dense | nn.Sequential:
    """Return the dense layer that a factored one stands for, and behind it the activation, if it has one."""
    weight = module.multiplied_out().detach()
    made = _made(module) | {"bias": module.bias is not None}
    dense: Dense
    if isinstance(module, LowRankLinear):
        dense = nn.Linear(module.in_features, module.out_features, **made)
    else:
        kept = ("in_channels", "out_channels", "kernel_size", *_GEOMETRY)
        made |= {name: getattr(module, name) for name in kept} | {"groups": module.conv_groups}
        dense = _PLAIN[type(module)](**made)
    _fill(dense, weight, module)
    if module.activation == "none":
        return dense
    return LayersInRow(dense, dense, _ACTIVATIONS[module.activation]()).train(module.training)


def _as_two(module: Factored) -> nn.Module:
    """Return encoder, decoder and activation in a row."""
    parts: tuple[Dense, Dense]
    stands_for: Factored
    made = _made(module)
    if isinstance(module, LowRankLinear):
        inner, outer, inside = module.groups * module.rank, module.out_features, module.in_features
        if module.groups > 1 and inner * (inside + outer) >= inside * outer:
            return multiplied_out(module)
        parts = (
            nn.Linear(inside, inner, bias=False, **made),
            nn.Linear(inner, outer, module.bias is not None, **made),
        )
        encoder = torch.block_diag(*module.V.detach().unflatten(0, (module.groups, module.rank)))
        stands_for = LowRankLinear(inside, module.out_features, inner, bias=False, **made)
    else:
        parts, encoder = _two_convolutions(module), module.V.detach()
        kept = (
            "in_channels",
            "out_channels",
            "kernel_size",
            *_GEOMETRY,
            "rank",
            "groups",
            "scheme",
            "conv_groups",
        )
        made |= {name: getattr(module, name) for name in kept}
        stands_for = type(module)(bias=False, **made)
    _fill(parts[0], encoder, module, bias=False)
    _fill(parts[1], module.U.detach(), module)
    activation = [] if module.activation == "none" else [_ACTIVATIONS[module.activation]()]
    return LayersInRow(stands_for, *parts, *activation).train(module.training)


def _two_convolutions(module: LowRankConv1d | LowRankConv2d | LowRankConv3d) -> tuple[Dense, Dense]:
    """Return the encoder and the decoder, still without their values."""
    inner = module.conv_groups * module.groups * module.rank
    sizes = ((module.in_channels, inner), (inner, module.out_channels))
    groups = (module.conv_groups * module.groups, module.conv_groups)
    made = _made(module) | {"padding_mode": module.padding_mode}
    parts = []
    for part, (before, after), count in zip((module.encoder, module.decoder), sizes, groups, strict=True):
        # Only padding="same" is uneven, and splits its excess as nn.ConvNd does.
        padding = "same" if module.padding == "same" else tuple(side for side, _ in part.padding)
        geometry: dict[str, Any] = {"kernel_size": part.kernel, "padding": padding, "stride": part.stride}
        geometry |= {"dilation": part.dilation, "groups": count}
        bias = part is module.decoder and module.bias is not None
        parts.append(_PLAIN[type(module)](before, after, bias=bias, **geometry, **made))
    return parts[0], parts[1]


def _made(module: Factored) -> dict[str, Any]:
    return {"device": "meta", "dtype": module.U.dtype}  # their values come with `_fill`


def _fill(layer: Dense, weight: Tensor, module: Factored, bias: bool = True) -> None:
    """Give an ordinary layer its values and the mode of the factored one."""
    layer.weight = nn.Parameter(weight.clone(), requires_grad=module.U.requires_grad)
    if bias and module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
    layer.train(module.training)
