"""Run batches through a model and keep what they tell about it."""

from lrcompress.calibrate.batchnorm import reestimate_batchnorm
from lrcompress.calibrate.cost import count_macs, observe_calls
from lrcompress.calibrate.cross import Moments, cross_moments, in_order_of_calls, patches
from lrcompress.calibrate.run import inference, observed, run, samples_in

__all__ = [
    "Moments",
    "count_macs",
    "cross_moments",
    "in_order_of_calls",
    "inference",
    "observe_calls",
    "observed",
    "patches",
    "reestimate_batchnorm",
    "run",
    "samples_in",
]
