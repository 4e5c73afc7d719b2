"""Truncated factors of ResNet-50's weights at half the full rank: ours against torch.linalg.svd, in one run.

python bench/truncated_svd.py [--threads 2] [--repeats 3] [--json bench/results/truncated_svd.json]
"""

from __future__ import annotations

import torch
from common import arguments, compared, publish, timed_in_turn
from singular_values import resnet50_shapes

from lrcompress import ops


def main() -> None:
    """Time both precisions of the library and ours in turn, and compare residuals."""
    args = arguments(__doc__, repeats=3)
    matrices = [torch.randn(out, channels * area) for out, channels, area in resnet50_shapes()]
    ranks = [max(1, min(matrix.shape) // 2) for matrix in matrices]

    def library(dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
        solved = (torch.linalg.svd(matrix.to(dtype), full_matrices=False) for matrix in matrices)
        return [(U[:, :r], S[:r], V[:r]) for (U, S, V), r in zip(solved, ranks, strict=True)]

    methods = {
        "torch.linalg.svd fp32, loop": lambda: library(torch.float32),
        "torch.linalg.svd fp64, loop": lambda: library(torch.float64),
        "lrcompress.ops.truncated_svd": lambda: ops.truncated_svd(matrices, ranks),
    }
    results, times = timed_in_turn(methods, args.repeats)
    exact = [S for _, S, _ in results["torch.linalg.svd fp64, loop"]]

    def largest_error(found: list[tuple[torch.Tensor, ...]]) -> float:
        return max(float(((S - e).abs() / e).max()) for (_, S, _), e in zip(found, exact, strict=True))

    rows = compared(results, times, "torch.linalg.svd fp32, loop", largest_error)
    publish("ResNet-50, 54 weights, half rank", args, rows)


if __name__ == "__main__":
    main()
