"""Run batches through a model and keep what they tell about it."""

from lrcompress.calibrate.batchnorm import reestimate_batchnorm
from lrcompress.calibrate.cost import count_macs, observe_calls
from lrcompress.calibrate.run import inference, observed, run, samples_in

__all__ = [
    "count_macs",
    "inference",
    "observe_calls",
    "observed",
    "reestimate_batchnorm",
    "run",
    "samples_in",
]
