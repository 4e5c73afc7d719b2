"""What a layer should give and what it will be given, as second moments of both."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress import ops
from lrcompress.calibrate.run import inference, observed
from lrcompress.calibrate.values import run
from lrcompress.types import CompressionError

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_ROUNDING = 1e-12  # of a mean in float64, relative: 1e-16 a product, growing with the root of their number


@dataclass
class Moments:
    """Means over patches x of a layer's input, and over what its outputs lack there; float64.

    With y the outputs that are wanted, e = y - (W x + b). Where nothing was compressed e is zero exactly,
    and no fit moves the weight: neither by rounding, nor where x hardly varies.
    """

    weight: Tensor  # W, [out, d], while this was measured
    bias: Tensor  # b, [out]
    xx: Tensor  # E[x x^T], [d, d], columns as in weight.flatten(1)
    x: Tensor  # E[x], [d]
    ex: Tensor  # E[e x^T], [out, d]
    e: Tensor  # E[e], [out]
    ee: Tensor  # E[e^2], [out]
    rounding: float  # of x and e, relative

    @property
    def power(self) -> Tensor:  # [d]
        """E[x^2]."""
        return self.xx.diagonal()

    @property
    def noise(self) -> Tensor:  # [d]
        """Variances that the data does not tell from rounding: an error of x is the least, one of y / x."""
        return self.rounding * (self.power + self.power.mean())

    @property
    def varies(self) -> Tensor:  # bool [d]
        """Inputs whose variance is not lost in the rounding of the means; the others are constants."""
        return self.power - self.x.square() > _ROUNDING * self.power

    @property
    def covariance(self) -> Tensor:  # [d, d]
        """Covariance of x; rows and columns of constants are zero."""
        xx = (self.xx + self.xx.T) / 2  # what a BLAS adds up in blocks is symmetric but for rounding
        return (xx - self.x[:, None] * self.x) * self.varies * self.varies[:, None]

    @property
    def missing(self) -> Tensor:  # [out, d]
        """Covariance of e and x."""
        return (self.ex - self.e[:, None] * self.x) * self.varies

    @property
    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance of x, of y and x, and variances of y, as if x had noise of its rounding; definite."""
        xx = ops.definite(self.covariance, self.rounding, self.power).moment
        yx = self.weight @ xx + self.missing
        variance = (self.ee - self.e.square()).clamp(min=0)
        return xx, yx, ((yx + self.missing) * self.weight).sum(1) + variance

    def bias_of(self, weight: Tensor) -> Tensor:  # [out]
        """Return the bias with which another weight gives the mean that is wanted."""
        return self.bias + self.e - (weight - self.weight) @ self.x


def cross_moments(
    wanted: nn.Module,  # whose outputs y are to be met
    given: nn.Module,  # whose inputs x are given; the same module names
    names: Sequence[str],  # of layers with one group of channels
    batches: Iterable[Any],
) -> dict[str, Moments]:
    """Return ``grouped_moments`` of layers that have one group.

    Raises:
        CompressionError: as ``grouped_moments``, or a layer did not run.
    """
    found = grouped_moments(wanted, given, names, batches)
    absent = [name for name in names if name not in found]
    if absent:
        raise CompressionError(f"no batch reached layer {absent[0]!r}")
    return {name: moments for name, (moments,) in found.items()}


def grouped_moments(
    wanted: nn.Module,  # whose outputs y are to be met
    given: nn.Module,  # whose inputs x are given; the same module names
    names: Sequence[str],
    batches: Iterable[Any],
    chosen: Collection[str] = (),  # layers whose rows are known to be picked by what layers give
) -> dict[str, list[Moments]]:  # of each layer that ran, for each of its channel groups
    """Run two models on the same batches; return the moments of the second's inputs and the first's outputs.

    Both run in evaluation mode, no further than the last of the layers. Sums over batches are float64. A
    layer called several times adds up all calls, in their order. Where the second model calls a layer on
    other rows than the first, as the experts of a router, no output belongs to an input: nothing is missing
    then, and its own weight says what is wanted.

    Raises:
        CompressionError: there are no batches, or a layer has inputs or outputs that are not finite.
    """
    layers = [{name: _layer_of(model, name) for name in names} for model in (wanted, given)]
    calls = [dict.fromkeys(names, 0), dict.fromkeys(names, 0)]
    sums = {name: _Sums(layer, name not in chosen) for name, layer in layers[1].items()}
    number = 0
    for number, batch in enumerate(batches, 1):
        seen = [_seen(m, layers[i], batch, calls[i]) for i, m in enumerate((wanted, given))]
        for name in names:
            _check_finite(name, number - 1, [*seen[0][name], *seen[1][name]])
            sums[name].add([y for _, y in seen[0][name]], seen[1][name])
    if not number and names:
        raise CompressionError("batches must hold at least one batch, got none")
    return {name: total.moments() for name, total in sums.items() if total.count}


def _layer_of(model: nn.Module, name: str) -> Layer:
    layer = model.get_submodule(name)
    assert isinstance(layer, Layer)
    return layer


