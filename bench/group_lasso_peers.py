"""Other solvers of the group lasso, each in a process of its own, which can be ended."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

GRACE = 1.0  # seconds past its limit that a single penalty may take before the process is ended
LOOK_EVERY = 20  # iterations of plain FISTA between two looks at the gap


@dataclass(frozen=True)
class Problem:
    """One layer, and the penalties to solve it for."""

    name: str
    R: Tensor  # float64 [in, in]
    weight: Tensor  # float64 [out, in]
    groups: int  # columns of each
    penalties: list[float]  # falling

    @cached_property
    def rows(self) -> Tensor:  # [in, in]
        """A root of R, R = rows^T rows, for solvers that want rows."""
        values, vectors = torch.linalg.eigh(self.R)
        return values.clamp(min=0).sqrt()[:, None] * vectors.T

    @cached_property
    def X(self) -> Any:
        """The rows as NumPy has them."""
        return np.asfortranarray(self.rows.numpy())

    @cached_property
    def Y(self) -> Any:
        """The rows' targets."""
        return np.asfortranarray((self.rows @ self.weight.T).numpy())

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


# A tolerance of its own and a limit in seconds -> seconds and M, penalty by penalty.
Solve = Callable[[float, float], Iterator[tuple[float, Tensor]]]


def clocked(solve: Callable[[float], Iterator[Tensor]]) -> Solve:
    """Time each solution of a solver that gives them one after the other."""

    def timed(tol: float, limit: float) -> Iterator[tuple[float, Tensor]]:
        del limit
        solutions = solve(tol)
        while True:
            start = time.perf_counter()
            M = next(solutions, None)
            if M is None:
                return
            yield time.perf_counter() - start, M

    return timed


def by_plain_fista(problem: Problem) -> Solve:
    """FISTA as in the paper, without restart: one torch product an iteration."""

    def solve(tol: float) -> Iterator[Tensor]:
        R, W, M = problem.R, problem.weight, torch.zeros_like(problem.weight)
        lipschitz = torch.linalg.eigvalsh(R)[-1]
        for penalty in problem.penalties:
            previous, n = M, 0
            while n % LOOK_EVERY or problem.gap(M, penalty) > tol:
                n += 1
                point = M + (n - 1) / (n + 2) * (M - previous)
                step = point - (point - W) @ R / lipschitz
                factor = (1 - penalty / lipschitz / problem.norms(step).clamp(min=1e-300)).clamp(min=0)
                previous, M = M, step * factor.repeat_interleave(problem.groups)
            yield M

    return clocked(solve)


def by_sklearn(problem: Problem) -> Solve:
    """Warm-started fits on the rows."""
    estimator = importlib.import_module("sklearn.linear_model").MultiTaskLasso
    X, Y = problem.X, problem.Y

    def solve(tol: float) -> Iterator[Tensor]:
        model = estimator(alpha=1.0, tol=tol, fit_intercept=False, warm_start=True, max_iter=100_000)
        for penalty in problem.penalties:
            model.alpha = penalty / len(X)
            model.fit(X, Y)
            yield torch.from_numpy(np.ascontiguousarray(model.coef_))

    return clocked(solve)


def by_celer(problem: Problem) -> Solve:
    """Its path, penalty by penalty: solution, residual and dual point are kept."""
    celer_mtl = importlib.import_module("celer.multitask_fast").celer_mtl
    least_working_set = 10
    X, Y = problem.X, problem.Y

    def solve(tol: float) -> Iterator[Tensor]:
        W, residual, dual = np.zeros((X.shape[1], Y.shape[1])), Y.copy("F"), np.zeros_like(Y, order="F")
        lengths = np.linalg.norm(X, axis=0)
        for penalty in problem.penalties:
            W = celer_mtl(
                X,
                Y,
                penalty / len(X),
                W.copy(),
                residual,
                dual,
                lengths,
                p0=max(int((W[:, 0] != 0).sum()), least_working_set),
                tol=tol,
                prune=True,
                max_iter=1000,
                max_epochs=50_000,
                verbose=0,
                use_accel=True,
            )[0]
            yield torch.from_numpy(np.ascontiguousarray(np.asarray(W).T))

    return clocked(solve)


