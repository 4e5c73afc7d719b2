"""What a layer should give and what it will be given, as second moments of both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress import ops
from lrcompress.calibrate.run import inference, observed, run
from lrcompress.types import CompressionError

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_ROUNDING = 1e-12  # of a mean in float64, relative: 1e-16 a product, growing with the root of their number


@dataclass
class Moments:
    """Means over patches x of a layer's input and the outputs y wanted of it, bias included; float64."""

    xx: Tensor  # E[x x^T], [d, d], columns as in weight.flatten(1)
    x: Tensor  # E[x], [d]
    yx: Tensor  # E[y x^T], [out, d]
    y: Tensor  # E[y], [out]
    yy: Tensor  # E[y^2], [out]

    @property
    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance of x, of y and x, and variances of y.

        Inputs whose variance is lost in the rounding of the subtraction are constants: their rows and columns
        are zero. What the rounding may have taken from the others' eigenvalues is added to the diagonal.
        """
        variance = self.xx.diagonal() - self.x.square()
        varies = variance > _ROUNDING * self.xx.diagonal()
        xx = (self.xx + self.xx.T) / 2  # what a BLAS adds up in blocks is symmetric but for rounding
        xx = (xx - self.x[:, None] * self.x) * varies * varies[:, None]
        xx.diagonal().add_(_ROUNDING * float(self.xx.diagonal().max()) * varies if len(xx) else 0.0)
        yx = (self.yx - self.y[:, None] * self.x) * varies
        return xx, yx, (self.yy - self.y.square()).clamp(min=0)


def cross_moments(
    wanted: nn.Module,  # whose outputs y are to be met
    given: nn.Module,  # whose inputs x are given; the same module names
    names: Sequence[str],  # of layers with one group of channels
    batches: Iterable[Any],
) -> dict[str, Moments]:
    """Return ``grouped_moments`` of layers that have one group."""
    found = grouped_moments(wanted, given, names, batches)
    return {name: moments for name, (moments,) in found.items()}


def grouped_moments(
    wanted: nn.Module,  # whose outputs y are to be met
    given: nn.Module,  # whose inputs x are given; the same module names
    names: Sequence[str],
    batches: Iterable[Any],
) -> dict[str, list[Moments]]:  # of each layer, for each of its channel groups
    """Run two models on the same batches; return the moments of the second's inputs and the first's outputs.

    Both run in evaluation mode, no further than the last of the layers. Sums over batches are float64. A
    layer called several times adds up all calls, in their order.

    Raises:
        CompressionError: there are no batches; a layer did not run, or not equally often in both models, or
            has inputs or outputs that are not finite.
    """
    sums: dict[str, tuple[int, list[Tensor]]] = {}
    layers = [{name: model.get_submodule(name) for name in names} for model in (wanted, given)]
    calls: list[dict[str, int] | None] = [None, None]
    with inference(wanted), inference(given):
        for number, batch in enumerate(batches):
            seen = []
            for i, model in enumerate((wanted, given)):
                found = _seen(model, layers[i], batch, 2 - i, calls[i])
                calls[i] = {name: len(kept) for name, kept in found.items()}
                seen.append(found)
            for name, layer in layers[1].items():
                counts = len(seen[0][name]), len(seen[1][name])
                if counts[0] != counts[1] or not counts[0]:
                    raise CompressionError(
                        f"layer {name!r} must run equally often in both models, "
                        f"got {counts[0]} and {counts[1]}"
                    )
                for y, x in zip(seen[0][name], seen[1][name], strict=True):
                    if not (x.isfinite().all() and y.isfinite().all()):
                        raise CompressionError(
                            f"batch {number}: what layer {name!r} gets or gives holds nan or infinity"
                        )
                    sums[name] = _added(sums.get(name), layer, x, y)  # type: ignore[arg-type]
    if not sums and names:
        raise CompressionError("batches must hold at least one batch, got none")
    return {
        name: [Moments(*parts) for parts in zip(*(t / count for t in total), strict=True)]
        for name, (count, total) in sums.items()
    }


class _LastCall(Exception):
    pass


def _seen(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Any,
    which: int,  # 1: inputs, 2: outputs
    calls: Mapping[str, int] | None,  # of each layer in one forward; None: not known yet
) -> dict[str, list[Tensor]]:
    """Run the model up to the last call of the layers; return what went in or came out."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(*seen: Any) -> None:
        found[seen[0]].append(seen[which].detach().clone())  # what comes behind may write to it
        if calls is not None and all(len(found[name]) >= count for name, count in calls.items()):
            raise _LastCall

    with contextlib.suppress(_LastCall), observed(layers, see):
        run(model, batch)
    return found


def _added(
    total: tuple[int, list[Tensor]] | None, layer: Layer, x: Tensor, y: Tensor
) -> tuple[int, list[Tensor]]:  # of xx, x, yx, y and yy, the channel group leading
    """Add one call to the sums."""
    if isinstance(layer, nn.Linear):
        groups, outputs = 1, y.reshape(-1, y.shape[-1])
        known = ops.autocorrelation(x.double())  # exact: what is constant must show
        yx = outputs.T @ x.reshape(-1, x.shape[-1])
    else:
        x, y = (t if t.ndim == layer.weight.ndim else t[None] for t in (x, y))
        groups, outputs = layer.groups, y.transpose(0, 1).flatten(1).T
        pads: list[int] = layer._reversed_padding_repeated_twice
        if any(pads):
            x = F.pad(x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        known = ops.autocorrelation(
            x.double(), layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups
        )
        yx = _crossed(layer, x, y)
    split = (groups, -1)
    sums = [
        known.products,
        known.sums,
        yx.double().flatten(1).unflatten(0, split),
        outputs.double().sum(0).unflatten(0, split),
        outputs.double().square().sum(0).unflatten(0, split),
    ]
    sums = [t.cpu() for t in sums]
    if total is None:
        return known.count, sums
    return total[0] + known.count, [a + b for a, b in zip(total[1], sums, strict=True)]


def _crossed(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, y: Tensor) -> Tensor:  # like the weight
    """Return the sum of y patch^T over padded inputs: what the weight's gradient would be."""
    none = (0,) * len(layer.kernel_size)
    backward = torch.ops.aten.convolution_backward
    geometry = (layer.stride, none, layer.dilation, False, none, layer.groups)
    found: Tensor = backward(y, x, layer.weight, None, *geometry, (False, True, False))[1]
    return found


def in_order_of_calls(model: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> list[str]:
    """Return layers in the order in which a forward first calls them, without those that do not run."""
    seen: list[str] = []
    with (
        inference(model),
        observed({n: model.get_submodule(n) for n in names}, lambda name, *_: seen.append(name)),
    ):
        for batch in batches[:1]:
            run(model, batch)
    return list(dict.fromkeys(seen))
