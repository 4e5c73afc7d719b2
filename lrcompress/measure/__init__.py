"""Time layers and models on the device that they are on."""

from lrcompress.measure.clock import Progress, device_name, seconds_of_layers, seconds_of_models
from lrcompress.measure.correction import corrected
from lrcompress.measure.options import timed_options
from lrcompress.measure.reached import check_runs
from lrcompress.measure.tuning import tune
from lrcompress.measure.verification import output_error, verify

__all__ = [
    "Progress",
    "check_runs",
    "corrected",
    "device_name",
    "output_error",
    "seconds_of_layers",
    "seconds_of_models",
    "timed_options",
    "tune",
    "verify",
]
