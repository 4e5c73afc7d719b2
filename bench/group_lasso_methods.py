"""Ways to solve a group lasso on the CPU, from the same warm starts: why `bcd` takes Newton steps.

python bench/group_lasso_methods.py [--threads 1] [--json bench/results/group_lasso_methods.json]

Points of a path of 20 penalties, each from the solution before it, to a relative gap of 1e-2 and 1e-6.
`newton` is what `bcd` does, sweeps in turn with Newton steps; `sweeps` is block coordinate descent alone;
`anderson` extrapolates it from every five sweeps (Anderson acceleration, kept where the objective falls), its
time being that of as many plain sweeps, as if extrapolating were free; `fista` has momentum and restarts.
All run on the prepared problem: none of the times has checks or certificates in it.
LRCOMPRESS_DATA adds layers of ResNet20.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import arguments, publish
from group_lasso import real, synthetic
from group_lasso_peers import Problem
from torch import Tensor

from lrcompress import _C
from lrcompress.ops import _groups
from lrcompress.ops._descent import descend
from lrcompress.ops._fista import fista
from lrcompress.ops._second_moments import moments

POINTS = (2, 5, 9, 14)  # penalties solved before
TARGETS = (1e-2, 1e-6)
MOST = 1000  # sweeps, or iterations
DEPTH = 5  # sweeps that are extrapolated from
WARM_TOL = 1e-7
Start = tuple[_groups.Problem, Tensor, Tensor, Tensor]  # the problem, thresholds, N, its gradient


def sweeps(start: Start, tol: float, most: int) -> tuple[bool, int]:
    """Run block coordinate descent alone; N and its gradient are overwritten."""
    problem, threshold, N, gradient = start
    objective, gap, count, _ = _C.group_lasso(
        problem.curvature,
        problem.linear,
        problem.weight,
        problem.starts,
        threshold,
        problem.energy,
        tol,
        most,
        float("inf"),
        N,
        gradient,
        torch.get_num_threads(),
    )
    return gap <= tol * objective, count


def objective_of(start: Start, N: Tensor, gradient: Tensor) -> float:
    """Return the objective up to the constant."""
    problem, threshold, _, _ = start
    return float(((gradient - problem.linear) * N).sum() / 2 + (threshold * problem.norms(N)).sum())


def anderson(start: Start, tol: float) -> tuple[bool, int]:
    """Extrapolate sweeps from every DEPTH of them; return how many there were."""
    problem, _, N, gradient = start
    total = 0
    while total < MOST:
        iterates = [N.clone()]
        for _ in range(DEPTH):
            done, count = sweeps(start, tol, 1)
            total += count
            if done:
                return True, total
            iterates.append(N.clone())
        moves = torch.stack([(b - a).flatten() for a, b in pairwise(iterates)])
        weights, failed = torch.linalg.solve_ex(moves @ moves.T, moves.new_ones(DEPTH))
        if int(failed) or not weights.isfinite().all():
            continue
        weights = weights / weights.sum()
        mixed = torch.einsum("k,kro->ro", weights, torch.stack(iterates[1:]))
        mixed_gradient = problem.curvature @ mixed - problem.linear
        if objective_of(start, mixed, mixed_gradient) < objective_of(start, N, gradient):
            N.copy_(mixed)
            gradient.copy_(mixed_gradient)
    return False, total


def timed(run: Callable[[Start], tuple[bool, int]], start: Start) -> tuple[float | None, int]:
    """Return the seconds, None where it did not get there, and the iterations, from a copy of the start."""
    problem, threshold, N, gradient = start
    copy = (problem, threshold, N.clone(), gradient.clone())
    begin = time.perf_counter()
    done, count = run(copy)
    seconds = time.perf_counter() - begin
    return seconds if done else None, count


def compare(given: Problem) -> list[dict[str, Any]]:
    """Return a row a target and a point."""
    checked = moments(given.R, given.weight, None)
    problem = _groups.make_problem(checked, _groups.group_ids(given.groups, len(given.R)))
    lipschitz = float(torch.linalg.eigvalsh(problem.curvature)[-1])
    N = torch.zeros_like(problem.linear)
    gradient = -problem.linear
    rows = []
    for k, penalty in enumerate(given.penalties):
        threshold = torch.full((len(problem.kept),), penalty, dtype=torch.float64)
        start = (problem, threshold, N.clone(), gradient.clone())
        descend(problem, threshold, WARM_TOL, MOST, N, gradient)
        if k not in POINTS:
            continue
        active = float((problem.norms(N) > 0).double().mean())
        for tol in TARGETS:
            rows.append(
                {"problem": given.name, "penalty": k + 1, "active": active, "gap": f"{tol:.0e}"}
                | methods(start, tol, lipschitz)
            )
    return rows


def methods(start: Start, tol: float, lipschitz: float) -> dict[str, Any]:
    """Return milliseconds and iterations of each way."""

    def newton(copy: Start) -> tuple[bool, int]:
        problem, threshold, N, gradient = copy
        count = descend(problem, threshold, tol, MOST, N, gradient)
        return sweeps(copy, tol, 0)[0], count

    def accelerated(copy: Start) -> tuple[bool, int]:
        problem, threshold, N, _ = copy
        count = int(fista(problem, threshold[None], tol, MOST, lipschitz, N)[1])
        return count < MOST, count

    def shown(seconds: float | None, count: int) -> str:
        return f"{seconds * 1e3:.3g} ({count})" if seconds is not None else f"over {MOST}"

    plain, plain_count = timed(lambda copy: sweeps(copy, tol, MOST), start)
    begin = time.perf_counter()
    a_few = sweeps((start[0], start[1], start[2].clone(), start[3].clone()), 1e-15, 2 * DEPTH)[1]
    a_sweep = (time.perf_counter() - begin) / max(a_few, 1)
    extrapolated, extrapolated_count = timed(lambda copy: anderson(copy, tol), start)
    if extrapolated is not None:
        extrapolated = extrapolated_count * a_sweep
    return {
        "newton, ms": shown(*timed(newton, start)),
        "sweeps, ms": shown(plain, plain_count),
        "anderson, ms": shown(extrapolated, extrapolated_count),
        "fista, ms": shown(*timed(accelerated, start)),
    }


def main() -> None:
    """Compare on every problem."""
    args = arguments(__doc__ or "", repeats=1)
    problems = [synthetic(64, 64, 1), synthetic(64, 64, 9)]
    if "LRCOMPRESS_DATA" in os.environ:
        problems += real(Path(os.environ["LRCOMPRESS_DATA"]))[:2]
    rows = [row for given in problems for row in compare(given)]
    publish("Ways to solve a group lasso: milliseconds (iterations)", args, rows)


if __name__ == "__main__":
    main()
