"""Group lasso: closed forms, optimality computed independently, both methods, and bad arguments."""

import importlib

import pytest
import torch
from torch import Tensor

from lrcompress import ops
from lrcompress.ops import reference
from lrcompress.ops._fista import fista
from lrcompress.ops._groups import make_problem, partition
from lrcompress.ops._second_moments import Moments

group_lasso = importlib.import_module("lrcompress.ops.group_lasso")  # ops names the function so
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
METHODS = ["bcd", "fista"]
TOL = 1e-8
# Outputs, channels, kernel area: 0, 1, primes, more outputs than inputs, and around the vectors (4, 8, 16,
# 24, 32 outputs) and the rows (1, 2, 3 at a time) of the native gradient.
SHAPES = [
    *((out, channels, 1) for out in (1, 3, 4, 8, 31, 33) for channels in (1, 7)),
    *((16, channels, area) for channels in (1, 5) for area in (2, 3, 4, 9)),
    (24, 13, 2),
    (40, 6, 5),
    (29, 6, 1),
]


def moments(inputs: int, outputs: int, rank: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Second moments of correlated features of different scales behind a ReLU, and a weight."""
    random = torch.Generator().manual_seed(1000 * seed + 31 * inputs + outputs)
    count = 4 * inputs + 8 if rank is None else rank
    hidden = torch.randn(count, inputs, generator=random, dtype=torch.float64)
    hidden += hidden.roll(1, 1) + 0.5
    x = torch.relu(hidden) * torch.rand(inputs, generator=random, dtype=torch.float64).add(0.05)
    weight = torch.randn(outputs, inputs, generator=random, dtype=torch.float64)
    return x.T @ x / count, weight


def assert_certified(R: Tensor, W: Tensor, ids: Tensor, answer: ops.GroupLasso, tol: float = TOL) -> None:
    """Check the answer's claims from the definitions, group by group."""
    M, penalty = answer.solution, answer.penalty
    error = W - M
    gradient = -error @ R
    objective = 0.5 * torch.trace(error @ R @ error.T)
    residual, scale = 0.0, 1.0
    for g in ids.unique().tolist():
        norm, slope = M[:, ids == g].norm(), gradient[:, ids == g]
        objective = objective + penalty * norm
        if norm > 0:
            residual = max(residual, float((slope + penalty * M[:, ids == g] / norm).norm()))
        else:
            residual = max(residual, float(slope.norm()) - penalty)
        scale = min(scale, float(penalty / slope.norm().clamp(min=1e-300)))
    # The dual value of scale (W - M) T, with R = T T^T; weak duality needs no more than its feasibility.
    dual = scale * torch.trace(error @ R @ W.T) - scale**2 / 2 * torch.trace(error @ R @ error.T)
    rounding = 1e-12 * float(torch.trace(W @ R @ W.T))
    assert abs(answer.objective - float(objective)) <= rounding
    assert abs(answer.kkt_residual - residual) <= 1e-12 * float((W @ R).norm())
    assert answer.duality_gap <= float(objective - dual) + rounding
    assert answer.converged == (answer.duality_gap <= tol * answer.objective)
    assert answer.converged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_solved_to_its_certificate(shape: tuple[int, int, int], method: str) -> None:
    outputs, channels, area = shape
    R, W = moments(channels * area, outputs)
    ids = torch.arange(channels).repeat_interleave(area)
    top = ops.penalty_max(R, W, area)
    for answer in ops.group_lasso(R, W, [top * share for share in (0.7, 0.2, 0.02)], area, method, TOL):
        assert_certified(R, W, ids, answer)
        zero = answer.solution.norm(dim=0) == 0
        assert torch.equal(zero.unflatten(0, (-1, area)).all(1), zero.unflatten(0, (-1, area)).any(1))


def test_agrees_with_the_reference() -> None:
    R, W = moments(12, 5)
    ids = torch.arange(4).repeat_interleave(3)
    penalty = 0.3 * ops.penalty_max(R, W, 3)
    exact = reference.group_lasso(R, W, penalty, ids, 20_000)
    for method in METHODS:
        found = ops.group_lasso(R, W, penalty, 3, method, 1e-12)
        torch.testing.assert_close(found.solution, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_methods_agree_on_a_badly_conditioned_path(device: str) -> None:
    R, W = moments(54, 16, rank=60)
    penalties = [ops.penalty_max(R, W, 9) * share for share in torch.logspace(0, -3, 6).tolist()]
    descended = ops.group_lasso(R, W, penalties, 9, "bcd", TOL)
    accelerated = ops.group_lasso(R.to(device), W.to(device), penalties, 9, "fista", TOL, max_iter=100_000)
    for one, other in zip(descended, accelerated, strict=True):
        assert one.converged
        assert other.converged
        assert abs(one.objective - other.objective) <= TOL * (one.objective + other.objective)


@pytest.mark.parametrize("method", METHODS)
def test_closed_forms(method: str) -> None:
    R, W = moments(10, 6)
    top = ops.penalty_max(R, W)
    assert not ops.group_lasso(R, W, top, method=method).solution.any()
    assert ops.group_lasso(R, W, top * 0.99, method=method).solution.any()
    free = ops.group_lasso(R, W, 0.0, method=method)
    assert torch.equal(free.solution, W)
    assert free.converged
    assert free.duality_gap == 0
    c, penalty = 0.7, 1.1
    found = ops.group_lasso(c * torch.eye(10), W, penalty, method=method, tol=1e-12)
    shrunk = W * (1 - penalty / (c * W.norm(dim=0))).clamp(min=0)
    # R is float32: c is 0.7 up to its rounding.
    torch.testing.assert_close(found.solution, shrunk, rtol=1e-5, atol=1e-6)
    blocks = ops.group_lasso(torch.eye(10).double(), W, 2.0, 5, method, 1e-12).solution
    norms = W.unflatten(1, (2, 5)).square().sum((0, 2)).sqrt().repeat_interleave(5)
    torch.testing.assert_close(blocks, W * (1 - 2.0 / norms).clamp(min=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_dead_channels_are_removed_and_change_nothing(method: str) -> None:
    R, W = moments(12, 5)
    dead = torch.tensor([0, 4, 5, 9, 10, 11])  # a whole group of 3, and parts of others
    R[dead] = 0
    R[:, dead] = 0
    penalty = 0.05 * ops.penalty_max(R, W, 3)
    found = ops.group_lasso(R, W, penalty, 3, method, TOL)
    assert_certified(R, W, torch.arange(12) // 3, found)
    assert not found.solution[:, dead].any()
    alive = [i for i in range(12) if i not in dead]
    ids = (torch.tensor(alive) // 3).tolist()
    alone = ops.group_lasso(R[alive][:, alive], W[:, alive], penalty, ids, method, TOL)
    torch.testing.assert_close(found.solution[:, alive], alone.solution, rtol=0, atol=1e-12)
    assert not ops.group_lasso(R, W, 0.0, 3, method).solution[:, dead].any()
    nothing = ops.group_lasso(torch.zeros(12, 12), W, 1.0, 3, method)
    assert nothing.converged
    assert not nothing.solution.any()


@pytest.mark.parametrize("method", METHODS)
def test_wide_scales_and_rank_deficiency(method: str) -> None:
    R, W = moments(18, 7, rank=6)
    scale = 10.0 ** torch.linspace(-4, 4, 18, dtype=torch.float64)
    for matrix, weight in ((R, W), (R * scale * scale[:, None], W / scale), (1e-30 * R, W), (1e30 * R, W)):
        penalty = 0.1 * ops.penalty_max(matrix, weight, 3)
        found = ops.group_lasso(matrix, weight, penalty, 3, method, 1e-6, max_iter=100_000)
        assert_certified(matrix, weight, torch.arange(18) // 3, found, 1e-6)


@pytest.mark.parametrize("share", [1e-6, 1e-9])
def test_tiny_penalties_do_not_drown_in_rounding(share: float) -> None:
    R, W = moments(12, 5)
    found = ops.group_lasso(R, W, share * ops.penalty_max(R, W, 3), 3, max_iter=1000)
    assert_certified(R, W, torch.arange(12) // 3, found, 1e-6)


def test_target_is_the_same_problem_and_least_squares_at_zero() -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(40, 9, generator=random, dtype=torch.float64)
    y = torch.randn(40, 4, generator=random, dtype=torch.float64) + x[:, :4]
    R, cross, energy = x.T @ x / 40, y.T @ x / 40, y.square().sum() / 40
    fitted = torch.linalg.lstsq(x, y).solution.T
    free = ops.group_lasso(R, None, 0.0, target=(cross, energy))
    torch.testing.assert_close(free.solution, fitted)
    assert free.converged
    torch.testing.assert_close(free.objective, float((y - x @ fitted.T).square().sum() / 80))
    penalty = 0.2 * ops.penalty_max(R, None, target=(cross, energy))
    for method in METHODS:
        found = ops.group_lasso(R, None, penalty, method=method, tol=1e-10, target=(cross, energy))
        assert found.converged
        M = found.solution
        objective = (y - x @ M.T).square().sum() / 80 + penalty * M.norm(dim=0).sum()
        torch.testing.assert_close(found.objective, float(objective))
        # The error beyond the best fit is that of the weight form.
        same = ops.group_lasso(R, fitted, penalty, method=method, tol=1e-10)
        torch.testing.assert_close(M, same.solution, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (16, 7, 3)])
def test_certificates_on_both_devices_agree(shape: tuple[int, int, int], with_weight: bool) -> None:
    """What CUDA tensors get, run here: library calls instead of the native pass."""
    outputs, channels, area = shape
    R, W = moments(channels * area, outputs)
    given = Moments(R, W @ R, float((W @ R * W).sum()), W if with_weight else None)
    ids = torch.arange(channels).repeat_interleave(area)
    thresholds = torch.rand(2, channels, dtype=torch.float64) + 0.1
    M = W * torch.rand(2, 1, channels * area, dtype=torch.float64)
    M[1, :, :area] = 0
    native = group_lasso._certificates(given, ids, thresholds, M)
    composed = group_lasso._composed_certificates(given, ids, thresholds, M, given.gradient(M))
    torch.testing.assert_close(native, composed, rtol=1e-12, atol=1e-12 * given.energy)


def test_groups_in_any_form_and_order() -> None:
    R, W = moments(12, 5)
    penalty = 0.2 * ops.penalty_max(R, W, 3)
    plain = ops.group_lasso(R, W, penalty, 3, tol=1e-10).solution
    lists = [[6, 7, 8], [0, 2, 1], [11, 10, 9], [3, 4, 5]]
    ids = torch.arange(12) // 3
    for groups in (ids, ids.tolist(), (-5 * ids + 1).tolist(), lists):
        found = ops.group_lasso(R, W, penalty, groups, tol=1e-10).solution
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = ops.group_lasso(R[order][:, order], W[:, order], penalty, ids[order], tol=1e-10).solution
    torch.testing.assert_close(found, plain[:, order], rtol=1e-5, atol=1e-6)


def test_unequal_groups_and_group_weights() -> None:
    """A weight s on a group is the plain problem with that group's inputs divided by s."""
    R, W = moments(11, 6)
    ids = torch.tensor([0, 2, 2, 1, 1, 1, 3, 0, 3, 3, 3])
    scales = torch.tensor([0.5, 2.0, 1.0, 4.0], dtype=torch.float64)
    penalty = 0.1 * ops.penalty_max(R, W, ids, group_weights=scales)
    each = scales[ids]
    for method in METHODS:
        found = ops.group_lasso(R, W, penalty, ids, method, 1e-10, group_weights=scales)
        plain = ops.group_lasso(R / each / each[:, None], W * each, penalty, ids, method, 1e-10)
        assert found.converged
        torch.testing.assert_close(found.objective, plain.objective)
        torch.testing.assert_close(found.solution * each, plain.solution, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_path_is_its_single_solves_in_any_order(method: str) -> None:
    R, W = moments(18, 8)
    top = ops.penalty_max(R, W, 3)
    penalties = [0.1 * top, 2 * top, 0.0, 0.5 * top]
    path = ops.group_lasso(R, W, penalties, 3, method, TOL)
    assert [answer.penalty for answer in path] == penalties
    for penalty, answer in zip(penalties, path, strict=True):
        alone = ops.group_lasso(R, W, penalty, 3, method, TOL)
        assert abs(alone.objective - answer.objective) <= TOL * (alone.objective + answer.objective)
    assert ops.group_lasso(R, W, [], 3, method) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_asymmetry_is_measured_by_the_largest_entry(dtype) -> None:
    """Not by the norm of all, beside which one wrong entry of many is little."""
    allowed = 64 * torch.finfo(dtype).eps
    for share in (0.5, 1.5):
        R = torch.eye(64, dtype=dtype)
        R[3, 7] = share * allowed
        if share < 1:
            ops.group_lasso(R, torch.ones(2, 64), 0.1)
        else:
            with pytest.raises(ValueError, match=r"symmetric, got R\[3, 7\]"):
                ops.group_lasso(R, torch.ones(2, 64), 0.1)


def test_the_initial_solution_is_left_alone() -> None:
    """Where its transpose is in memory what the solver wants, too."""
    R, W = moments(1, 4)
    initial = torch.zeros_like(W)
    assert ops.group_lasso(R, W, 0.1 * ops.penalty_max(R, W), initial=initial).solution.any()
    assert not initial.any()


def test_penalties_solved_together_stop_one_by_one() -> None:
    """The batch that a GPU runs, on the CPU's twin of its kernel."""
    R, W = moments(18, 8)
    penalties = [ops.penalty_max(R, W, 3) * share for share in (1.5, 0.6, 0.2, 0.05)]
    problem = make_problem(Moments(R, W @ R, float((W @ R * W).sum()), W), partition(3, 18, R.device))
    thresholds = torch.tensor(penalties, dtype=torch.float64)[:, None].repeat(1, 6)
    lipschitz = float(torch.linalg.eigvalsh(problem.curvature)[-1])
    start = torch.zeros_like(problem.linear)
    together, counts = fista(problem, thresholds, 0.9 * TOL, 10_000, lipschitz, start)
    assert counts[0] == 0
    assert (counts.diff() > 0).all()
    for penalty, threshold, N, count in zip(penalties, thresholds, together, counts, strict=True):
        M = problem.out_of(N, W.shape)
        again = ops.group_lasso(R, W, penalty, 3, "fista", TOL, max_iter=0, initial=M)
        assert_certified(R, W, torch.arange(18) // 3, again)
        alone, steps = fista(problem, threshold[None], 0.9 * TOL, 10_000, lipschitz, start)
        assert abs(int(steps[0]) - int(count)) <= 1
        torch.testing.assert_close(alone[0], N, rtol=1e-6, atol=1e-7)
    cut, counts = fista(problem, thresholds, 0.9 * TOL, 3, lipschitz, start)
    assert counts.tolist() == [0, 3, 3, 3]
    assert not cut[0].any()


@pytest.mark.parametrize("method", METHODS)
def test_iterations_that_run_out_are_said_so(method: str) -> None:
    R, W = moments(40, 12)
    penalty = 0.01 * ops.penalty_max(R, W)
    cut = ops.group_lasso(R, W, penalty, method=method, tol=1e-12, max_iter=2)
    assert not cut.converged
    assert cut.iterations <= 2
    assert cut.duality_gap > 1e-12 * cut.objective
    assert cut.objective - cut.duality_gap <= ops.group_lasso(R, W, penalty).objective
    done = ops.group_lasso(R, W, penalty, method=method)
    again = ops.group_lasso(R, W, penalty, method=method, initial=done.solution, max_iter=0)
    assert again.converged
    assert again.iterations == 0


def test_rounding_ends_what_no_iteration_can_improve() -> None:
    R, W = moments(40, 12)
    stuck = ops.group_lasso(R, W, 0.1 * ops.penalty_max(R, W), method="bcd", tol=1e-300)
    assert stuck.duality_gap <= 1e-12 * stuck.objective
    assert stuck.iterations < 10_000


def test_threads_do_not_change_the_bits() -> None:
    R, W = moments(63, 20)
    penalty = 0.1 * ops.penalty_max(R, W, 9)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.group_lasso(R, W, penalty, 9, "bcd", max_iter=4).solution)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_single_precision_and_views() -> None:
    R, W = moments(14, 6)
    wide = torch.zeros(28, 28)
    wide[::2, ::2] = R.float()
    found = ops.group_lasso(wide[::2, ::2], W.float().T.contiguous().T, 0.1, 2, tol=TOL)
    assert found.solution.dtype == torch.float64
    assert_certified(R.float().double(), W.float().double(), torch.arange(14) // 2, found)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (9, 5)])
def test_nuclear_norm(shape: tuple[int, int], rank: int | None) -> None:
    outputs, inputs = shape
    R, W = moments(inputs, outputs, rank)
    values = torch.linalg.eigvalsh(W @ R @ W.T).clamp(min=0).sqrt()
    for penalty in (0.0, 0.3 * float(values[-1]), 1.01 * float(values[-1])):
        U, V = ops.nuclear_norm(R, W, penalty)
        exact = reference.nuclear_norm(R, W, penalty)
        # Inputs never seen are free: the outputs are what is determined.
        error = ((U @ V - exact) @ R @ (U @ V - exact).T).diagonal().sum().clamp(min=0).sqrt()
        assert error <= 1e-6 * values[-1]
        significant = (values > penalty) & (values > 1e-7 * values[-1])
        assert U.shape[1] == int(significant.sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R": torch.zeros(3, 4)}, r"R must be a square .* got torch.float32 of shape \(3, 4\)"),
        ({"weight": torch.zeros(2, 5)}, r"in = 4 as in R, got torch.float32 of shape \(2, 5\)"),
        ({"R": torch.eye(4).index_fill(0, torch.tensor([1]), torch.nan)}, r"R must be finite"),
        ({"R": torch.diag(torch.tensor([1.0, torch.inf, 1, 1]))}, r"R must be finite"),
        ({"weight": torch.full((2, 4), torch.inf)}, r"weight must be finite"),
        ({"R": torch.eye(4).double() * 1e160}, r"largest entry of R must lie .*, got 1e\+160"),
        ({"R": torch.eye(4).double() * 1e-300}, r"largest entry of R must lie .*, got 1e-300"),
        (
            {"weight": 1e155 * torch.ones(2, 4).double()},
            r"largest entry of weight .*, got 1e\+155",
        ),
        (
            {"weight": 1e-155 * torch.ones(2, 4).double()},
            r"largest entry of weight .*, got 1e-155",
        ),
        (
            {"initial": 1e308 * torch.ones(2, 4).double()},
            r"largest entry of initial .*, got 1e\+308",
        ),
        ({"R": torch.eye(4) + torch.eye(4).roll(1, 0).triu()}, r"symmetric, got R\[0, 3\] = 1 .* = 0"),
        ({"R": torch.diag(torch.tensor([1.0, -0.5, 2.0, 3.0]))}, r"eigenvalue -0.5 beside the largest 3"),
        ({"penalty": -1.0}, r"penalty must be at least 0 and finite, got -1.0"),
        ({"penalty": [1.0, float("nan")]}, r"penalty .* got nan"),
        ({"groups": 3}, r"groups of 3 columns do not divide the 4 columns"),
        ({"groups": [0, 0, 1]}, r"each of the 4 columns, got 3"),
        ({"groups": [[0, 1], [1, 2, 3]]}, r"column 1 is in groups 0 and 1"),
        ({"groups": [[0, 1], [3]]}, r"column 2 is in no group"),
        ({"groups": [[0, 1, 2], [3, 4]]}, r"groups\[1\] holds column 4, but columns are 0 to 3"),
        ({"groups": [[0, 1, 2, 3], []]}, r"groups\[1\] is empty"),
        ({"method": "ista"}, r"method must be one of .* got 'ista'"),
        ({"tol": 0.0}, r"tol must lie between 0 and 1, got 0.0"),
        ({"max_iter": -1}, r"max_iter must be at least 0, got -1"),
        ({"initial": torch.zeros(4, 2)}, r"initial must be \[out, in\] = \(2, 4\), got \(4, 2\)"),
        ({"initial": torch.full((2, 4), torch.nan)}, r"initial must be finite"),
        ({"group_weights": torch.ones(3)}, r"group_weights must be \[groups\] = \(4,\), got shape \(3,\)"),
        ({"group_weights": torch.tensor([1.0, 1, 0, 1])}, r"group_weights must be positive .* got 0"),
        ({"weight": None}, r"give a weight or a target, got neither"),
        ({"target": (torch.zeros(2, 4), 1.0)}, r"give a weight or a target, got both"),
        ({"weight": None, "target": (torch.zeros(2, 3), 1.0)}, r"target\[0\] must .* shape \(2, 3\)"),
        ({"weight": None, "target": (torch.full((2, 4), torch.nan), 1.0)}, r"target\[0\] must be finite"),
        ({"weight": None, "target": (torch.zeros(2, 4), -1.0)}, r"target\[1\], .* at least 0 .* got -1.0"),
    ],
)
def test_bad_arguments_say_what_is_wrong(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"R": torch.eye(4), "weight": torch.ones(2, 4), "penalty": 0.1}
    with pytest.raises(ValueError, match=message):
        ops.group_lasso(**(arguments | change))
