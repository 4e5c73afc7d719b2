"""Run batches through a model and keep what they tell about it."""

from lrcompress.calibrate.batchnorm import reestimate_batchnorm, shift_mean
from lrcompress.calibrate.cost import count_macs, observe_calls
from lrcompress.calibrate.cross import Moments, cross_moments, grouped_moments, in_order_of_calls
from lrcompress.calibrate.follow import Behind, what_follows
from lrcompress.calibrate.inner import inner_calls
from lrcompress.calibrate.own import own_moments
from lrcompress.calibrate.reads import Reads, memory_of, reads
from lrcompress.calibrate.run import inference, observed
from lrcompress.calibrate.statistics import (
    CollectionInterrupted,
    Statistics,
    collect_layers,
    fingerprint,
    run_batch,
)
from lrcompress.calibrate.uses import uses
from lrcompress.calibrate.values import in_parts, plain_tensors, run, samples_in, tensors_in, thinned

__all__ = [
    "Behind",
    "CollectionInterrupted",
    "Moments",
    "Reads",
    "Statistics",
    "collect_layers",
    "count_macs",
    "cross_moments",
    "fingerprint",
    "grouped_moments",
    "in_order_of_calls",
    "in_parts",
    "inference",
    "inner_calls",
    "memory_of",
    "observe_calls",
    "observed",
    "own_moments",
    "plain_tensors",
    "reads",
    "reestimate_batchnorm",
    "run",
    "run_batch",
    "samples_in",
    "shift_mean",
    "tensors_in",
    "thinned",
    "uses",
    "what_follows",
]
