"""The two encoders of the convolution on the CPU, direct sums and Winograd's algorithm, and which is chosen.

python bench/lowrank_conv2d_encoders.py [--threads 1] [--repeats 20] [--dtype float32] [--json FILE]

In bfloat16 what is chosen may be neither, but the tiles of AMX.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import arguments, median_and_spread, publish, timed_in_turn
from torch import Tensor

from lrcompress import _C

INSIDE = {
    "float32": (8, 16, 32, 64),
    "bfloat16": (2, 4, 8, 16, 32, 64),
}  # channels of a group; Winograd's from 8 on
RANKS = (4, 6, 8, 10, 12, 16, 24, 32)
SIDES = (8, 14, 56)
CHANNELS = 64
PIXELS = 8 * 56 * 56  # of all images, about
METHODS = ("chosen", "direct", "Winograd")  # by their numbers; in float32 the first is one of the others


def methods(
    side: int, inside: int, rank: int, layout: torch.memory_format, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Return the calls of one layer."""
    groups = CHANNELS // inside
    x = torch.randn(PIXELS // (side * side), CHANNELS, side, side).contiguous(memory_format=layout)
    x = x.to(dtype)
    V = torch.randn(groups * rank, inside, 3, 3, dtype=dtype)
    U = torch.randn(CHANNELS, groups * rank, 1, 1, dtype=dtype)
    last = layout == torch.channels_last

    def call(algorithm: int, packed: _C.PackedFactors, out: Tensor) -> Tensor:
        geometry = (1, 1), (1, 1), (1, 1), groups
        threads = torch.get_num_threads()
        _C.lowrank_conv2d(x, V, U, None, out, *geometry, 0, last, False, threads, packed, algorithm=algorithm)
        return out

    return {
        name: partial(call, number, _C.PackedFactors(), torch.empty_like(x))
        for number, name in enumerate(METHODS)
    }


def measure(
    side: int, inside: int, rank: int, layout: torch.memory_format, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Time one layer and say which encoder its bits are of."""
    results, times = timed_in_turn(methods(side, inside, rank, layout, dtype), repeats)
    largest = results["direct"].abs().max().item()
    error = (results["Winograd"] - results["direct"]).abs().max().item()
    assert error <= 16 * torch.finfo(dtype).eps * largest, (error, largest)
    us = {name: 1e6 * median_and_spread(times[name])[0] for name in METHODS[1:]}
    row = {"layout": str(layout).removeprefix("torch."), "side": side, "inside": inside, "rank": rank}
    same = [name for name in METHODS[1:] if torch.equal(results["chosen"], results[name])]
    chosen = same[-1] if same else "tiles"
    if dtype == torch.bfloat16:
        us["as chosen"] = 1e6 * median_and_spread(times["chosen"])[0]
    return row | us | {"direct / Winograd": us["direct"] / us["Winograd"], "chosen": chosen}


def main() -> None:
    """Time all layers and print a table."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")

    args = arguments(__doc__, repeats=20, add=add)
    rows = [
        measure(side, inside, rank, layout, getattr(torch, args.dtype), args.repeats)
        for layout in (torch.channels_last, torch.contiguous_format)
        for side in SIDES
        for inside in INSIDE[args.dtype]
        for rank in RANKS
    ]
    publish(f"3x3 convolutions of {CHANNELS} channels, {args.dtype}, microseconds", args, rows)


if __name__ == "__main__":
    main()
