"""Factored linear layers with few rows: ours against torch's two products and the dense one, in one run.

python bench/lowrank_linear.py [--threads 2] [--repeats 7] [--json bench/results/lowrank_linear.json]

With one thread and with --threads. "module" is the layer as it comes, which chooses between "two" and ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, median_and_spread, publish, timed_in_turn
from torch import Tensor

import lrcompress as lrc
from lrcompress import _C, ops

SHAPES = ((1024, 128), (1024, 256), (4096, 128), (4096, 512), (4096, 1024))  # side of the weight, rank
ROWS = (1, 4, 8, 16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)
HELD_BYTES = 31 << 20  # as in lowrank_conv2d.py


def kernel(x: Tensor, U: Tensor, V: Tensor, bias: Tensor) -> Tensor:
    """Call the kernel whatever ``ops`` would choose."""
    out, hidden = x.new_empty(x.shape[0], U.shape[0]), torch.empty(x.shape[0], V.shape[0])
    _C.lowrank_linear(x, V, U, bias, out, hidden, 1, 1, torch.get_num_threads())
    return out


def measure(side: int, rank: int, rows: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Time one layer with a ReLU, all methods in turn."""
    torch.manual_seed(0)
    x, bias = torch.randn(rows, side, dtype=dtype), torch.randn(side, dtype=dtype)
    U, V = torch.randn(side, rank, dtype=dtype), torch.randn(rank, side, dtype=dtype)
    weight = torch.randn(side, side, dtype=dtype)
    layer = lrc.nn.LowRankLinear(side, side, rank, dtype=dtype, activation="relu").requires_grad_(False)
    layer.load_state_dict({"U": U, "V": V, "bias": bias})
    two = lrc.unfuse(layer)  # what a user would write: two linear layers and a ReLU
    methods: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.linear(x, weight, bias).relu_(),
        "two": lambda: two(x),
        "kernel": lambda: kernel(x, U, V, bias),
        "lrcompress": lambda: ops.lowrank_linear(x, U, V, bias, 1, "relu"),
        "module": lambda: layer(x),
    }
    with torch.inference_mode():
        results, times = timed_in_turn(methods, repeats)
    largest = results["two"].abs().max().item()
    for name in ("kernel", "lrcompress", "module"):
        error = (results[name].float() - results["two"].float()).abs().max().item()
        assert error <= 16 * torch.finfo(dtype).eps * largest, (error, largest)
    us = {name: 1e6 * median_and_spread(seconds)[0] for name, seconds in times.items()}
    ratios = {f"{name} / module": us[name] / us["module"] for name in ("two", "dense")}
    which = {
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "side": side,
        "rank": rank,
        "rows": rows,
    }
    read = x.element_size() * (U.numel() + V.numel())
    return (
        which
        | us
        | {"kernel / two": us["kernel"] / us["two"], "GB/s": read / us["lrcompress"] / 1e3}
        | ratios
    )


def main() -> None:
    """Time all shapes and print a table."""
    args = arguments(__doc__, repeats=7)
    torch.empty(HELD_BYTES, dtype=torch.uint8)
    found = []
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        found += [
            measure(side, rank, rows, dtype, args.repeats)
            for dtype in DTYPES
            for side, rank in SHAPES
            for rows in ROWS
        ]
    publish("factored linear layers, microseconds", args, found)


if __name__ == "__main__":
    main()