def _check_finite(name: str, batch: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not all(t.isfinite().all() for pair in pairs for t in pair):
        raise CompressionError(f"batch {batch}: what layer {name!r} gets or gives holds nan or infinity")


class _LastCall(Exception):
    pass


def _seen(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Any,
    most: dict[str, int],  # calls of each layer in the forwards before; 0: not known yet
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Run the model up to the last call of the layers; return what went in and came out."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        found[name].append((x.detach().clone(), y.detach().clone()))  # what comes behind may write to them
        if all(0 < most[known] <= len(kept) for known, kept in found.items()):
            raise _LastCall

    with contextlib.suppress(_LastCall), inference(model, batch), observed(layers, see):
        run(model, batch)
    for name, kept in found.items():
        most[name] = max(most[name], len(kept))
    return found


class _Sums:
    """Running sums of one layer."""

    def __init__(self, layer: Layer, paired: bool) -> None:
        self.layer = layer
        self.groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        self.count = 0
        self.paired = paired  # whether each output wanted belongs to an input
        self.rounding = _ROUNDING
        self.known: list[Tensor] = []  # of x x^T and x, the channel group leading
        self.lacking: list[Tensor] = []  # of e x^T, e and e^2

    def add(self, wanted: Sequence[Tensor], given: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the calls of one batch: outputs of the one model, inputs and outputs of the other."""
        shapes = [y.shape for y in wanted]
        self.paired = self.paired and shapes == [y.shape for _, y in given]
        for i, (x, y) in enumerate(given):
            if not x.numel():
                continue
            self.rounding = max(self.rounding, torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps)
            e = wanted[i].double() - y.double() if self.paired else torch.zeros_like(y, dtype=torch.float64)
            count, known, lacking = self._call(x.double(), e)
            self.count += count
            self.known = [a + b for a, b in zip(self.known, known, strict=True)] if self.known else known
            if self.lacking:
                lacking = [a + b for a, b in zip(self.lacking, lacking, strict=True)]
            self.lacking = lacking

    def _call(self, x: Tensor, e: Tensor) -> tuple[int, list[Tensor], list[Tensor]]:
        """Return the patches of one call and its sums; exact, so that what is constant shows."""
        layer, split = self.layer, (self.groups, -1)
        if isinstance(layer, nn.Linear):
            rows = e.reshape(-1, e.shape[-1])
            known = ops.autocorrelation(x)
            ex = rows.T @ x.reshape(-1, x.shape[-1])
        else:
            x, e = (t if t.ndim == layer.weight.ndim else t[None] for t in (x, e))
            rows = e.transpose(0, 1).flatten(1).T
            pads: list[int] = layer._reversed_padding_repeated_twice
            if any(pads):
                x = F.pad(x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
            known = ops.autocorrelation(x, layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups)
            ex = _crossed(layer, x, e) if e.any() else torch.zeros_like(layer.weight, dtype=torch.float64)
        parts = (ex.flatten(1), rows.sum(0), rows.square().sum(0))
        lacking = [part.unflatten(0, split).cpu() for part in parts]
        return known.count, [known.products.cpu(), known.sums.cpu()], lacking

    def moments(self) -> list[Moments]:  # of each channel group
        """Return the means."""
        lacking = [total / self.count if self.paired else torch.zeros_like(total) for total in self.lacking]
        known = [total / self.count for total in self.known]
        (xx, x), (ex, e, ee), (W, b) = known, lacking, weight_and_bias(self.layer)
        return [
            Moments(W[g], b[g], xx[g], x[g], ex[g], e[g], ee[g], self.rounding) for g in range(self.groups)
        ]


def weight_and_bias(layer: Layer) -> tuple[Tensor, Tensor]:  # float64 [groups, out, d], [groups, out]
    """Return a layer's weight and bias, the channel group leading."""
    split = (1 if isinstance(layer, nn.Linear) else layer.groups, -1)
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    flat = layer.weight.detach().flatten(1), bias.detach()
    weight, offset = (t.double().cpu().unflatten(0, split) for t in flat)
    return weight, offset


def _crossed(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, e: Tensor) -> Tensor:  # like the weight
    """Return the sum of e patch^T over padded inputs: what the weight's gradient would be."""
    none = (0,) * len(layer.kernel_size)
    backward = torch.ops.aten.convolution_backward
    geometry = (layer.stride, none, layer.dilation, False, none, layer.groups)
    found: Tensor = backward(e, x, layer.weight.double(), None, *geometry, (False, True, False))[1]
    return found


def in_order_of_calls(model: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> list[str]:
    """Return layers in the order in which a forward first calls them, without those that no batch reaches."""
    seen: list[str] = []
    with (
        inference(model, *batches[:1]),
        observed({n: model.get_submodule(n) for n in names}, lambda name, *_: seen.append(name)),
    ):
        for batch in batches:
            run(model, batch)
            if len(set(seen)) == len(set(names)):
                break
    return list(dict.fromkeys(seen))
