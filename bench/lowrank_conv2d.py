"""Factored convolutions of ResNet20's shapes: ours against torch's two and the dense one, in one run.

python bench/lowrank_conv2d.py [--threads 2] [--repeats 20] [--json bench/results/lowrank_conv2d.json]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, median_and_spread, publish, timed_in_turn
from torch import Tensor

from lrcompress import ops

SIDES = {16: 32, 32: 16, 64: 8}  # channels -> pixels of a row
KEPT = 0.4  # of the parameters
BATCHES = (1, 64)
OURS = "lrcompress"


def methods(batch: int, channels: int, side: int, groups: int, rank: int) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed; weights and inputs have the layout that each method likes."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side)
    U = torch.randn(channels, groups * rank, 1, 1)
    V = torch.randn(groups * rank, channels // groups, 3, 3)
    bias = torch.randn(channels)
    weight = torch.randn(channels, channels, 3, 3)
    last_x, last_V = (t.to(memory_format=torch.channels_last) for t in (x, V))
    last_weight = weight.to(memory_format=torch.channels_last)
    return {
        "dense": lambda: F.conv2d(x, weight, bias, padding=1),
        "dense channels_last": lambda: F.conv2d(last_x, last_weight, bias, padding=1),
        "two": lambda: F.conv2d(F.conv2d(x, V, padding=1, groups=groups), U, bias),
        "two channels_last": lambda: F.conv2d(F.conv2d(last_x, last_V, padding=1, groups=groups), U, bias),
        OURS: lambda: ops.lowrank_conv2d(x, U, V, bias, (1, 1), (1, 1), (1, 1), groups),
    }


def measure(batch: int, channels: int, groups: int, repeats: int) -> dict[str, Any]:
    """Time one layer, all methods in turn; each ratio is to the better layout."""
    side = SIDES[channels]
    rank = max(1, round(KEPT * channels * channels * 9 / (groups * (channels // groups * 9 + channels))))
    with torch.inference_mode():
        results, times = timed_in_turn(methods(batch, channels, side, groups, rank), repeats)
    torch.testing.assert_close(results[OURS], results["two"], rtol=1e-4, atol=1e-3)
    us = {name: 1e6 * median_and_spread(seconds)[0] for name, seconds in times.items()}
    composition = min(us["two"], us["two channels_last"])
    dense = min(us["dense"], us["dense channels_last"])
    layer = {"batch": batch, "channels": channels, "side": side, "groups": groups, "rank": rank}
    return {**layer, **us, "two / ours": composition / us[OURS], "dense / ours": dense / us[OURS]}


def main() -> None:
    """Time all layers in both batches and print a table."""
    args = arguments(__doc__, repeats=20)
    rows = [
        measure(batch, channels, groups, args.repeats)
        for channels in SIDES
        for groups in sorted({channels, channels // 2, 8, 2, 1}, reverse=True)
        for batch in BATCHES
    ]
    publish(f"3x3 convolutions of ResNet20, {KEPT:.0%} of the parameters, microseconds", args, rows)


if __name__ == "__main__":
    main()
