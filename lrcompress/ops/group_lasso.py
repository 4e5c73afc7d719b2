"""Group lasso on second moments, each answer with its certificate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from lrcompress import _C
from lrcompress.ops._descent import descend
from lrcompress.ops._fista import duality_gap, fista
from lrcompress.ops._groups import Groups, Partition, Problem, make_problem, partition
from lrcompress.ops._second_moments import Moments, checked_norm, moments

Method = Literal["auto", "bcd", "fista"]
Target = tuple[Tensor, float | Tensor]  # E[y x^T] [out, in] and E|y|^2
METHODS = ("auto", "bcd", "fista")
# Of the tolerance, what the solvers aim at: the certificate is rounded differently.
AIM = 0.9
CERTIFIED_AT_ONCE = 2**22  # entries of M


@dataclass(frozen=True)
class GroupLasso:
    """A solution and what is proved of it: no M has an objective below ``objective - duality_gap``."""

    solution: Tensor  # M, float64 [out, in]
    penalty: float
    objective: float
    duality_gap: float
    kkt_residual: float  # the largest distance of a group from its optimality condition
    iterations: int  # FISTA: steps. BCD: sweeps over the working set, and Newton steps
    converged: bool  # duality_gap <= tol * objective


@overload
def group_lasso(
    R: Tensor,
    weight: Tensor | None,
    penalty: float,
    groups: Groups = None,
    method: Method = "auto",
    tol: float = 1e-6,
    max_iter: int = 10_000,
    target: Target | None = None,
    initial: Tensor | None = None,
    group_weights: Tensor | None = None,
) -> GroupLasso: ...


@overload
def group_lasso(
    R: Tensor,
    weight: Tensor | None,
    penalty: Sequence[float],
    groups: Groups = None,
    method: Method = "auto",
    tol: float = 1e-6,
    max_iter: int = 10_000,
    target: Target | None = None,
    initial: Tensor | None = None,
    group_weights: Tensor | None = None,
) -> list[GroupLasso]: ...


def group_lasso(
    R: Tensor,  # E[x x^T], [in, in], symmetric and positive semi-definite
    weight: Tensor | None,  # [out, in], or None with a target
    penalty: float | Sequence[float],
    groups: Groups = None,
    method: Method = "auto",
    tol: float = 1e-6,
    max_iter: int = 10_000,
    target: Target | None = None,
    initial: Tensor | None = None,  # [out, in]
    group_weights: Tensor | None = None,  # [groups], > 0
) -> GroupLasso | list[GroupLasso]:
    """Minimise ``1/2 tr((W - M) R (W - M)^T) + penalty sum_g group_weights[g] ||M_g||_F`` over M.

    ``groups`` is None (every column), the number of consecutive columns of each group (a convolution's
    kernel area), the group of each column (weighted in the order of their numbers), or lists of columns.
    ``target`` = (E[y x^T], E|y|^2) replaces the first term by ``1/2 E|y - M x|^2``. A sequence of penalties
    is a path: each is solved from the solution of the next larger one, and answers come in the order given.

    Everything is float64 and stays on R's device. ``tol`` bounds the duality gap relative to the objective;
    gap and KKT residual are computed anew from the solution that is returned, in the caller's coordinates.
    Check ``converged``: where ``max_iter`` or the limits of rounding are reached first, what was found till
    then is returned. Eigenvalues of R that are negative within the rounding of its dtype are taken as they
    are. Columns with R_jj = 0 are zero in M; with penalty 0, M is otherwise the weight, or the least-squares
    solution.

    ``bcd``, on the CPU alone, is block coordinate descent over an active set with Anderson acceleration, in
    turn with Newton steps on the support, each an inverse of the support's size. ``fista`` needs one product
    M R an iteration, and solves a path's penalties together on a GPU. ``auto`` is ``bcd`` on the CPU, where
    no share of active groups was found at which ``fista`` is faster, and ``fista`` elsewhere.

    Raises:
        ValueError: a shape, value or device is not as annotated, the groups are no partition, R is not
            symmetric or has a negative eigenvalue, beyond rounding, or the largest entry of R, the weight,
            the target or the start is beyond 1e-75 to 1e75.
    Source: Robin and Jain, Linear Neural Reconstruction; Beck and Teboulle (2009); Qin, Scheinberg and
        Goldfarb (2013); Bertrand and Massias (2021); Yang and Hastie (2024).
    """
    given = moments(R, weight, target)
    parts = partition(groups, R.shape[0], R.device)
    penalties = _checked_penalties([penalty] if isinstance(penalty, float | int) else penalty)
    _check_controls(method, tol, max_iter, R.device)
    _check_initial(initial, given)
    scales = _checked_group_weights(group_weights, parts)
    path = _solve(given, parts, scales, penalties, method, tol, max_iter, initial)
    return path[0] if isinstance(penalty, float | int) else path


def penalty_max(
    R: Tensor,  # [in, in]
    weight: Tensor | None,  # [out, in], or None with a target
    groups: Groups = None,
    target: Target | None = None,
    group_weights: Tensor | None = None,  # [groups], > 0
) -> float:
    """Return the least penalty at which ``group_lasso`` is zero: ``max_g ||(W R)_g||_F / group_weights[g]``.

    Raises:
        ValueError: as ``group_lasso``.
    """
    given = moments(R, weight, target)
    parts = partition(groups, R.shape[0], R.device)
    scales = _checked_group_weights(group_weights, parts)
    return float((_column_norms(given.cross, parts.ids, len(scales)) / scales).max()) if len(scales) else 0.0


def _solve(
    given: Moments,
    parts: Partition,
    scales: Tensor,  # [groups]
    penalties: list[float],
    method: Method,
    tol: float,
    max_iter: int,
    initial: Tensor | None,
) -> list[GroupLasso]:
    """Solve the positive penalties from the largest down, and certify each."""
    found: dict[int, GroupLasso] = {}
    order = sorted(range(len(penalties)), key=lambda i: -penalties[i])
    positive = [i for i in order if penalties[i] > 0]
    if positive:
        problem = make_problem(given, parts)
        values = torch.tensor([penalties[i] for i in positive], dtype=torch.float64, device=scales.device)
        all_thresholds = torch.outer(values, scales)
        kept_all = len(problem.kept) == len(scales)
        thresholds = all_thresholds if kept_all else all_thresholds[:, problem.kept]
        start = None if initial is None else problem.into(initial.resolve_neg().to(given.R)).clone()
        if len(problem.kept) == 0:
            solved = [(problem.linear, 0)] * len(positive)
        elif method == "fista" or (method == "auto" and given.R.device.type != "cpu"):
            solved = _by_fista(problem, thresholds, AIM * tol, max_iter, start)
        else:
            solved = _by_descent(problem, thresholds, AIM * tol, max_iter, start)
        answers = [(problem.out_of(N, given.cross.shape), iterations) for N, iterations in solved]
        certified = certify(given, parts.ids, all_thresholds, [penalties[i] for i in positive], answers, tol)
        found = dict(zip(positive, certified, strict=True))
    for i in order[len(positive) :]:
        found[i] = _unpenalised(given, tol)
    return [found[i] for i in range(len(penalties))]


def _by_descent(
    problem: Problem,
    thresholds: Tensor,  # [penalties, groups]
    tol: float,
    max_iter: int,
    start: Tensor | None,  # [rows, outputs]
) -> list[tuple[Tensor, int]]:
    """Walk down the path, each solution the next one's start."""
    N = torch.zeros_like(problem.linear) if start is None else start
    gradient = -problem.linear if start is None else problem.curvature @ N - problem.linear
    path: list[tuple[Tensor, int]] = []
    for threshold in thresholds:
        N = path[-1][0].clone() if path else N
        path.append((N, descend(problem, threshold, tol, max_iter, N, gradient)))
    return path


