"""Second moments of a layer's inputs: what data-aware steps know of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lrcompress.types.errors import PlanError

Tensor = Any  # of torch, which this room does not wait for


@dataclass(frozen=True)
class LayerStatistics:
    """Means over all patches x that a layer multiplied its weight with; d as in ``weight.flatten(1)``."""

    autocorrelation: Tensor  # float64 [conv_groups, d, d], E[x x^T], uncentred
    mean: Tensor  # float64 [conv_groups, d], E[x]
    samples: int  # patches
    gradient: Tensor | None = None  # float64 [out, out], E[g g^T] of the layer's outputs
    share: float = 1.0  # variance of the layer's residual branch over that of the sum that ends it

    def __post_init__(self) -> None:
        groups, side = self.mean.shape
        if self.autocorrelation.shape != (groups, side, side) or self.samples < 1:
            raise PlanError(
                f"statistics need an autocorrelation {[groups, side, side]} of at least 1 sample, "
                f"got {list(self.autocorrelation.shape)} of {self.samples}"
            )
        if self.gradient is not None and (
            self.gradient.ndim != 2 or self.gradient.shape[0] != self.gradient.shape[1]
        ):
            raise PlanError(f"gradient statistics must be square, got {list(self.gradient.shape)}")

    @property
    def covariance(self) -> Tensor:  # [conv_groups, d, d]
        """E[x x^T] - E[x] E[x]^T."""
        return self.autocorrelation - self.mean[:, :, None] * self.mean[:, None, :]


# Of both examples on ResNet20 and on MiniLM: less loses accuracy behind compressed layers, more loses it
# without them.
PRIOR_OF_BATCHES = 0.2
PRIOR_OF_STATISTICS = 0.01


@dataclass(frozen=True)
class Refinement:
    """How weights are fitted to unlabelled data after a plan was made.

    With x' the inputs that a layer of the compressed network sees, y the outputs that the original layer
    gave, E its block-diagonal encoder and D its decoder, the mean of |y - D E x' - b|^2 is lowered, where
    white noise of ``prior`` times the inputs' mean variance is added to x', and what the original weight
    makes of that noise to y: inputs of which the data says little keep what the weight says. None is
    ``PRIOR_OF_BATCHES``, and ``PRIOR_OF_STATISTICS`` for statistics alone: those are of the original inputs,
    of which the weight gives y exactly, so that noise only blurs which of them matter.

    - the decoder is its least-squares minimiser, D = R_yx' E^T (E R_x'x' E^T)^-1; where the rank is full, the
      weight moves by what is missing alone, R_ex' R_x'x'^-1, with e what its outputs differ by from y;
    - then ``sweeps`` times over the groups each group's encoder and decoder are replaced by the minimisers
      given all others (a truncated SVD of the residual's regression), and the decoder is fitted again;
    - with ``bias``, moments are centred and b makes the mean output exact: it goes into the layer's bias, or
      into the running mean of the batch norm behind it; a layer that has neither is fitted uncentred.

    Source: Zhang et al. 2015 (fitting to the compressed prefix, one group); groups, sweeps and the
    prior are ours.
    """

    encoder: str = "inputs"  # what the encoders start from: "inputs" (whitened) or "weights" (plain SVD)
    sweeps: int = 4
    prior: float | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        known = self.prior is None or 0 <= self.prior < math.inf
        if self.encoder not in ("inputs", "weights") or self.sweeps < 0 or not known:
            raise PlanError(
                "a refinement needs encoder 'inputs' or 'weights', sweeps >= 0 and a finite prior >= 0, "
                f"got {self.encoder!r}, {self.sweeps} and {self.prior}"
            )
