"""Linear Neural Reconstruction: which neurons go, and what the weights behind them become."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrcompress import allocate, calibrate, removal, rewrite
from lrcompress.factorize import columns
from lrcompress.subject import surveyed
from lrcompress.types import (
    Budget,
    Call,
    CompressionError,
    Coupling,
    LayerPlan,
    Plan,
    PlanError,
    Reconstruction,
    Removal,
    Slot,
    Wiring,
)

_AT_ONCE = 500  # samples of the example inputs in one forward

Moments = Mapping[str, calibrate.Moments]


def in_parts(inputs: Any) -> list[Any]:
    """Cut example inputs into batches, when they are one tensor."""
    return list(inputs.split(_AT_ONCE)) if isinstance(inputs, Tensor) else [inputs]


def planned(
    model: nn.Module,
    budget: Budget,
    recipe: Reconstruction,
    example_inputs: Any,
    ignore: tuple[str, ...],
) -> Plan:
    """Choose the channels of every coupling that stay; the layers of the narrower network are then dense."""
    if example_inputs is None:
        raise PlanError(
            "removing neurons needs example_inputs, unlabelled: the samples that it calibrates on"
        )
    if budget.cost not in ("params", "macs"):
        raise PlanError(f"removing neurons takes a budget in params or macs, got {budget}")
    batches = in_parts(example_inputs)
    before = surveyed(model, ignore, batches[0])
    before.layers()  # refuses weights that are not finite
    wiring = removal.trace(model, batches[0], ignore)
    total = before.total(budget.cost)
    found = choose(model, wiring, recipe, batches, before.calls, budget.cost, total, budget.limit(total))
    small = removal.removed(model, found, no_means(model, found))
    after = surveyed(small, ignore, batches[0])
    held = [
        rewrite.left_out(name, model.get_submodule(name), f"its outputs all stay: {held.reason}")
        for held in wiring.held
        for name in held.producers
    ]
    return Plan(
        str(recipe),
        budget,
        before.total("params"),
        before.macs,
        tuple(LayerPlan(layer, layer.dense) for layer in after.layers()),
        tuple(after.left_alone + held),
        removals=tuple(found),
        saved_params=before.total("params") - after.total("params"),
        saved_macs=before.macs - after.macs,
        sequential=recipe.sequential,
    )


def choose(
    model: nn.Module,
    wiring: Wiring,
    recipe: Reconstruction,
    batches: Sequence[Any],
    calls: Mapping[str, tuple[Call, ...]],
    cost: str,
    total: int,  # cost of the whole model
    limit: int,  # of it, when the channels are gone
) -> list[Removal]:
    """Choose how many channels each coupling keeps, and which.

    The counts come from every coupling's own path; the chaining then chooses the channels.

    Raises:
        BudgetError: not even the narrowest network costs as little.
    """
    couplings = wiring.couplings
    names = _consumers(couplings)
    moments = calibrate.cross_moments(model, model, names, batches)
    paths = [
        columns.supports(_problem(model, coupling, moments), recipe.penalties, recipe.smallest)
        for coupling in couplings
    ]
    sizes = _sizes(model, couplings, calls, cost)
    fixed = total - float(sizes.cost(np.zeros(len(couplings))))
    if cost == "params":  # the sizes count the biases that refits make, the model does not have them yet
        fixed += sum(layer.weight.shape[0] for name in names if (layer := _layer(model, name)).bias is None)
    sizes = dataclasses.replace(sizes, fixed=fixed)
    counts = [np.array([len(support.kept) for support in path]) for path in paths]
    errors = [np.array([support.error for support in path]) for path in paths]
    rows = allocate.shrink(sizes, counts, errors, limit)
    chosen = {
        coupling: path[row]
        for coupling, path, row in zip(couplings, paths, rows, strict=True)
        if len(path[row].kept) < coupling.channels
    }
    if recipe.chaining.startswith("bottom-up"):
        chosen = _bottom_up(model, chosen, moments, recipe)
    elif recipe.chaining == "top-down":
        chosen = _top_down(model, chosen, batches, recipe)
    return [
        Removal(coupling, support.kept, support.error, 0.0 if recipe.debias else support.penalty)
        for coupling, support in chosen.items()
    ]


def _consumers(couplings: Iterable[Coupling]) -> list[str]:
    """Return the layers that read channels of the couplings."""
    return list(dict.fromkeys(slot.name for coupling in couplings for slot in coupling.consumers))


def _bottom_up(
    model: nn.Module, chosen: Mapping[Coupling, columns.Support], moments: Moments, recipe: Reconstruction
) -> dict[Coupling, columns.Support]:
    """Choose from the last coupling back: each has to give only the outputs that are kept."""
    rows: dict[str, list[int]] = {}
    found: dict[Coupling, columns.Support] = {}
    for coupling in reversed(list(chosen)):
        problem = _problem(model, coupling, moments, rows)
        count = len(chosen[coupling].kept)
        found[coupling] = columns.support_of(problem, count, recipe.penalties, recipe.smallest)
        rows |= {name: list(found[coupling].kept) for name in coupling.producers}
    return {coupling: found[coupling] for coupling in chosen}


def _top_down(
    model: nn.Module,
    chosen: Mapping[Coupling, columns.Support],
    batches: Sequence[Any],
    recipe: Reconstruction,
) -> dict[Coupling, columns.Support]:
    """Choose from the first coupling on, each on what the reduced layers before it give."""
    wide, found = copy.deepcopy(model), dict(chosen)
    for coupling in chosen:
        names = _consumers([coupling])
        moments = calibrate.cross_moments(model, wide, names, batches)
        count = len(chosen[coupling].kept)
        problem = _problem(wide, coupling, moments)
        found[coupling] = columns.support_of(problem, count, recipe.penalties, recipe.smallest)
        for name in names:
            _refit(wide, name, [Removal(coupling, found[coupling].kept)], moments[name])
    return found


def reconstructed(
    model: nn.Module,
    removals: Sequence[Removal],
    batches: Iterable[Any],  # iterated once, or once for each layer when sequential
    sequential: bool,
) -> nn.Module:
    """Copy the model with the columns that go at zero, and the others fitted to give what these gave.

    Weight and bias of each consumer become the least-squares fit to its original outputs, or, where a removal
    names a penalty, the group lasso's. ``sequential`` fits each to the inputs that it will see.

    Raises:
        CompressionError: there are no batches, or a consumer does not run on them.
    """
    wide = copy.deepcopy(model)
    held = list(batches)
    if not held:
        raise CompressionError("batches must hold at least one batch, got none")
    names = calibrate.in_order_of_calls(model, _consumers(r.coupling for r in removals), held)
    moments = {} if sequential else calibrate.cross_moments(model, model, names, held)
    for name in names:
        own = [r for r in removals if any(slot.name == name for slot in r.coupling.consumers)]
        here = calibrate.cross_moments(model, wide, [name], held)[name] if sequential else moments[name]
        if all(r.penalty == 0 for r in own):
            _refit(wide, name, own, here)
        else:
            for removal in own:
                _shrink(wide, name, removal, {name: here})
    return wide


def no_means(model: nn.Module, removals: Sequence[Removal]) -> dict[str, Tensor]:
    """Return zero means of every consumer's inputs: for the shape of what a refit makes, biases included."""
    names = _consumers(removal.coupling for removal in removals)
    return {name: torch.zeros(_layer(model, name).weight.shape[1]) for name in names}


