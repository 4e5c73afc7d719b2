"""Modules that run a factored layer."""

from lrcompress.nn.conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from lrcompress.nn.linear import LowRankLinear

__all__ = ["LowRankConv1d", "LowRankConv2d", "LowRankConv3d", "LowRankLinear"]
