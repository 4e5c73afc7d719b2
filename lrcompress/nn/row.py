"""Ordinary layers in a row, which answer for the one layer that they replace."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from lrcompress.nn.conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from lrcompress.nn.linear import LowRankLinear
from lrcompress.nn.weight import in_graph

_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")


class LayersInRow(nn.Sequential):
    """Run ordinary layers in a row: encoder and decoder, or one dense layer, and perhaps an activation.

    The attributes are those of the dense layer that this stands for: ``weight`` is what encoder and decoder
    multiply out to, as that of a factored layer is, and what is written to it goes to the decoder; the sizes
    have the names and meanings of ``nn.Linear`` and ``nn.Conv2d``.
    """

    __jit_unused_properties__ = ("weight", "bias")

    def __init__(
        self,
        layer: nn.Module,  # the dense layer in the row, or a factored one that encoder and decoder replace
        *row: nn.Module,
    ) -> None:
        super().__init__(*row)
        self._of_two = isinstance(layer, LowRankLinear | LowRankConv1d | LowRankConv2d | LowRankConv3d)
        self._stands_for = (layer,)  # in a tuple, for it is no part of the row
        if isinstance(layer, nn.Linear | LowRankLinear):
            self.in_features, self.out_features = layer.in_features, layer.out_features
        else:
            self.groups = layer.conv_groups if self._of_two else layer.groups
            for name in _SIZES:
                setattr(self, name, getattr(layer, name))

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer."""
        layer: Any = self._stands_for[0]
        if self._of_two and in_graph():
            product: Tensor = layer.product(self[1].weight, self[0].weight)
            return product
        weight: Tensor = self._layer().weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the dense layer."""
        bias: Tensor | None = self[int(self._of_two)].bias
        return bias

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a new weight or bias goes to the layers."""
        if name == "weight":
            self._layer().weight = value
        elif name == "bias":
            self[int(self._of_two)].bias = value
        else:
            super().__setattr__(name, value)

    def __getitem__(self, index: Any) -> Any:
        """Return a layer, or several as an ordinary ``nn.Sequential``."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def _layer(self) -> Any:
        """Return a layer with the weight that the row stands for."""
        if not self._of_two:
            return self[0]
        layer = self._stands_for[0]
        layer._parameters.update(U=self[1].weight, V=self[0].weight)  # tensors of a functional call too
        return layer
