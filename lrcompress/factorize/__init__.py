"""Local steps, a file a family: tensors in, options and factors out."""

from lrcompress.factorize.activation import ActivationAware, OutputError
from lrcompress.factorize.fit import fitted_weight
from lrcompress.factorize.on_top import OnTop, Shares
from lrcompress.factorize.svd import ErrorKind, Factors, GroupedSVD, svd_factors

__all__ = [
    "ActivationAware",
    "ErrorKind",
    "Factors",
    "GroupedSVD",
    "OnTop",
    "OutputError",
    "Shares",
    "fitted_weight",
    "svd_factors",
]
