"""How often each layer runs, and what one sample costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrcompress.calibrate.run import inference, observed
from lrcompress.calibrate.values import run, samples_in
from lrcompress.types import Call


def _recurrent_flops(inputs: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    """Every weight matrix meets every time step of every sample once."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(shape) for shape in rows if len(shape) == 2)


def _onednn_layer(inputs: Sequence[int], *weights: Any, out_shape: Any, **_: Any) -> int:
    return _recurrent_flops(inputs, weights[:2])  # then biases


def _cudnn_layers(inputs: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return _recurrent_flops(inputs, weights)


# Whole recurrent layers are one call of a library, which torch's counter does not know.
_RECURRENT = {torch.ops.aten.mkldnn_rnn_layer: _onednn_layer, torch.ops.aten._cudnn_rnn: _cudnn_layers}


class _Whole:
    """Stands for torch's tracker of modules, which fails on views of parameters made without gradients."""

    parents = frozenset(("Global",))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Counter(FlopCounterMode):
    """Counts the whole model, not its modules."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mod_tracker = _Whole()  # type: ignore[assignment]


def count_macs(model: nn.Module, inputs: Any) -> int:
    """Count the multiply-accumulates of one sample's forward, matrix products of attention included."""
    samples = samples_in(inputs)
    with inference(model, inputs), _Counter(display=False, custom_mapping=_RECURRENT) as counter:
        run(model, inputs)
    flops: int = counter.get_total_flops()
    return round(flops / 2 / samples)


def observe_calls(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d],  # of the model
    inputs: Any,
) -> tuple[dict[str, tuple[Call, ...]], int]:
    """Run the model once; return the calls of each layer that ran, and ``count_macs``."""
    samples = samples_in(inputs)
    calls: dict[str, tuple[Call, ...]] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        spatial = layers[name].weight.ndim - 2
        if spatial == 0:
            call = Call(y[..., 0].numel() / samples)
        else:
            batch = y.shape[0] if y.ndim == spatial + 2 else 1
            call = Call(batch / samples, tuple(x.shape[-spatial:]), tuple(y.shape[-spatial:]))
        calls[name] = (*calls.get(name, ()), call)

    with observed(layers, see):
        macs = count_macs(model, inputs)
    return calls, macs
