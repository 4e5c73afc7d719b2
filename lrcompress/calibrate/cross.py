"""What a layer should give and what it will be given, as second moments of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.calibrate.run import inference, observed, run
from lrcompress.types import CompressionError

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_ROUNDING = 1e-12  # of a mean in float64, relative: 1e-16 a product, growing with the root of their number
_PATCH_BYTES = 1 << 28  # of the patches that are held at once


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


def patches(
    layer: Layer,
    x: Tensor,  # [..., in] or [batch, in, *size]
) -> Tensor:  # [patches, in prod(kernel)]
    """Return the vectors that the layer multiplies its weight with, one a row."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    dims = layer.weight.ndim - 2
    x = x if x.ndim == dims + 2 else x[None]
    pads = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, pads, mode=mode) if any(pads) else x
    for axis in range(dims):
        size, dilation = layer.kernel_size[axis], layer.dilation[axis]
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, layer.stride[axis])[..., ::dilation]
    return x.movedim(1, 1 + dims).reshape(-1, layer.weight[0].numel())


def cross_moments(
    wanted: nn.Module,  # whose outputs y are to be met
    given: nn.Module,  # whose inputs x are given; the same module names
    names: Sequence[str],  # of layers with one group of channels
    batches: Iterable[Any],
) -> dict[str, Moments]:
    """Run two models on the same batches; return the moments of the second's inputs and the first's outputs.

    Both run in evaluation mode. Products are float64. A layer called several times adds up all calls, in
    their order.

    Raises:
        CompressionError: there are no batches, or a layer did not run, or not equally often in both models.
    """
    sums: dict[str, tuple[int, Moments]] = {}
    layers = [{name: model.get_submodule(name) for name in names} for model in (wanted, given)]
    with inference(wanted), inference(given):
        for batch in batches:
            outputs: dict[str, list[Tensor]] = {name: [] for name in names}
            inputs: dict[str, list[Tensor]] = {name: [] for name in names}
            with observed(layers[0], partial(_keep, outputs, 2)):
                run(wanted, batch)
            with observed(layers[1], partial(_keep, inputs, 1)):
                run(given, batch)
            for name, layer in layers[1].items():
                calls = len(outputs[name]), len(inputs[name])
                if calls[0] != calls[1] or not calls[0]:
                    raise CompressionError(
                        f"layer {name!r} must run equally often in both models, got {calls[0]} and {calls[1]}"
                    )
                for x, y in zip(inputs[name], outputs[name], strict=True):
                    sums[name] = _added(sums.get(name), layer, x, y)  # type: ignore[arg-type]
    if not sums and names:
        raise CompressionError("batches must hold at least one batch, got none")
    return {
        name: Moments(*(t / count for t in vars(total).values())) for name, (count, total) in sums.items()
    }


def _keep(found: dict[str, list[Tensor]], which: int, *seen: Any) -> None:
    """Keep the input (1) or output (2) of an observed call."""
    found[seen[0]].append(seen[which])


def _added(total: tuple[int, Moments] | None, layer: Layer, x: Tensor, y: Tensor) -> tuple[int, Moments]:
    """Add one call to the sums."""
    channels_last = y if isinstance(layer, nn.Linear) else y.movedim(1 - layer.weight.ndim, -1)
    rows = channels_last.reshape(-1, channels_last.shape[-1])
    d = layer.weight[0].numel()
    if total is None:
        empty = [torch.zeros(*s, dtype=torch.float64) for s in ((d, d), (d,), (rows.shape[1], d))]
        total = 0, Moments(*empty, *(torch.zeros(rows.shape[1], dtype=torch.float64) for _ in range(2)))
    count, m = total
    samples = 1 if x.ndim < layer.weight.ndim or len(x) == 0 else len(x)
    at_once = max(1, _PATCH_BYTES // (8 * d * max(1, len(rows) // samples)))
    parts = [x] if samples == 1 else list(x.split(at_once))
    seen = 0
    for part in parts:
        p = patches(layer, part.detach()).double().cpu()
        q = rows[seen : seen + len(p)].detach().double().cpu()
        m.xx += p.T @ p
        m.yx += q.T @ p
        m.x += p.sum(0)
        m.y += q.sum(0)
        m.yy += q.square().sum(0)
        seen += len(p)
    return count + seen, m


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
