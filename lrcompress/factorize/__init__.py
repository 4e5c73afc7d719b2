"""Local steps, a file a family: tensors in, options and factors out."""

from lrcompress.factorize.activation import ActivationAware, OutputError
from lrcompress.factorize.fit import fitted_weight
from lrcompress.factorize.svd import ErrorKind, Factors, GroupedSVD, svd_factors

__all__ = [
    "ActivationAware",
    "ErrorKind",
    "Factors",
    "GroupedSVD",
    "OutputError",
    "fitted_weight",
    "svd_factors",
]
