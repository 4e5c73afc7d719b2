"""Checks of what the solvers on second moments are given: an autocorrelation, and a weight or a target."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrcompress.ops._arrays import with_values

# Largest entries of what is given; squares of their products are float64 numbers then.
_RANGE = (1e-75, 1e75)


class Moments(NamedTuple):
    """Half the mean of ``|y - M x|^2`` as a quadratic in M; all float64."""

    R: Tensor  # E[x x^T], [in, in], symmetric
    cross: Tensor  # E[y x^T], [out, in]
    energy: float  # E|y|^2
    weight: Tensor | None  # [out, in] where y = weight x

    def gradient(
        self,
        M: Tensor,  # [..., out, in]
    ) -> Tensor:  # [..., out, in]
        """Return ``M R - E[y x^T]``, without cancellation where y = weight x."""
        if self.weight is None:
            return M @ self.R - self.cross
        off = M - self.weight
        return torch.mm(off.flatten(0, -2), self.R).view(off.shape)  # one product, however many M there are

    def residual(
        self,
        M: Tensor,  # [..., out, in]
        gradient: Tensor,  # [..., out, in], at M
    ) -> tuple[Tensor, Tensor]:  # [...], [...]
        """Return ``E|y - M x|^2`` and ``E<y - M x, y>``."""
        if self.weight is None:
            aligned = self.energy - (self.cross * M).sum((-2, -1))
            return (aligned + (gradient * M).sum((-2, -1))).clamp(min=0), aligned
        return ((M - self.weight) * gradient).sum((-2, -1)).clamp(min=0), -(gradient * self.weight).sum(
            (-2, -1)
        )


def moments(
    R: Tensor,  # [in, in]
    weight: Tensor | None,  # [out, in]
    target: tuple[Tensor, float | Tensor] | None,  # E[y x^T] [out, in] and E|y|^2
) -> Moments:
    """Check R and either a weight or a target, and take them to float64.

    Raises:
        ValueError: a shape, value or device is not as annotated, R is not symmetric or has a negative
            eigenvalue, beyond the rounding of its dtype, or the largest entry is beyond 1e-75 to 1e75.
    """
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not R.dtype.is_floating_point:
        raise ValueError(
            f"R must be a square floating matrix [in, in], got {R.dtype} of shape {tuple(R.shape)}"
        )
    if (weight is None) == (target is None):
        raise ValueError(f"give a weight or a target, got {'neither' if weight is None else 'both'}")
    name, matrix = ("weight", weight) if target is None else ("target[0]", target[0])
    assert matrix is not None
    if matrix.ndim != 2 or matrix.shape[1] != R.shape[0] or not matrix.dtype.is_floating_point:
        raise ValueError(
            f"{name} must be floating [out, in] with in = {R.shape[0]} as in R, "
            f"got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    if matrix.device != R.device:
        raise ValueError(f"R and {name} must lie on one device, got {R.device} and {matrix.device}")
    exact = _checked_autocorrelation(with_values("R", R))
    matrix = with_values(name, matrix).to(torch.float64)
    checked_norm(name, matrix)
    if target is None:
        cross = matrix @ exact
        energy = float(torch.vdot(cross.flatten(), matrix.flatten()))
        return Moments(exact, cross, energy, matrix)
    energy = float(target[1])
    if not 0 <= energy < float("inf"):
        raise ValueError(f"target[1], the mean of |y|^2, must be at least 0 and finite, got {energy}")
    return Moments(exact, matrix, energy, None)


def checked_norm(name: str, matrix: Tensor) -> float:
    """Return the Frobenius norm.

    Raises:
        ValueError: an entry is nan or infinite, or the largest is so large or small that squares are no
            numbers.
    """
    norm = float(torch.linalg.vector_norm(matrix))
    if _RANGE[0] <= norm <= _RANGE[1]:  # which a single nan would show in
        return norm
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, got nan or infinity")
    if largest and not _RANGE[0] <= largest <= _RANGE[1]:
        raise ValueError(
            f"the largest entry of {name} must lie within {_RANGE[0]} and {_RANGE[1]}, got {largest:.3g}: "
            "scale it"
        )
    return norm


def _checked_autocorrelation(
    R: Tensor,  # [in, in]
) -> Tensor:  # float64, exactly symmetric
    """Check that R is finite, and its symmetry and eigenvalues up to the rounding of its dtype."""
    rounding = R.shape[0] * torch.finfo(R.dtype).eps
    given = R.to(torch.float64)
    norm = checked_norm("R", given)
    exact = (given + given.T).mul_(0.5)
    # No entry of R - R^T is larger than its norm, and R's largest is no less than norm / side: entries are
    # only looked at where these two do not settle it.
    if 2 * R.shape[0] * float(torch.dist(given, exact)) > rounding * norm:
        _check_symmetry(given, rounding)
    if norm == 0:
        return exact
    # A Cholesky factor is many times cheaper than eigenvalues, which only the message needs.
    shift = rounding * norm
    shifted = exact.clone()
    shifted.diagonal().add_(shift)
    if int(torch.linalg.cholesky_ex(shifted).info) != 0:
        values = torch.linalg.eigvalsh(exact)
        if values[0] < -shift:
            raise ValueError(
                f"R must be positive semi-definite, got the eigenvalue {values[0]:.6g} "
                f"beside the largest {values[-1]:.6g}"
            )
    return exact


def _check_symmetry(
    R: Tensor,  # [in, in]
    rounding: float,  # of the largest entry
) -> None:
    """Refuse the first entry that differs most from its mirror image, where it does by more than rounding."""
    asymmetry = R - R.T
    if float(asymmetry.max()) > rounding * float(R.abs().max()):
        i, j = divmod(int(asymmetry.argmax()), R.shape[0])
        raise ValueError(
            f"R must be symmetric, got R[{i}, {j}] = {R[i, j]:.6g} and R[{j}, {i}] = {R[j, i]:.6g}"
        )
