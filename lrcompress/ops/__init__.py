"""The contract of every kernel: check, allocate, call. ``ops.reference`` is the same in plain torch."""

from lrcompress._C import PackedFactors
from lrcompress.ops.autocorrelation import Autocorrelation, autocorrelation
from lrcompress.ops.gram import gram
from lrcompress.ops.group_lasso import GroupLasso, group_lasso, penalty_max
from lrcompress.ops.least_squares import definite, explained, least_squares
from lrcompress.ops.lowrank_conv2d import lowrank_conv2d
from lrcompress.ops.lowrank_linear import lowrank_linear
from lrcompress.ops.nuclear_norm import nuclear_norm
from lrcompress.ops.singular_values import singular_values
from lrcompress.ops.symmetric_eigenvalues import symmetric_eigenvalues
from lrcompress.ops.truncated_svd import truncated_svd

__all__ = [
    "Autocorrelation",
    "GroupLasso",
    "PackedFactors",
    "autocorrelation",
    "definite",
    "explained",
    "gram",
    "group_lasso",
    "least_squares",
    "lowrank_conv2d",
    "lowrank_linear",
    "nuclear_norm",
    "penalty_max",
    "singular_values",
    "symmetric_eigenvalues",
    "truncated_svd",
]
