"""The contract of every kernel: check, allocate, call. ``ops.reference`` is the same in plain torch."""

from lrcompress.ops.autocorrelation import Autocorrelation, autocorrelation
from lrcompress.ops.gram import gram
from lrcompress.ops.lowrank_conv2d import lowrank_conv2d
from lrcompress.ops.lowrank_linear import lowrank_linear
from lrcompress.ops.singular_values import singular_values
from lrcompress.ops.symmetric_eigenvalues import symmetric_eigenvalues
from lrcompress.ops.truncated_svd import truncated_svd

__all__ = [
    "Autocorrelation",
    "autocorrelation",
    "gram",
    "lowrank_conv2d",
    "lowrank_linear",
    "singular_values",
    "symmetric_eigenvalues",
    "truncated_svd",
]
