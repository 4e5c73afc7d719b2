"""Modules that run a layer in its smaller form."""

from lrcompress.nn.conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from lrcompress.nn.linear import LowRankLinear
from lrcompress.nn.row import LayersInRow
from lrcompress.nn.select import SelectInputs

__all__ = ["LayersInRow", "LowRankConv1d", "LowRankConv2d", "LowRankConv3d", "LowRankLinear", "SelectInputs"]
