"""Time layers and models on the device that they are on."""

from lrcompress.measure.clock import device_name, seconds_in_turn
from lrcompress.measure.tuning import tune

__all__ = ["device_name", "seconds_in_turn", "tune"]
