"""Truncated factors of ResNet-50's weights at half the full rank: ours against torch.linalg.svd, in one run.

python bench/truncated_svd.py [--threads 2] [--repeats 3] [--json bench/results/truncated_svd.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import environment, median_and_spread, print_table, timed_in_turn, write_results
from singular_values import resnet50_shapes

from lrcompress import ops


def main() -> None:
    """Time both precisions of the library and ours in turn, and compare residuals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
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
    base = median_and_spread(times["torch.linalg.svd fp32, loop"])[0]
    rows = []
    for name, seconds in times.items():
        median, spread = median_and_spread(seconds)
        error = max(
            float(((S - e).abs() / e).max()) for (_, S, _), e in zip(results[name], exact, strict=True)
        )
        rows.append(
            {"method": name, "seconds": median, "spread": spread, "speedup": base / median, "error": error}
        )
    print_table(f"ResNet-50, 54 weights, half rank, {args.threads} threads", rows)
    write_results(
        args.json, {"threads": args.threads, "repeats": args.repeats, "rows": rows, **environment()}
    )


if __name__ == "__main__":
    main()
