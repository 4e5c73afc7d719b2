"""The only code that walks or changes a model: which layers it has, the model with some of them factored."""

from lrcompress.rewrite.factored import check_applied, check_fits, factored, fill_factors
from lrcompress.rewrite.layers import Dense, Factored, is_factored
from lrcompress.rewrite.plain import merge, multiplied_out, unfuse
from lrcompress.rewrite.survey import check_weight, count_params, describe, left_out, survey
from lrcompress.rewrite.swap import fill, named_tensors, replaced

__all__ = [
    "Dense",
    "Factored",
    "check_applied",
    "check_fits",
    "check_weight",
    "count_params",
    "describe",
    "factored",
    "fill",
    "fill_factors",
    "is_factored",
    "left_out",
    "merge",
    "multiplied_out",
    "named_tensors",
    "replaced",
    "survey",
    "unfuse",
]
