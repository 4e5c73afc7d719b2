"""Linear Neural Reconstruction: which neurons go, and what the weights behind them become."""

from lrcompress.reconstruct.choose import Paths
from lrcompress.reconstruct.fit import no_means, reconstructed, reduced
from lrcompress.reconstruct.planned import plan_of, planned, prepared
from lrcompress.reconstruct.problem import Data
from lrcompress.reconstruct.shares import shares_of

__all__ = [
    "Data",
    "Paths",
    "no_means",
    "plan_of",
    "planned",
    "prepared",
    "reconstructed",
    "reduced",
    "shares_of",
]
