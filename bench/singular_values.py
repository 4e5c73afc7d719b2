"""Singular values of ResNet-50's 54 weights for 1 to 16 groups: ours against torch, with errors, in one run.

python bench/singular_values.py [--threads 2] [--repeats 3] [--json bench/results/singular_values.json]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import arguments, compared, publish, timed_in_turn
from torch import Tensor

from lrcompress import ops

GROUPS = (1, 2, 4, 8, 16)


def resnet50_shapes() -> list[tuple[int, int, int]]:
    """Return (out, in, kernel area) of the 53 convolutions and the classifier (He et al. 2016)."""
    shapes, channels = [(64, 3, 49)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1), (width, width, 9), (4 * width, width, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1))
            channels = 4 * width
    return [*shapes, (1000, 2048, 1)]


def weights() -> list[Tensor]:
    """Return a weight of each shape with a power-law spectrum, as trained weights have."""
    found = []
    for out, channels, area in resnet50_shapes():
        matrix = torch.randn(out, channels * area)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found.append((left * values / torch.arange(1, len(values) + 1).sqrt()) @ right)
    return found


def divisors(channels: int) -> list[int]:
    return [k for k in GROUPS if channels % k == 0]


def loop(
    matrices: list[Tensor], counts: list[list[int]], solve: Callable[[Tensor], Tensor]
) -> list[dict[int, Tensor]]:
    """Solve every group count of every matrix with one library call each."""
    return [
        {k: solve(torch.stack(matrix.chunk(k, 1))) for k in ks}
        for matrix, ks in zip(matrices, counts, strict=True)
    ]


def by_gram(blocks: Tensor) -> Tensor:
    """Solve by the eigenvalues of the fp64 product, without sharing it between group counts."""
    blocks = blocks.double()
    gram = blocks @ blocks.mT if blocks.shape[1] <= blocks.shape[2] else blocks.mT @ blocks
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1)


def largest_error(found: list[dict[int, Tensor]], exact: list[dict[int, Tensor]]) -> float:
    """Return the largest relative error of a value above 1e-4 of its matrix's largest."""
    worst = 0.0
    for mine, truth in zip(found, exact, strict=True):
        for k, values in truth.items():
            large = values > 1e-4 * values[:, :1]
            worst = max(worst, float(((mine[k] - values).abs() / values)[large].max()))
    return worst


def main() -> None:
    """Time all methods in turn and print the table."""
    args = arguments(__doc__, repeats=3)
    matrices = weights()
    counts = [divisors(channels) for _, channels, _ in resnet50_shapes()]
    methods = {
        "torch.linalg.svdvals fp32, loop": lambda: loop(matrices, counts, torch.linalg.svdvals),
        "torch.linalg.svdvals fp64, loop": lambda: loop(
            matrices, counts, lambda b: torch.linalg.svdvals(b.double())
        ),
        "fp64 Gram + torch.linalg.eigvalsh, loop": lambda: loop(matrices, counts, by_gram),
        "lrcompress.ops.singular_values": lambda: ops.singular_values(matrices, counts),
    }
    results, times = timed_in_turn(methods, args.repeats)
    exact = results["torch.linalg.svdvals fp64, loop"]
    base = "torch.linalg.svdvals fp32, loop"
    rows = compared(results, times, base, lambda found: largest_error(found, exact))
    publish(f"ResNet-50, 54 weights, groups {GROUPS}", args, rows)


if __name__ == "__main__":
    main()
