"""What unlabelled data tells: statistics of a model's layers, and weights fitted to it."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress import calibrate, rewrite
from lrcompress.factorize import fitted_weight
from lrcompress.subject import opened
from lrcompress.types import CompressionError, Layer, LeftAlone, LowRank, Plan, PlanError, Refinement
from lrcompress.types.statistics import PRIOR_OF_BATCHES, PRIOR_OF_STATISTICS


def collect(
    model: nn.Module,
    batches: Iterable[Any],  # tensors, tuples of positional or mappings of keyword arguments; no labels
    *,
    transform: Callable[[Any], Any] | None = None,  # a batch -> the model's inputs, as (x, label) -> x
    forward: Callable[[nn.Module, Any], Any] | None = None,  # how to run the model on them
    ignore: str | Sequence[str] = (),  # shell patterns of layer names
    gradients: bool = False,  # also E[g g^T] of the layers' outputs, by a backward pass a batch
    loss: Callable[[Any], Tensor] | None = None,  # of the outputs; None: labels drawn from the model itself
    memory: int | None = None,  # bytes that the statistics may take at once; more passes over the batches
    into: calibrate.Statistics | None = None,  # earlier statistics of this model, to go on from
    progress: Callable[[int], None] | None = None,  # called with the batches done
) -> calibrate.Statistics:
    """Accumulate ``E[x x^T]`` and ``E[x]`` over the input patches of every compressible layer.

    The model runs in evaluation mode and is left as it was. Sums are float64. Modules that run several times,
    or that the model holds under several names, add up all their calls. Layers that no batch reached are
    listed in ``unreached``. Average over patches; ``gradients`` are sums over a batch's positions of the
    gradient of the batch's summed loss, averaged likewise.

    Raises:
        CompressionError: no batches, or an iterator where ``memory`` takes several passes.
        CollectionInterrupted: the batches or the model raised, or a layer's inputs hold nan or infinity; the
            batch and the layer are named, and ``error.statistics`` holds all batches before. Where ``memory``
            takes several passes, layers of earlier passes have seen all batches: start again instead.
        PlanError: ``into`` is of another model.
    """
    model, batches = _opened(rewrite.with_linears(model), batches, transform, forward, ignore, into)
    layers, _ = rewrite.survey(model, (ignore,) if isinstance(ignore, str) else ignore)
    return calibrate.collect_layers(
        model,
        layers,
        batches,
        transform=transform,
        forward=forward,
        gradients=gradients,
        loss=loss,
        memory=memory,
        into=into,
        progress=progress,
    )


def _opened(
    model: nn.Module,
    batches: Iterable[Any],
    transform: Callable[[Any], Any] | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    ignore: str | Sequence[str],
    into: calibrate.Statistics | None,
) -> tuple[nn.Module, Iterable[Any]]:
    """Open what the first batch shows, or earlier statistics know; return the batches, whole, too."""
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if into is not None:
        return rewrite.with_opened(model, named(None, into)), batches
    if not rewrite.own_forwards(model, ignored):
        return model, batches
    first, batches = _peeked(batches)
    if not first:
        return model, batches
    step = partial(calibrate.run_batch, model, transform, forward, first[0])
    with contextlib.suppress(
        Exception
    ):  # it comes again while statistics are collected, which names the batch
        model, _ = opened(model, ignored, step, first[0])
    return model, batches


class _Begun:
    """Batches that were begun to be read: the first pass goes on from there."""

    def __init__(self, batches: Iterable[Any], rest: Iterator[Any]) -> None:
        self._batches, self._rest = batches, [rest]

    def __iter__(self) -> Iterator[Any]:
        return self._rest.pop() if self._rest else iter(self._batches)


def _peeked(batches: Iterable[Any]) -> tuple[list[Any], Iterable[Any]]:
    """Return the first batch, if there is one, and all batches; what reading raises comes again there."""
    rest = iter(batches)
    try:
        first = list(itertools.islice(rest, 1))
    except Exception as error:
        first, begun = [], _raising(error)
    else:
        begun = itertools.chain(first, rest)
    return first, begun if rest is batches else _Begun(batches, begun)


def _raising(error: Exception) -> Iterator[Any]:
    yield from ()
    raise error


def named(plan: Plan | None, statistics: calibrate.Statistics | None = None) -> list[str]:
    """Name the layers that a plan and statistics know."""
    names = [] if plan is None else [entry.layer.name for entry in plan]
    return names if statistics is None else [*names, *statistics.layers, *statistics.unreached]


def check_statistics(model: nn.Module, statistics: calibrate.Statistics) -> None:
    """Refuse statistics of another model.

    Raises:
        PlanError: a layer is missing or has another weight.
    """
    modules = dict(model.named_modules())
    known = [*statistics.layers, *statistics.unreached]
    missing = [name for name in known if not isinstance(modules.get(name), rewrite.Dense)]
    if missing:
        raise PlanError(f"the statistics have a layer {missing[0]!r}, the model has none of that name")
    names = {name: module for name, module in modules.items() if name in set(known)}
    mark = calibrate.fingerprint({n: m for n, m in names.items() if isinstance(m, rewrite.Dense)})
    if mark != statistics.fingerprint:
        raise PlanError(f"statistics must be of this model, {mark!r}, got {statistics.fingerprint!r}")


def without_statistics(
    model: nn.Module,
    modules: dict[str, rewrite.Dense],  # what is to be planned; layers without statistics are taken out
    statistics: calibrate.Statistics | None,
    unreached: str,  # "dense" or "data-free"
) -> list[LeftAlone]:
    """Check the statistics, and return the layers that they say nothing of, if these are to stay dense.

    Warns of layers with fewer samples than their inputs have dimensions.

    Raises:
        PlanError: there are no statistics, or they are of another model.
    """
    if unreached not in ("dense", "data-free"):
        raise PlanError(f"unreached must be 'dense' or 'data-free', got {unreached!r}")
    if statistics is None:
        raise PlanError("this recipe looks at data: give statistics=lrc.collect(model, batches)")
    check_statistics(model, statistics)
    left = []
    for name in [name for name in modules if name not in statistics.layers and unreached == "dense"]:
        ran = name not in statistics.unreached
        reason = "the statistics were collected without it" if ran else "no calibration batch reached it"
        left.append(rewrite.left_out(name, modules.pop(name), reason))
    for name in (name for name in modules if name in statistics.layers):
        known = statistics.layers[name]
        side = known.mean.shape[1]
        if known.samples < side:
            warnings.warn(
                f"layer {name!r}: {known.samples} samples cannot span its {side} input dimensions; "
                "its errors are underestimated",
                stacklevel=4,
            )
    return left


def refined(
    model: nn.Module,
    plan: Plan,
    statistics: calibrate.Statistics | None,
    batches: Iterable[Any] | None,
    how: Refinement,
    progress: Callable[[int, int], None] | None = None,  # called with the layers done, and all of them
) -> nn.Module:
    """Copy the model; every weight that the plan factors becomes one of that structure, fitted to data.

    With batches, layer after layer in the order of their calls, on the inputs that the compressed layers
    before it give; else all layers on the statistics of the original network. Layers that the data does not
    reach keep their weights.

    Raises:
        CompressionError: there are no batches.
        PlanError: the statistics are of another model.
    """
    if how.prior is None:
        how = replace(how, prior=PRIOR_OF_STATISTICS if batches is None else PRIOR_OF_BATCHES)
    wide = rewrite.copied(model)
    configs = {e.layer.name: (e.layer, e.choice.config) for e in plan if e.choice.config is not None}
    if batches is not None:
        held = list(batches)
        if not held:
            raise CompressionError("batches must hold at least one batch, got none")
        modules = {name: module for name, module in model.named_modules() if name in configs}
        dense = {name: module for name, module in modules.items() if isinstance(module, rewrite.Dense)}
        behind = calibrate.what_follows(model, dense, lambda: calibrate.run(model, held[0]), held[0])
        names = calibrate.in_order_of_calls(model, list(configs), held)
        chosen = {name for name in names if name not in behind or behind[name].chosen}
        for done, name in enumerate(names, 1):
            moments = calibrate.grouped_moments(model, wide, [name], held, chosen).get(name)
            norm = behind[name].norm if name in behind else None
            if moments is not None:  # the compressed prefix may route everything past a layer
                last = None if norm is None else wide.get_submodule(norm)
                _fit(wide.get_submodule(name), *configs[name], moments, last, how)
            if progress:
                progress(done, len(names))
        return wide
    if statistics is None:
        return wide
    check_statistics(model, statistics)
    for name, (layer, config) in configs.items():
        if name in statistics.layers:
            module = wide.get_submodule(name)
            assert isinstance(module, rewrite.Dense)  # the plan fits the model
            moments = calibrate.own_moments(module, statistics.layers[name])
            _fit(module, layer, config, moments, None, how)
    return wide


def _fit(
    module: nn.Module,
    layer: Layer,
    config: LowRank,
    moments: list[calibrate.Moments],
    norm: nn.Module | None,  # the batch norm behind the layer
    how: Refinement,
) -> None:
    """Give a layer its fitted weight, and make its mean output right, in place."""
    if not isinstance(module, rewrite.Dense):
        raise PlanError(f"only dense layers are fitted, got {type(module).__name__}")
    movable = how.bias and (module.bias is not None or norm is not None)
    known = [(m.covariance, m.missing) if movable else (m.xx, m.ex) for m in moments]
    xx = torch.stack([R + m.noise.diag() for (R, _), m in zip(known, moments, strict=True)])
    missing = torch.stack([crossed for _, crossed in known])
    weight = fitted_weight(layer, module.weight.cpu(), config, xx, missing, how)
    _set(layer.name, module.weight, weight)
    if not movable:
        return
    rows = module.weight.detach().double().cpu().flatten(1).unflatten(0, (len(moments), -1))
    bias = torch.cat([m.bias_of(W) for m, W in zip(moments, rows, strict=True)])
    if module.bias is not None:
        _set(layer.name, module.bias, bias)
    elif norm is not None:
        calibrate.shift_mean(norm, bias)


def _set(name: str, parameter: Tensor, value: Tensor) -> None:
    """Put a fitted value in its place.

    Raises:
        CompressionError: the parameter's type does not hold it.
    """
    fitted = value.to(parameter)
    if not fitted.isfinite().all():
        largest = float(value.abs().max())
        raise CompressionError(
            f"layer {name!r}: {parameter.dtype} does not hold its fit, up to {largest:.3g}"
        )
    parameter.data = fitted
