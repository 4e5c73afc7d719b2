"""Block coordinate descent for the group lasso, sped up by Newton steps on the support."""

import torch
from torch import Tensor

from lrcompress import _C
from lrcompress.ops._groups import Problem

# Multiplications in a Newton step's own time, from bench/group_lasso.py: of its calls, and of its inverse.
CALLS = 3e6
INVERSE = 0.25
# Share of the radial curvature that a Newton step keeps: without any its matrix may be singular.
DAMPING = 1e-8
# Rounds in a row whose gap shrank by less than a tenth: rounding is all that is left.
PROGRESS = 0.9
MAX_STALLED = 20
STEPS = 2.0 ** -torch.arange(0, 24, dtype=torch.float64)


def descend(
    problem: Problem,  # on the CPU
    thresholds: Tensor,  # [groups], > 0
    tol: float,  # on the duality gap over the objective
    max_iter: int,  # sweeps and Newton steps
    N: Tensor,  # [rows, outputs], the start; overwritten by the solution
    gradient: Tensor,  # [rows, outputs], at N; kept up to date
) -> int:
    """Minimise in place, and return the number of sweeps and Newton steps.

    Stops early where rounding does not let the gap shrink any more. Sweeps settle which groups are zero; on
    the others the objective is smooth, and Newton's method takes a handful of steps where sweeps of a badly
    conditioned problem take thousands, or hundreds with extrapolation.
    """
    iterations = support = stalled = 0
    least = float("inf")
    outputs = N.shape[1]
    while True:
        # As long on sweeps as the next Newton step will take.
        work = CALLS + INVERSE * support**3 + 2 * support**2 * outputs
        objective, gap, sweeps, support = _C.group_lasso(
            problem.curvature,
            problem.linear,
            problem.weight,
            problem.starts,
            thresholds,
            problem.energy,
            tol,
            max_iter - iterations,
            work,
            N,
            gradient,
            torch.get_num_threads(),
        )
        iterations += sweeps
        stalled = stalled + 1 if gap > PROGRESS * least else 0
        least = min(gap, least)
        if gap <= tol * objective or iterations >= max_iter or stalled == MAX_STALLED:
            return iterations
        newton_step(problem, thresholds, N, gradient)
        iterations += 1


def newton_step(
    problem: Problem,
    thresholds: Tensor,  # [groups]
    N: Tensor,  # [rows, outputs], in and out
    gradient: Tensor,  # [rows, outputs], at N, in and out
) -> None:
    """Take one Newton step on the groups that are not zero, its length by search.

    With u_g = N_g / |N_g| and D = diag(threshold / |N_g|), the Hessian is (A + D) (x) I - U D U^T: its
    inverse needs that of A + D and, by Woodbury's identity, one system with an unknown a group.
    """
    norms = problem.norms(N)
    rows = (norms > 0)[problem.group].nonzero()[:, 0]
    if len(rows) == 0:
        return
    active, group = torch.unique_consecutive(problem.group[rows], return_inverse=True)
    norm, threshold = norms[active], thresholds[active]
    whole = len(rows) == len(N)
    M = N if whole else N[rows]
    bend = (threshold / norm)[group]
    slope = torch.addcmul(gradient if whole else gradient[rows], M, bend[:, None])
    A = problem.curvature if whole else problem.curvature[rows][:, rows]
    factor, info = torch.linalg.cholesky_ex(A + torch.diag(bend))
    if int(info) != 0:
        return
    inverse = torch.cholesky_inverse(factor)
    unit = M / norm[group][:, None]
    mixed = inverse * (unit @ unit.T)
    if len(active) < len(rows):
        sums = mixed.new_zeros(len(active), len(rows)).index_add_(0, group, mixed)
        mixed = mixed.new_zeros(len(active), len(active)).index_add_(1, group, sums)
    radial = _group_sums((inverse @ slope) * unit, group, len(active))
    system = torch.diag(norm / (threshold * (1 - DAMPING))) - mixed
    weights = torch.linalg.solve_ex(system, radial).result
    move = -(inverse @ torch.addcmul(slope, unit, weights[group][:, None]))
    bent = (problem.curvature if whole else problem.curvature[:, rows]) @ move
    length = _search(M, move, slope, bent if whole else bent[rows], norm, threshold, group)
    if length > 0:
        if whole:
            N.add_(move, alpha=length)
        else:
            N.index_add_(0, rows, move, alpha=length)
        gradient.add_(bent, alpha=length)


def _group_sums(
    products: Tensor,  # [rows, outputs]
    group: Tensor,  # [rows]
    groups: int,
) -> Tensor:  # [groups]
    return products.new_zeros(groups).index_add_(0, group, products.sum(1))


def _search(
    M: Tensor,  # [rows, outputs]
    move: Tensor,  # [rows, outputs]
    slope: Tensor,  # of the objective at M, [rows, outputs]
    bent: Tensor,  # A move, [rows, outputs]
    norm: Tensor,  # [groups]
    threshold: Tensor,  # [groups]
    group: Tensor,  # [rows]
) -> float:
    """Return the best of the step lengths 1, 1/2, 1/4, ..., or 0 where none descends."""
    across = _group_sums(M * move, group, len(norm))
    square = _group_sums(move * move, group, len(norm))
    t = STEPS[:, None]
    reached = (norm.square() + 2 * t * across + t * t * square).clamp(min=0).sqrt()
    # |M + t move| - |M| - t <u, move>, whose linear part is in the slope.
    grown = t * (2 * across + t * square) / (reached + norm) - t * across / norm
    change = STEPS * (slope * move).sum() + STEPS.square() * (bent * move).sum() / 2 + grown @ threshold
    best = int(change.nan_to_num(torch.inf).argmin())
    return float(STEPS[best]) if change[best] < 0 else 0.0