def _by_fista(
    problem: Problem,
    thresholds: Tensor,  # [penalties, groups]
    tol: float,
    max_iter: int,
    start: Tensor | None,  # [rows, outputs]
) -> list[tuple[Tensor, int]]:
    """Walk down the path on the CPU; elsewhere solve all at once, for warm starts save little."""
    lipschitz = float(torch.linalg.eigvalsh(problem.curvature)[-1])
    N = torch.zeros_like(problem.linear) if start is None else start
    at_once = 1 if N.device.type == "cpu" else len(thresholds)
    path: list[tuple[Tensor, int]] = []
    for some in thresholds.split(at_once):
        together, counts = fista(problem, some, tol, max_iter, lipschitz, N)
        N = together[-1]
        path += zip(together, counts.tolist(), strict=True)
    return path


def certify(
    given: Moments,
    ids: Tensor,  # int64 [in]
    thresholds: Tensor,  # [penalties, groups], > 0
    penalties: list[float],  # > 0
    answers: list[tuple[Tensor, int]],  # of each penalty: M [out, in], iterations
    tol: float,
) -> list[GroupLasso]:
    """Compute the objective, the duality gap and the KKT residual of each M from the definitions."""
    certified = []
    at_once = max(1, CERTIFIED_AT_ONCE // max(1, given.cross.numel()))
    for begin in range(0, len(answers), at_once):
        some = slice(begin, begin + at_once)
        stacked = torch.stack([M for M, _ in answers[some]]) if len(answers) > 1 else answers[0][0][None]
        table = _certificates(given, ids, thresholds[some], stacked).tolist()
        for penalty, (M, iterations), numbers in zip(penalties[some], answers[some], table, strict=True):
            objective, gap, off = numbers
            certified.append(GroupLasso(M, penalty, objective, gap, off, iterations, gap <= tol * objective))
    return certified


def _certificates(
    given: Moments,
    ids: Tensor,  # int64 [in]
    thresholds: Tensor,  # [penalties, groups], > 0
    M: Tensor,  # [penalties, out, in]
) -> Tensor:  # [penalties, 3]: objective, duality gap, KKT residual
    gradient = given.gradient(M)
    if M.device.type != "cpu":
        return _composed_certificates(given, ids, thresholds, M, gradient)
    found = gradient.new_empty(len(M), 3)
    target, is_weight = (given.cross, False) if given.weight is None else (given.weight, True)
    _C.group_lasso_certificate(
        M,
        gradient,
        target.contiguous(),
        is_weight,
        given.energy,
        ids,
        thresholds,
        found,
        torch.get_num_threads(),
    )
    return found


def _composed_certificates(
    given: Moments,
    ids: Tensor,  # int64 [in]
    thresholds: Tensor,  # [penalties, groups], > 0
    M: Tensor,  # [penalties, out, in]
    gradient: Tensor,  # [penalties, out, in], at M
) -> Tensor:  # [penalties, 3]: objective, duality gap, KKT residual
    """Do the same in torch, on any device."""
    groups = thresholds.shape[1]
    residual, aligned = given.residual(M, gradient)
    norms = _column_norms(M, ids, groups)
    slopes = _column_norms(gradient, ids, groups)
    cost = (thresholds * norms).sum(1)
    objective = residual / 2 + cost
    if groups == 0:
        return torch.stack([objective, torch.zeros_like(cost), torch.zeros_like(cost)], 1)
    gap = duality_gap(residual, aligned, cost, slopes, thresholds)
    active = norms > 0
    pull = torch.where(active, thresholds / norms, 0.0)
    off = _column_norms(gradient.addcmul(M, pull[:, None, ids]), ids, groups)
    off = torch.where(active, off, (slopes - thresholds).clamp(min=0))
    return torch.stack([objective, gap, off.amax(1)], 1)


def _unpenalised(given: Moments, tol: float) -> GroupLasso:
    """Return the weight, or the least-squares solution of least norm, with the gap ``1/2 tr(G R^+ G^T)``."""
    if given.weight is not None:
        M = given.weight * (given.R.diagonal() > 0)
        inverse = torch.zeros_like(given.R)  # the gradient is zero but for dead columns, where it is rounding
    else:
        inverse = torch.linalg.pinv(given.R, hermitian=True)
        M = given.cross @ inverse
    gradient = given.gradient(M)
    objective = float(given.residual(M, gradient)[0]) / 2
    gap = float(((gradient @ inverse) * gradient).sum()) / 2
    worst = float(gradient.norm(dim=0).max()) if gradient.numel() else 0.0
    return GroupLasso(M, 0.0, objective, gap, worst, 0, gap <= tol * objective)


def _column_norms(
    matrix: Tensor,  # [..., out, in]
    ids: Tensor,  # int64 [in]
    groups: int,
) -> Tensor:  # [..., groups]
    squares = matrix.square().sum(-2)
    return squares.new_zeros(*squares.shape[:-1], groups).index_add_(-1, ids, squares).sqrt()


def _checked_penalties(penalties: Sequence[float]) -> list[float]:
    values = [float(value) for value in penalties]
    for value in values:
        if not 0 <= value < float("inf"):
            raise ValueError(f"penalty must be at least 0 and finite, got {value}")
    return values


def _check_controls(method: str, tol: float, max_iter: int, device: torch.device) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "bcd" and device.type != "cpu":
        raise ValueError(f"method 'bcd' runs on the CPU, got R on {device}")
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}")
    if max_iter < 0:
        raise ValueError(f"max_iter must be at least 0, got {max_iter}")


def _check_initial(initial: Tensor | None, given: Moments) -> None:
    if initial is None:
        return
    if initial.shape != given.cross.shape:
        raise ValueError(
            f"initial must be [out, in] = {tuple(given.cross.shape)}, got {tuple(initial.shape)}"
        )
    checked_norm("initial", initial.detach().to(torch.float64))


def _checked_group_weights(
    group_weights: Tensor | None,  # [groups]
    parts: Partition,
) -> Tensor:  # float64 [groups]
    if group_weights is None:
        return torch.ones(parts.groups, dtype=torch.float64, device=parts.ids.device)
    if group_weights.shape != (parts.groups,):
        raise ValueError(
            f"group_weights must be [groups] = {(parts.groups,)}, got shape {tuple(group_weights.shape)}"
        )
    scales = group_weights.detach().to(parts.ids.device, torch.float64)
    if not (scales.isfinite() & (scales > 0)).all():
        raise ValueError(
            f"group_weights must be positive and finite, got {float(scales.min()):g} as the least"
        )
    return scales
