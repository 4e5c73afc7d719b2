"""Neurons that disappear: which channels a network could do without, and the network without them."""

from lrcompress.removal.narrow import check_fits, removed
from lrcompress.removal.statistics import narrowed
from lrcompress.removal.trace import trace

__all__ = ["check_fits", "narrowed", "removed", "trace"]
