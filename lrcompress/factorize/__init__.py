"""Local steps, a file a family: tensors in, options and factors out."""

from lrcompress.factorize.svd import ErrorKind, Factors, GroupedSVD, svd_factors

__all__ = ["ErrorKind", "Factors", "GroupedSVD", "svd_factors"]