def _refit(model: nn.Module, name: str, removals: Sequence[Removal], moments: calibrate.Moments) -> None:
    """Give a layer the least-squares weight on the columns that stay, in place."""
    layer = _layer(model, name)
    area = layer.weight[0, 0].numel()
    gone = {
        column
        for removal in removals
        for slot in removal.coupling.consumers
        if slot.name == name
        for column in removal.gone(slot)
    }
    kept = torch.tensor([j for j in range(moments.xx.shape[0]) if j // area not in gone])
    xx, yx, _ = moments.centred
    weight = torch.zeros_like(yx)
    weight[:, kept] = columns.fitted_columns(xx[kept][:, kept], yx[:, kept])
    _set(layer, weight, moments)


def _shrink(model: nn.Module, name: str, removal: Removal, moments: Moments) -> None:
    """Give a layer the group lasso's weight on the columns of one coupling, in place."""
    layer = _layer(model, name)
    slots = tuple(slot for slot in removal.coupling.consumers if slot.name == name)
    coupling = dataclasses.replace(removal.coupling, consumers=slots)
    problem = _problem(model, coupling, moments)
    own, _ = _columns(coupling, name, layer)
    scale = float(moments[name].centred[2].sum()) ** 0.5
    weight = layer.weight.detach().double().cpu().flatten(1).clone()
    weight[:, own] = scale * columns.shrunk_columns(problem, removal.kept, removal.penalty)
    _set(layer, weight, moments[name])


def _set(layer: rewrite.Dense, weight: Tensor, moments: calibrate.Moments) -> None:
    """Put a weight in its place, and the bias with which the mean output is right; both keep their types."""
    bias = moments.y - weight @ moments.x
    like = layer.weight if layer.bias is None else layer.bias
    layer.weight.data = weight.reshape(layer.weight.shape).to(layer.weight)
    layer.bias = nn.Parameter(bias.to(like), requires_grad=like.requires_grad)


def _layer(model: nn.Module, name: str) -> rewrite.Dense:
    layer = model.get_submodule(name)
    if not isinstance(layer, rewrite.Dense):
        raise PlanError(f"layer {name!r} must be a Linear or a convolution, got {type(layer).__name__}")
    return layer


def _columns(coupling: Coupling, name: str, layer: rewrite.Dense) -> tuple[Tensor, Tensor]:
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


def _problem(
    model: nn.Module,
    coupling: Coupling,
    moments: Moments,
    rows: Mapping[str, list[int]]
    | None = None,  # outputs that are still needed, of layers where some are not
) -> columns.ColumnProblem:
    """Set up the group lasso of a coupling: what its columns have to give, the other columns as they are."""
    consumers = []
    for name in _consumers([coupling]):
        layer = _layer(model, name)
        own, channel = _columns(coupling, name, layer)
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


def _sizes(
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
        params = list(module.parameters(recurse=False))
        per_channel = float(len(params)) if cost == "params" else 0.0
        return float(params[0].shape[0] if params else 0), 0.0, 0.0, per_channel
    layer = rewrite.describe(name, module, calls)
    area, positions = layer.params // (layer.weight_shape[0] * layer.weight_shape[1]), layer.positions(0)[1]
    unit = float(area) if cost == "params" else area * positions
    extra = float(module.bias is not None or adds_bias) if cost == "params" else 0.0
    if layer.conv_groups > 1:  # depthwise: rows are input channels
        more = layer.out_channels // layer.conv_groups
        return float(layer.conv_groups), 1.0, unit * more, extra * more
    return float(layer.weight_shape[0]), float(layer.weight_shape[1]), unit, extra
