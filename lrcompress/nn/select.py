"""A layer that reads only some of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SelectInputs(nn.Module):
    """Apply ``y = layer(x[..., kept, ...])``: what neuron removal makes of a layer on the network's inputs.

    The network's inputs keep their shape; ``layer`` is as narrow as what is kept of them.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d,
        kept: Sequence[int]
        | Tensor,  # rising indices of input features or channels, as many as the layer reads
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        reads = layer.weight.shape[1]
        if len(kept) != reads:
            raise ValueError(f"kept must hold the {reads} inputs that the layer reads, got {len(kept)}")
        self.layer = layer
        self.axis = (
            1 - layer.weight.ndim
        )  # from the end: the features, or the channels before the spatial axes
        self.register_buffer("kept", torch.as_tensor(kept, dtype=torch.int64, device=device))
        self.kept: Tensor

    def forward(
        self,
        input: Tensor,  # [..., in_features] or [..., in_channels, *spatial]
    ) -> Tensor:
        """Apply the layer to what it keeps of its input."""
        selected: Tensor = self.layer(input.index_select(self.axis, self.kept))
        return selected

    def __getattr__(self, name: str) -> Any:
        """Return what the layer has: weight, bias, in_features, stride, ..., as narrow as the layer is."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)

    def extra_repr(self) -> str:
        """Describe the selection in ``print(model)``."""
        return f"kept={len(self.kept)}"