def by_skglm(problem: Problem) -> Solve:
    """Working sets and Anderson acceleration."""
    MultiTaskBCD = importlib.import_module("skglm.solvers").MultiTaskBCD
    compiled = importlib.import_module("skglm.utils.jit_compilation").compiled_clone
    datafit = compiled(importlib.import_module("skglm.datafits").QuadraticMultiTask())
    penalty_type = importlib.import_module("skglm.penalties").L2_1
    X, Y = problem.X, problem.Y
    datafit.initialize(X, Y)

    def solve(tol: float) -> Iterator[Tensor]:
        # Its tolerance is absolute, on the subgradient.
        scale = problem.penalties[0] / len(X)
        coefficients, fitted = np.zeros((X.shape[1], Y.shape[1])), np.zeros_like(Y)
        for penalty in problem.penalties:
            solver = MultiTaskBCD(tol=tol * scale, fit_intercept=False, max_iter=1000, warm_start=True)
            term = compiled(penalty_type(penalty / len(X)))
            found = solver._solve(X, Y, datafit, term, coefficients.copy(), fitted.copy())[0]
            coefficients = np.asfortranarray(found)
            fitted = np.asfortranarray(X @ coefficients)
            yield torch.from_numpy(np.ascontiguousarray(coefficients.T))

    return clocked(solve)


def by_adelie(problem: Problem) -> Solve:
    """The whole path in one call, with a look at the clock after each penalty; tasks are a Kronecker
    product with the identity."""
    adelie = importlib.import_module("adelie")
    outputs = problem.Y.shape[1]
    X = adelie.matrix.kronecker_eye(problem.X, outputs)
    y = np.ascontiguousarray(problem.Y).ravel()
    starts = np.arange(0, problem.X.shape[1] * outputs, problem.groups * outputs)

    def solve(tol: float, limit: float) -> Iterator[tuple[float, Tensor]]:
        ends = [time.perf_counter()]

        def too_late(_: Any) -> bool:
            ends.append(time.perf_counter())
            return ends[-1] - ends[0] > limit

        betas = adelie.grpnet(
            X,
            adelie.glm.gaussian(y),
            groups=starts,
            penalty=np.ones(len(starts)),
            lmda_path=np.array(problem.penalties) / len(y),
            tol=tol,
            early_exit=False,
            adev_tol=1.0,
            intercept=False,
            progress_bar=False,
            exit_cond=too_late,
        ).betas.toarray()
        ends[len(betas) :] = [time.perf_counter()]  # what follows the last penalty is its own
        for (start, end), beta in zip(pairwise(ends), betas, strict=True):
            yield end - start, torch.from_numpy(np.ascontiguousarray(beta.reshape(-1, outputs).T))

    return solve


MAKERS = {  # name: maker, module, whether it knows groups of several columns
    "skglm": (by_skglm, "skglm", False),
    "celer": (by_celer, "celer", False),
    "sklearn": (by_sklearn, "sklearn", False),
    "adelie": (by_adelie, "adelie", True),
    "torch FISTA": (by_plain_fista, "torch", True),
}


class Peer:
    """One solver; ``path`` gives what it managed within a limit."""

    def __init__(self, name: str, threads: int) -> None:
        """Find out whether it is installed; its process starts when it is asked first."""
        self.name, self.threads = name, threads
        self.module, self.knows_groups = MAKERS[name][1:]
        self.stops_at_the_gap = MAKERS[name][0] is by_plain_fista  # its tolerance is what is asked of it
        self.installed = importlib.util.find_spec(self.module) is not None
        self.process: Any = None
        self.preparation = 0.0  # seconds that the rows of the last problem took to make

    def path(self, problem: Problem, tol: float, limit: float) -> list[tuple[float, Tensor]]:
        """Return seconds and M of each penalty in turn, of as many as ``limit`` allows together."""
        if self.process is None:
            self._start()
        self.connection.send((problem, tol, limit))
        self.preparation = self.connection.recv()
        found: list[tuple[float, Tensor]] = []
        while self.connection.poll(limit + GRACE):
            answer = self.connection.recv()
            if answer is None:
                return found
            found.append((answer[0], torch.from_numpy(answer[1])))
        self.stop()
        return found

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.name, self.threads, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is noticed
        R = torch.eye(3, dtype=torch.float64)
        self.connection.send((Problem("to compile it", R, R[:2] + 1, 1, [1.0, 0.5]), 1e-2, 1000.0))
        while self.connection.recv() is not None:
            pass


def serve(name: str, threads: int, connection: Connection) -> None:
    """Solve what is sent, penalty by penalty, until the limit."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    name_of_last, solve, preparation = "", None, 0.0
    while True:
        problem, tol, limit = connection.recv()
        if problem.name != name_of_last:
            name_of_last, preparation = problem.name, 0.0
            if name != "torch FISTA":
                start = time.perf_counter()
                problem.X, problem.Y  # noqa: B018
                preparation = time.perf_counter() - start
            solve = MAKERS[name][0](problem)
        connection.send(preparation)
        spent = 0.0
        for seconds, M in solve(tol, limit):
            spent += seconds
            if spent > limit:
                break
            connection.send((seconds, M.numpy()))
        connection.send(None)
