"""What a network costs as a function of the channels that go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from lrcompress import allocate, rewrite
from lrcompress.reconstruct.problem import consumers_of, layer_of
from lrcompress.subject import Subject
from lrcompress.types import Call, Coupling, Slot


def sizes_of(subject: Subject, couplings: Sequence[Coupling], cost: str) -> allocate.Sizes:
    """Return the cost of the whole network, with the biases that refits make."""
    model = subject.model
    sizes = _touched(model, couplings, subject.calls, cost)
    fixed = subject.total(cost) - float(sizes.cost(np.zeros(len(couplings))))
    if cost == "params":  # the sizes count biases that the model does not have yet
        layers = [layer_of(model, name) for name in consumers_of(couplings)]
        fixed += sum(layer.weight.shape[0] for layer in layers if layer.bias is None)
    return replace(sizes, fixed=fixed)


def _touched(
    model: nn.Module, couplings: Sequence[Coupling], calls: Mapping[str, tuple[Call, ...]], cost: str
) -> allocate.Sizes:
    """Write the cost of every module that a coupling touches as a function of the channels that go."""
    touched: dict[str, dict[str, dict[int, int]]] = {}  # of each module and side: coupling -> loss a channel
    for j, coupling in enumerate(couplings):
        producers = tuple(Slot(name) for name in coupling.producers)
        for side, slots in (("rows", producers + coupling.followers), ("columns", coupling.consumers)):
            for slot in slots:
                losses = touched.setdefault(slot.name, {"rows": {}, "columns": {}})[side]
                losses[j] = losses.get(j, 0) + slot.width
    shape = (len(touched), len(couplings))
    row_loss, column_loss = np.zeros(shape), np.zeros(shape)
    terms = []
    for t, (name, sides) in enumerate(touched.items()):
        module = model.get_submodule(name)
        adds_bias = bool(sides["columns"])  # the refit makes one where there is none
        terms.append(_term(name, module, adds_bias, calls.get(name, ()), cost))
        for matrix, losses in ((row_loss, sides["rows"]), (column_loss, sides["columns"])):
            for j, loss in losses.items():
                matrix[t, j] = loss
    rows, reads, unit, extra = np.array(terms, dtype=np.float64).reshape(-1, 4).T
    return allocate.Sizes(rows, reads, row_loss, column_loss, unit, extra)


def _term(
    name: str, module: nn.Module, adds_bias: bool, calls: tuple[Call, ...], cost: str
) -> tuple[float, float, float, float]:
    """Return rows, columns, cost of each weight position and further cost of a row."""
    if not isinstance(module, rewrite.Dense):  # batch norm, PReLU: some parameters of each channel
        sizes = [p.numel() for p in module.parameters(recurse=False) if p.numel() > 1]
        per_channel = float(len(sizes)) if cost == "params" else 0.0
        return float(max(sizes, default=0)), 0.0, 0.0, per_channel
    layer = rewrite.describe(name, module, calls)
    area, positions = layer.params // (layer.weight_shape[0] * layer.weight_shape[1]), layer.positions(0)[1]
    unit = float(area) if cost == "params" else area * positions
    extra = float(module.bias is not None or adds_bias) if cost == "params" else 0.0
    if layer.conv_groups > 1:  # depthwise: rows are input channels
        more = layer.out_channels // layer.conv_groups
        return float(layer.conv_groups), 1.0, unit * more, extra * more
    return float(layer.weight_shape[0]), float(layer.weight_shape[1]), unit, extra
