"""Linear Neural Reconstruction: which neurons go, and what the weights behind them become."""

from lrcompress.reconstruct.choose import Paths
from lrcompress.reconstruct.fit import no_means, reconstructed, reduced
from lrcompress.reconstruct.planned import in_parts, plan_of, planned, prepared

__all__ = ["Paths", "in_parts", "no_means", "plan_of", "planned", "prepared", "reconstructed", "reduced"]
