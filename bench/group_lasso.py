"""Group-lasso paths to a certified gap: ours, skglm, celer, scikit-learn, adelie and FISTA, in one run.

python bench/group_lasso.py [--threads 1] [--json bench/results/group_lasso.json]

20 penalties from penalty_max to a thousandth of it, each solver warm-started. A solver gets the loosest of
its own tolerances 1e-2, 1e-3, ... with which every answer meets the target by our float64 duality gap, and
only that run is counted. Data preparation (a square root of R for the peers that want rows) is not in their
time; ours includes all checks and certificates.
LRCOMPRESS_DATA adds layers of ResNet20 and the pixels of MNIST.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, publish
from torch import Tensor

from lrcompress import ops

TARGETS = (1e-2, 1e-4, 1e-6)
PENALTIES = torch.logspace(0, -3, 20, dtype=torch.float64).tolist()
HALF = len(PENALTIES) // 2
LADDER = [10.0**-k for k in range(2, 13)]
PATIENCE = 2.0  # seconds that a peer may take for a path before it is given up
IMAGES = 200
Solve = Callable[[float], Iterator[Tensor]]  # a peer's tolerance -> its solutions M, one a penalty


@dataclass
class Problem:
    """One layer; ``rows`` is a root of R with R = rows^T rows."""

    name: str
    R: Tensor
    weight: Tensor
    groups: int

    def __post_init__(self) -> None:
        values, vectors = torch.linalg.eigh(self.R)
        self.rows = values.clamp(min=0).sqrt()[:, None] * vectors.T
        self.X = np.asfortranarray(self.rows.numpy())
        self.Y = np.asfortranarray((self.rows @ self.weight.T).numpy())
        top = ops.penalty_max(self.R, self.weight, self.groups)
        self.penalties = [top * share for share in PENALTIES]

    def norms(self, M: Tensor) -> Tensor:
        """Norms of the groups."""
        return M.unflatten(1, (-1, self.groups)).square().sum((0, 2)).sqrt()

    def gap(self, M: Tensor, penalty: float) -> float:
        """Certify a solution: the relative duality gap, in plain torch."""
        gradient = (M - self.weight) @ self.R
        residual, aligned = ((M - self.weight) * gradient).sum(), -(gradient * self.weight).sum()
        objective = residual / 2 + penalty * self.norms(M).sum()
        scale = min(float(penalty / self.norms(gradient).max()), float(aligned / residual))
        return float((objective - scale * aligned + scale**2 * residual / 2) / objective)


def synthetic(out: int, channels: int, area: int) -> Problem:
    """Correlated features behind a ReLU, of different scales."""
    inner, count = channels * area, 4 * channels * area
    hidden = torch.randn(count, inner // 4, dtype=torch.float64) @ torch.randn(
        inner // 4, inner, dtype=torch.float64
    )
    noise = 0.3 * torch.randn(count, inner, dtype=torch.float64)
    x = F.relu((hidden / (inner // 4) ** 0.5 + noise) * 2 * torch.rand(inner, dtype=torch.float64))
    weight = torch.randn(out, inner, dtype=torch.float64) / inner**0.5
    return Problem(f"relu-like {out}x{inner}", x.T @ x / count, weight, area)


def real(folder: Path) -> list[Problem]:
    """Layers of the trained ResNet20 on CIFAR-10 images, and MNIST pixels before a random layer."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from resnet20_cifar10 import images, trained

    model = trained(folder)
    inputs: dict[str, Tensor] = {}
    for name in ("layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0]}))
    with torch.no_grad():
        model(images(folder / "cifar10_train.npz", IMAGES)[0])
    problems = []
    for name, x in inputs.items():
        patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        weight = model.get_submodule(name).weight.detach().flatten(1).double()
        problems.append(Problem(f"ResNet20 {name}", patches.T @ patches / len(patches), weight, 9))
    with np.load(folder / "mnist_t10k.npz") as file:
        pixels = torch.from_numpy(file["images"][:8000]).flatten(1).double() / 255
    weight = torch.randn(300, pixels.shape[1], dtype=torch.float64) / pixels.shape[1] ** 0.5
    return [*problems, Problem("MNIST pixels 300x784", pixels.T @ pixels / len(pixels), weight, 1)]


def by_plain_fista(problem: Problem, penalties: list[float]) -> Solve:
    """FISTA as in the paper, without restart: one torch product an iteration, and the gap every 20."""

    def solve(tol: float) -> Iterator[Tensor]:
        R, W, M = problem.R, problem.weight, torch.zeros_like(problem.weight)
        lipschitz = torch.linalg.eigvalsh(R)[-1]
        for penalty in penalties:
            previous, n = M, 0
            while True:
                if n % 20 == 0 and problem.gap(M, penalty) <= tol:
                    break
                n += 1
                point = M + (n - 1) / (n + 2) * (M - previous)
                step = point - (point - W) @ R / lipschitz
                factor = (1 - penalty / lipschitz / problem.norms(step).clamp(min=1e-300)).clamp(min=0)
                previous, M = M, step * factor.repeat_interleave(problem.groups)
                if time.perf_counter() > solve.deadline:
                    raise TimeoutError
            yield M

    solve.deadline = float("inf")
    return solve


def by_sklearn(problem: Problem, penalties: list[float]) -> Solve:
    """Warm-started fits on the rows."""
    estimator = importlib.import_module("sklearn.linear_model").MultiTaskLasso

    def solve(tol: float) -> Iterator[Tensor]:
        model = estimator(alpha=1.0, tol=tol, fit_intercept=False, warm_start=True, max_iter=100_000)
        for penalty in penalties:
            model.alpha = penalty / len(problem.X)
            model.fit(problem.X, problem.Y)
            yield torch.from_numpy(np.ascontiguousarray(model.coef_))

    return solve


def by_celer(problem: Problem, penalties: list[float]) -> Solve:
    """The whole path in one call."""
    mtl_path = importlib.import_module("celer.homotopy").mtl_path
    alphas = np.array(penalties) / len(problem.X)

    def solve(tol: float) -> Iterator[Tensor]:
        coefficients = mtl_path(problem.X, problem.Y, alphas=alphas, tol=tol, max_iter=1000)[1]
        for M in coefficients.transpose(2, 0, 1):
            yield torch.from_numpy(np.ascontiguousarray(M))

    return solve


def by_skglm(problem: Problem, penalties: list[float]) -> Solve:
    """Working sets and Anderson acceleration."""
    skglm = importlib.import_module("skglm")
    MultiTaskBCD = importlib.import_module("skglm.solvers").MultiTaskBCD
    compiled = importlib.import_module("skglm.utils.jit_compilation").compiled_clone
    datafit = compiled(importlib.import_module("skglm.datafits").QuadraticMultiTask())
    penalty_type = importlib.import_module("skglm.penalties").L2_1
    assert skglm
    datafit.initialize(problem.X, problem.Y)

    def solve(tol: float) -> Iterator[Tensor]:
        # Its tolerance is absolute, on the subgradient.
        scale = penalties[0] / len(problem.X)
        coefficients, fitted = np.zeros((problem.X.shape[1], problem.Y.shape[1])), np.zeros_like(problem.Y)
        for penalty in penalties:
            solver = MultiTaskBCD(tol=tol * scale, fit_intercept=False, max_iter=1000, warm_start=True)
            term = compiled(penalty_type(penalty / len(problem.X)))
            coefficients = np.asfortranarray(
                solver._solve(problem.X, problem.Y, datafit, term, coefficients.copy(), fitted.copy())[0]
            )
            fitted = np.asfortranarray(problem.X @ coefficients)
            yield torch.from_numpy(np.ascontiguousarray(coefficients.T))

    return solve


def by_adelie(problem: Problem, penalties: list[float]) -> Solve:
    """The whole path in one call: tasks are its Kronecker product with the identity."""
    adelie = importlib.import_module("adelie")
    outputs = problem.Y.shape[1]
    X = adelie.matrix.kronecker_eye(problem.X, outputs)
    y = np.ascontiguousarray(problem.Y).ravel()
    starts = np.arange(0, problem.X.shape[1] * outputs, problem.groups * outputs)

    def solve(tol: float) -> Iterator[Tensor]:
        state = adelie.grpnet(
            X,
            adelie.glm.gaussian(y),
            groups=starts,
            penalty=np.ones(len(starts)),
            lmda_path=np.array(penalties) / len(y),
            tol=tol,
            early_exit=False,
            adev_tol=1.0,
            intercept=False,
            progress_bar=False,
        )
        betas = state.betas.toarray().reshape(len(state.lmdas), -1, outputs)
        for beta in betas:
            yield torch.from_numpy(np.ascontiguousarray(beta.T))

    return solve


def peers(problem: Problem, penalties: list[float]) -> tuple[dict[str, Solve], list[str]]:
    """Return what can solve the problem, and what is not installed."""
    found: dict[str, Solve] = {"torch FISTA, no restart": by_plain_fista(problem, penalties)}
    missing = []
    makers = {"adelie": lambda: by_adelie(problem, penalties)}
    if problem.groups == 1:
        makers |= {
            "skglm": lambda: by_skglm(problem, penalties),
            "celer": lambda: by_celer(problem, penalties),
            "sklearn": lambda: by_sklearn(problem, penalties),
        }
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError:
            missing.append(name)
    return found, missing


def time_of(problem: Problem, solve: Solve, penalties: list[float], target: float) -> float | None:
    """Return the seconds of a path whose answers all meet the target, or None where patience ends."""
    begun = time.perf_counter()
    for tol in LADDER:
        if tol > target:
            continue
        try:
            solve.deadline = time.perf_counter() + PATIENCE  # type: ignore[attr-defined]
            solutions, seconds, start = [], 0.0, time.perf_counter()
            for M in solve(tol):
                seconds += time.perf_counter() - start
                solutions.append(M)
                if seconds > PATIENCE:
                    return None
                start = time.perf_counter()
        except TimeoutError:
            return None
        met = len(solutions) == len(penalties) and all(
            problem.gap(M, penalty) <= target for M, penalty in zip(solutions, penalties, strict=True)
        )
        if met:
            return seconds
        if time.perf_counter() - begun > 2 * PATIENCE:
            return None
    return None


def ours(problem: Problem, penalties: list[float], target: float, method: str, repeats: int) -> float:
    """Return the median seconds of a path, checks and certificates included."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        path = ops.group_lasso(problem.R, problem.weight, penalties, problem.groups, method, target)
        seconds.append(time.perf_counter() - start)
        assert all(answer.converged for answer in path)
    return sorted(seconds)[len(seconds) // 2]


def compare(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """Return a row a half of the path and a target."""
    rows = []
    for half, penalties in (("sparse", problem.penalties[:HALF]), ("whole", problem.penalties)):
        found, missing = peers(problem, penalties)
        if missing:
            print(f"not installed: {', '.join(missing)}")
        given_up: set[str] = set()
        for solve in found.values():
            list(islice(solve(1e-1), 3))  # compile
        for target in TARGETS:
            row: dict[str, Any] = {"problem": problem.name, "path": half, "gap": f"{target:.0e}"}
            row["ours"] = mine = ours(problem, penalties, target, "auto", repeats)
            times = {}
            for name in ("skglm", "celer", "sklearn", "adelie", "torch FISTA, no restart"):
                known = name in found and name not in given_up
                times[name] = time_of(problem, found[name], penalties, target) if known else None
                if name in found and times[name] is None:
                    given_up.add(name)
                row[name] = (
                    times[name] if times[name] is not None else f"> {PATIENCE:g}" if name in found else "-"
                )
            best = min((t for t in times.values() if t is not None), default=None)
            row["best peer / ours"] = best / mine if best is not None else f"> {PATIENCE / mine:.0f}"
            rows.append(row)
    return rows


def main() -> None:
    """Compare on every problem."""
    args = arguments(__doc__ or "", repeats=3)
    warnings.simplefilter("ignore")
    problems = [synthetic(64, 64, 1), synthetic(64, 64, 9), synthetic(128, 128, 9)]
    if "LRCOMPRESS_DATA" in os.environ:
        problems += real(Path(os.environ["LRCOMPRESS_DATA"]))
    else:
        print("set LRCOMPRESS_DATA to add layers of ResNet20 and MNIST pixels")
    rows = [row for problem in problems for row in compare(problem, args.repeats)]
    publish("Group-lasso paths, seconds", args, rows)


if __name__ == "__main__":
    main()
