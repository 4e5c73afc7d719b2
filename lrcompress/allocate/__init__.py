"""Global steps: options of all layers and a limit -> one option a layer. Plain numbers, no torch."""

from lrcompress.allocate.constant_ratio import ConstantRatio
from lrcompress.allocate.minmax import MinMax
from lrcompress.allocate.shrink import Sizes, shrink
from lrcompress.allocate.weighted_sum import WeightedSum
from lrcompress.allocate.wishes import factors, floored, weighed

__all__ = ["ConstantRatio", "MinMax", "Sizes", "WeightedSum", "factors", "floored", "shrink", "weighed"]
