"""Group lasso on CUDA: a path of 20 penalties in one batch, against FISTA in plain torch on the same GPU.

python bench/group_lasso_cuda.py [--json bench/results/group_lasso_cuda.json]

Both stop at a relative gap of 1e-6 of all penalties or after 2000 iterations. `step` is one iteration of the
batch, and `of the product` the share of it that the library's product takes. Needs a CUDA GPU.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, publish
from torch import Tensor

from lrcompress import ops

SHARES = torch.logspace(0, -3, 20, dtype=torch.float64).tolist()
TOL, MOST = 1e-6, 2000
LOOK_EVERY = 20
# out, channels, kernel area
SIZES = [(64, 64, 1), (64, 64, 9), (128, 128, 9), (256, 256, 9), (512, 512, 9)]


def moments(out: int, inner: int) -> tuple[Tensor, Tensor]:
    """Make correlated features behind a ReLU, and a weight."""
    hidden = torch.randn(4 * inner, inner // 4, dtype=torch.float64, device="cuda")
    x = hidden @ torch.randn(inner // 4, inner, dtype=torch.float64, device="cuda") / (inner // 4) ** 0.5
    x = (x + 0.3 * torch.randn_like(x)).relu()
    return x.T @ x / len(x), torch.randn(out, inner, dtype=torch.float64, device="cuda") / inner**0.5


def plain_fista(R: Tensor, W: Tensor, penalties: list[float], area: int) -> int:
    """All penalties at once with restarts, in torch operations; returns the iterations."""
    step = 1 / torch.linalg.eigvalsh(R)[-1]
    thresholds = torch.tensor(penalties, dtype=torch.float64, device="cuda")[:, None]
    M = point = torch.zeros(len(penalties), *W.shape, dtype=torch.float64, device="cuda")
    growth = torch.ones(len(penalties), 1, 1, dtype=torch.float64, device="cuda")

    def norms(matrix: Tensor) -> Tensor:
        return matrix.unflatten(2, (-1, area)).square().sum((1, 3)).sqrt()

    for n in range(1, MOST + 1):
        moved = point - step * ((point - W) @ R)
        factors = (1 - step * thresholds / norms(moved).clamp(min=1e-300)).clamp(min=0)
        new = moved * factors.repeat_interleave(area, 1)[:, None]
        uphill = ((point - new) * (new - M)).sum((1, 2), keepdim=True) > 0
        growth = torch.where(uphill, 1.0, growth)
        grown = (1 + (1 + 4 * growth.square()).sqrt()) / 2
        point = new + torch.where(uphill, 0.0, (growth - 1) / grown) * (new - M)
        M, growth = new, grown
        if n % LOOK_EVERY == 0:
            gradient = (M - W) @ R
            residual = ((M - W) * gradient).sum((1, 2))
            aligned = -(gradient * W).sum((1, 2))
            scale = (thresholds / norms(gradient)).amin(1).clamp(max=1)
            objective = residual / 2 + (thresholds * norms(M)).sum(1)
            gap = objective - scale * aligned + scale.square() * residual / 2
            if (gap <= TOL * objective).all():
                return n
    return MOST


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Return the median, the device waited for."""
    run()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare(out: int, channels: int, area: int, repeats: int) -> dict[str, Any]:
    """Return a size's row."""
    R, W = moments(out, channels * area)
    top = ops.penalty_max(R, W, area)
    penalties = [top * share for share in SHARES]
    path = ops.group_lasso(R, W, penalties, area, tol=TOL, max_iter=MOST)
    iterations = max(answer.iterations for answer in path)
    mine = seconds_of(lambda: ops.group_lasso(R, W, penalties, area, tol=TOL, max_iter=MOST), repeats)
    theirs = seconds_of(lambda: plain_fista(R, W, penalties, area), repeats)
    wide = torch.randn(channels * area, len(penalties) * out, dtype=torch.float64, device="cuda")
    product = seconds_of(lambda: R @ wide, repeats)
    return {
        "device": f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}",
        "problem": f"{out}x{channels * area}",
        "iterations": iterations,
        "converged": sum(answer.converged for answer in path),
        "ours, seconds": mine,
        "step, microseconds": mine / max(iterations, 1) * 1e6,
        "of the product": product * iterations / mine,
        "plain torch, seconds": theirs,
        "plain torch / ours": theirs / mine,
    }


def main() -> None:
    """Print and write the table."""
    args = arguments(__doc__, repeats=5)
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: nothing was timed")
    publish("Group-lasso paths on CUDA", args, [compare(*size, args.repeats) for size in SIZES])


if __name__ == "__main__":
    main()
