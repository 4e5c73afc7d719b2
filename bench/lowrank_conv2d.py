"""Factored convolutions of ResNet20's shapes: ours against torch's two and the dense one, in one run.

With one thread and with --threads. "module" is the layer as it comes, which chooses between "two" and ours.

python bench/lowrank_conv2d.py [--threads 2] [--repeats 20] [--json bench/results/lowrank_conv2d.json]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, median_and_spread, publish, timed_in_turn
from torch import Tensor

import lrcompress as lrc
from lrcompress import ops

SIDES = {16: 32, 32: 16, 64: 8}  # channels -> pixels of a row
KEPT = 0.4  # of the parameters
BATCHES = (1, 64)
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"": torch.contiguous_format, " channels_last": torch.channels_last}
OURS, TWO, DENSE, MODULE = "lrcompress", "two", "dense", "module"
# glibc unmaps a freed block that is larger than any freed before, and fresh pages take longer than a layer:
# one large block frees all methods of that.
HELD_BYTES = 31 << 20


def methods(
    batch: int, channels: int, side: int, groups: int, rank: int, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, each in both layouts and with a ReLU at the end."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side, dtype=dtype)
    U = torch.randn(channels, groups * rank, 1, 1, dtype=dtype)
    V = torch.randn(groups * rank, channels // groups, 3, 3, dtype=dtype)
    bias = torch.randn(channels, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype)

    def dense(x: Tensor, V: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1).relu_()

    def two(x: Tensor, V: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, V, padding=1, groups=groups), U, bias).relu_()

    packed = {layout: ops.PackedFactors() for layout in LAYOUTS.values()}  # as a layer keeps them

    def ours(x: Tensor, V: Tensor, weight: Tensor) -> Tensor:
        mine = packed[torch.contiguous_format if x.is_contiguous() else torch.channels_last]
        return ops.lowrank_conv2d(x, U, V, bias, (1, 1), (1, 1), (1, 1), groups, "relu", mine)

    timed: dict[str, Callable[[], Tensor]] = {}
    for name, layout in LAYOUTS.items():
        mine = [t.contiguous(memory_format=layout) for t in (x, V, weight)]
        for label, run in ((DENSE, dense), (TWO, two), (OURS, ours)):
            timed[label + name] = partial(run, *mine)
        layer = lrc.nn.LowRankConv2d(channels, channels, 3, rank, groups, padding=1, activation="relu")
        layer.to(dtype).requires_grad_(False).load_state_dict({"U": U, "V": V, "bias": bias})
        timed[MODULE + name] = partial(layer.to(memory_format=layout), mine[0])
    return timed


def measure(batch: int, channels: int, groups: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Time one layer, all methods in turn; the first ratios are of better layouts to our worse one."""
    side = SIDES[channels]
    rank = max(1, round(KEPT * channels * channels * 9 / (groups * (channels // groups * 9 + channels))))
    with torch.inference_mode():
        results, times = timed_in_turn(methods(batch, channels, side, groups, rank, dtype), repeats)
    largest = results[TWO].abs().max().item()
    for name in LAYOUTS:
        for label in (OURS, MODULE):
            error = (results[label + name].float() - results[TWO].float()).abs().max().item()
            assert error <= 8 * torch.finfo(dtype).eps * largest, (error, largest)
    us = {name: 1e6 * median_and_spread(seconds)[0] for name, seconds in times.items()}
    best = {label: min(us[label + name] for name in LAYOUTS) for label in (DENSE, TWO)}
    layer = {"threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."), "batch": batch}
    layer |= {"channels": channels, "side": side, "groups": groups, "rank": rank}
    slower = max(us[OURS + name] for name in LAYOUTS)  # the caller has no choice of layout
    ratios = {"two / ours": best[TWO] / slower, "dense / ours": best[DENSE] / slower}
    last = " channels_last"
    same = {f"two / module{name}": us[TWO + name] / us[MODULE + name] for name in LAYOUTS}
    return layer | us | ratios | {f"two / ours{last}": us[TWO + last] / us[OURS + last]} | same


def main() -> None:
    """Time all layers in both batches and print a table."""
    args = arguments(__doc__, repeats=20)
    torch.empty(HELD_BYTES, dtype=torch.uint8)
    rows = []
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        rows += [
            measure(batch, channels, groups, dtype, args.repeats)
            for dtype in DTYPES
            for channels in SIDES
            for groups in sorted({channels, channels // 2, 8, 2, 1}, reverse=True)
            for batch in BATCHES
        ]
    publish(f"3x3 convolutions of ResNet20, {KEPT:.0%} of the parameters, microseconds", args, rows)


if __name__ == "__main__":
    main()
