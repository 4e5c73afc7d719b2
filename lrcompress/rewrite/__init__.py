"""The only code that walks or changes a model: which layers it has, the model with some of them factored."""

from lrcompress.rewrite.copying import copied
from lrcompress.rewrite.factored import check_applied, check_fits, factored, fill_factors, like
from lrcompress.rewrite.fill import add_buffers, check_fill, extra_states, fill, named_tensors
from lrcompress.rewrite.fold import (
    check_folds,
    check_unfolded,
    foldable,
    foldable_parts,
    folded,
    folded_into,
    forget_folds,
)
from lrcompress.rewrite.layers import Dense, Factored, check_factored, is_factored
from lrcompress.rewrite.layout import memory_format_of, memory_formats, set_memory_format
from lrcompress.rewrite.opening import closed, inner_names, own_forwards, with_opened
from lrcompress.rewrite.plain import merge, multiplied_out, unfuse
from lrcompress.rewrite.survey import (
    check_weight,
    count_bytes,
    count_params,
    describe,
    left_out,
    otherwise,
    survey,
)
from lrcompress.rewrite.swap import replaced, swapped_in
from lrcompress.rewrite.transposed import with_linears
from lrcompress.rewrite.ways import tuned

__all__ = [
    "Dense",
    "Factored",
    "add_buffers",
    "check_applied",
    "check_factored",
    "check_fill",
    "check_fits",
    "check_folds",
    "check_unfolded",
    "check_weight",
    "closed",
    "copied",
    "count_bytes",
    "count_params",
    "describe",
    "extra_states",
    "factored",
    "fill",
    "fill_factors",
    "foldable",
    "foldable_parts",
    "folded",
    "folded_into",
    "forget_folds",
    "inner_names",
    "is_factored",
    "left_out",
    "like",
    "memory_format_of",
    "memory_formats",
    "merge",
    "multiplied_out",
    "named_tensors",
    "otherwise",
    "own_forwards",
    "replaced",
    "set_memory_format",
    "survey",
    "swapped_in",
    "tuned",
    "unfuse",
    "with_linears",
    "with_opened",
]
