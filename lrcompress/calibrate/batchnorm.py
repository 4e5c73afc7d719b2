"""Batch-norm statistics of a network whose weights have changed, from unlabelled inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lrcompress.calibrate.values import run
from lrcompress.types import CompressionError


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],  # tensors, tuples of positional or mappings of keyword arguments; no labels
) -> nn.Module:
    """Replace the running mean and variance of every batch norm by their averages over the batches, in place.

    Batch norms normalise with each batch's own statistics meanwhile, everything else runs in evaluation mode,
    and all modes are put back. The order of batches does not matter. A batch norm that no batch reaches keeps
    its statistics. A model without batch norm is returned untouched, without running. Returns ``model``.

    Raises:
        CompressionError: ``batches`` is empty; the statistics are then left as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    before = [(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # the cumulative average
            norm.reset_running_stats()
        with torch.no_grad():
            seen = sum(1 for batch in batches if (run(model, batch), True))
        if not seen:
            raise CompressionError("batches must hold at least one batch, got none")
    except BaseException:
        for norm in norms:
            norm.reset_running_stats()
        raise
    finally:
        for norm, buffers in before:
            if not norm.num_batches_tracked:  # never reached, or reset because of an error
                norm.load_state_dict(buffers, strict=False)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return model


def shift_mean(norm: nn.Module, bias: Tensor) -> None:
    """Make a batch norm in evaluation mode act as if ``bias`` had been added to its input, in place."""
    mean = norm.get_buffer("running_mean")
    mean.sub_(bias.to(mean))
