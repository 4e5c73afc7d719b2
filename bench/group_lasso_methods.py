"""Ways to solve a group lasso on the CPU, from the same warm starts: what each part of `bcd` is worth.

python bench/group_lasso_methods.py [--threads 1] [--json bench/results/group_lasso_methods.json]

Points of a path of 20 penalties, each from the solution before it, to a relative gap of 1e-2 and 1e-6, in
milliseconds and, in brackets, iterations. `bcd` is what the op does: sweeps with Anderson acceleration in
turn with Newton steps. `no newton` leaves those out. `no anderson` has neither: calls of as many sweeps as
are too few to extrapolate from. `fista` has momentum and restarts. All run on the prepared problem: none of
the times has checks or certificates in it.
LRCOMPRESS_DATA adds layers of ResNet20.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
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
FEW = 5  # sweeps, of which none is extrapolated
WARM_TOL = 1e-7
Start = tuple[_groups.Problem, Tensor, Tensor, Tensor]  # the problem, thresholds, N, its gradient


def sweeps(start: Start, tol: float, most: int) -> tuple[bool, int]:
    """Run sweeps alone; N and its gradient are overwritten."""
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


def plain_sweeps(start: Start, tol: float) -> tuple[bool, int]:
    """Run sweeps without extrapolation."""
    total = 0
    while total < MOST:
        done, count = sweeps(start, tol, FEW)
        total += count
        if done:
            return True, total
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
    problem = _groups.make_problem(checked, _groups.partition(given.groups, len(given.R), given.R.device))
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

    return {
        "bcd": shown(*timed(newton, start)),
        "no newton": shown(*timed(lambda copy: sweeps(copy, tol, MOST), start)),
        "no anderson": shown(*timed(lambda copy: plain_sweeps(copy, tol), start)),
        "fista": shown(*timed(accelerated, start)),
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
