"""Accelerated proximal gradient for the group lasso, many penalties at once."""

import torch
from torch import Tensor

from lrcompress.ops._groups import Problem

CHECK_EVERY = 5  # iterations between two looks at the gap, each of which waits for the device


def fista(
    problem: Problem,
    thresholds: Tensor,  # [penalties, groups], > 0
    tol: float,  # on the duality gap over the objective
    max_iter: int,
    lipschitz: Tensor,  # scalar, at least the largest eigenvalue of the curvature
    N: Tensor,  # [penalties, rows, outputs], the start
) -> tuple[Tensor, Tensor]:  # [penalties, rows, outputs]; iterations int64 [penalties]
    """Minimise for each penalty, with momentum that restarts when it points uphill.

    One product with the curvature an iteration: that of the extrapolated point is extrapolated, and that of
    the iterate gives the duality gap for nothing.
    Source: Beck and Teboulle (2009), eq. 4.1-4.3; O'Donoghue and Candes (2015), the gradient scheme.
    """
    penalties = len(thresholds)
    done = torch.full((penalties,), max_iter, dtype=torch.int64, device=N.device)
    best = N.clone()
    running = torch.ones(penalties, dtype=torch.bool, device=N.device)
    product = problem.curvature @ N
    point, point_product = N, product
    momentum = torch.ones(penalties, 1, 1, dtype=N.dtype, device=N.device)
    for iteration in range(max_iter + 1):
        if iteration % CHECK_EVERY == 0 or iteration == max_iter:
            objective, gap = measure(problem, N, product - problem.linear, thresholds)
            reached = running & (gap <= tol * objective)
            best = torch.where(running[:, None, None], N, best)
            done[reached] = iteration
            running &= ~reached
            if iteration == max_iter or not running.any():
                break
        forward = point - (point_product - problem.linear) / lipschitz
        new = shrink(problem, forward, thresholds / lipschitz)
        new_product = problem.curvature @ new
        uphill = ((point - new) * (new - N)).sum((1, 2), keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        beta = torch.where(uphill, 0.0, (momentum - 1) / grown)
        point = new + beta * (new - N)
        point_product = new_product + beta * (new_product - product)
        N, product, momentum = new, new_product, grown
    return best, done


def shrink(
    problem: Problem,
    matrix: Tensor,  # [penalties, rows, outputs]
    thresholds: Tensor,  # [penalties, groups]
) -> Tensor:
    """Shorten each group by its threshold, and make it zero where it is no longer than that."""
    norms = problem.norms(matrix)
    factors = (1 - thresholds / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)
    return matrix * factors[:, problem.group, None]


def measure(
    problem: Problem,
    N: Tensor,  # [penalties, rows, outputs]
    gradient: Tensor,  # [penalties, rows, outputs], at N
    thresholds: Tensor,  # [penalties, groups]
) -> tuple[Tensor, Tensor]:  # [penalties], [penalties]
    """Return the objective and the duality gap."""
    if problem.weight is None:
        aligned = problem.energy - (problem.linear * N).sum((1, 2))
    else:
        aligned = -(gradient * problem.weight).sum((1, 2))  # does not cancel where the residual is small
    residual = (aligned + (gradient * N).sum((1, 2))).clamp(min=0)
    penalty = (thresholds * problem.norms(N)).sum(1)
    return residual / 2 + penalty, duality_gap(
        residual, aligned, penalty, problem.norms(gradient), thresholds
    )


def duality_gap(
    residual: Tensor,  # E|y - M x|^2, [penalties]
    aligned: Tensor,  # E<y - M x, y>, [penalties]
    penalty: Tensor,  # sum of thresholds times norms, [penalties]
    slopes: Tensor,  # norms of the gradient's groups, [penalties, groups]
    thresholds: Tensor,  # [penalties, groups]
) -> Tensor:  # [penalties]
    """Return the gap to the residual as a dual point, scaled until no group's slope exceeds its threshold."""
    tiny = torch.finfo(residual.dtype).tiny
    feasible = (thresholds / slopes.clamp(min=tiny)).amin(1).clamp(max=1)
    scale = torch.minimum((aligned / residual.clamp(min=tiny)).clamp(min=0), feasible)
    return (residual / 2 + penalty - scale * aligned + scale.square() * residual / 2).clamp(min=0)
