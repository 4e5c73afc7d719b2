"""The factored layers' CUDA kernels against the dense layer and two library calls, each in a CUDA graph.

Every graph node has weights of its own, more of them than the L2 cache holds, so that they come from memory
as they do in a network. Times are of a node; the error is against float64. In float32 the library runs twice:
exact, and in TF32, which torch lets convolutions use unless told otherwise. Needs a CUDA GPU.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, publish
from torch import Tensor

from lrcompress import ops

ROTATED_BYTES = 128 << 20  # of weights: twice the largest L2 cache
NODES = range(20, 400)  # of a graph, at least and at most
BYTES_PER_SECOND = 3.0e12  # of an H100's memory, and the products below: the floor's rates
FLOPS_PER_SECOND = {torch.bfloat16: 7.9e14, torch.float32: 4.1e14 / 3}  # three products in TF32 for one

Call = Callable[..., Tensor]
# batch, channels, filters, side, groups, rank of a group: 3 x 3 kernels
CONVOLUTIONS = [
    (32, 64, 64, 56, 2, 16),
    (32, 128, 128, 28, 4, 16),
    (32, 256, 256, 14, 4, 32),
    (32, 512, 512, 7, 4, 64),
]
# rows, in, out, rank
LINEARS = [
    (1, 4096, 4096, 1024),
    (1, 4096, 11008, 1024),
    (16, 4096, 4096, 1024),
    (128, 4096, 4096, 256),
    (4096, 1024, 1024, 128),
]


def seconds_a_node(call: Call, x: Tensor, weights: Sequence[Sequence[Tensor]], repeats: int) -> list[float]:
    """Capture one call for each set of weights and time replays."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(x, *weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for mine in weights:
            call(x, *mine)
    graph.replay()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / len(weights))
    return seconds


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Say whether the library may multiply float32 in TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allowed):
        yield


def rotated(make: Callable[[], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Make as many sets of weights as a graph has nodes."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    count = min(max(ROTATED_BYTES // size, NODES.start), NODES.stop)
    return [first, *(make() for _ in range(count - 1))]


def compare(
    layer: str, x: Tensor, shapes: dict[str, list[tuple[int, ...]]], calls: dict[str, Call], repeats: int
) -> list[dict[str, Any]]:
    """Return a row a method; the last shapes' weights are those of all methods but `dense`."""

    def make(name: str) -> list[Tensor]:
        """Rows of unit variance."""
        given = shapes["dense" if name.startswith("dense") else "factors"]
        tensors = [torch.randn(shape, dtype=x.dtype, device="cuda") for shape in given]
        tensors = [t / t[0].numel() ** 0.5 for t in tensors]
        last = torch.channels_last
        return [t.to(memory_format=last) if t.ndim == 4 else t for t in tensors]

    if x.dtype == torch.float32:
        calls = calls | {f"{name}, TF32": calls[name] for name in ("dense", "two calls")}
    rows = []
    for name, call in calls.items():
        weights = rotated(lambda name=name: make(name))
        exact = calls["two calls" if name == "ours" else name](x.double(), *(w.double() for w in weights[0]))
        with tf32("TF32" in name):
            found = call(x, *weights[0])
            seconds = seconds_a_node(call, x, weights, repeats)
        error = ((found.double() - exact).abs().max() / exact.abs().max()).item()
        median = statistics.median(seconds)
        size = x.numel() + found.numel() + sum(w.numel() for w in weights[0])
        products = sum(w.numel() for w in weights[0]) * found[:, :1].numel()
        floor = max(size * x.element_size() / BYTES_PER_SECOND, 2 * products / FLOPS_PER_SECOND[x.dtype])
        dtype = str(x.dtype).removeprefix("torch.")
        row = {"layer": layer, "dtype": dtype, "method": name, "microseconds": median * 1e6}
        spread = (max(seconds) - min(seconds)) / median
        rows.append(row | {"spread": spread, "of the floor": floor / median, "error": error})
    return rows


def convolution(case: tuple[int, ...], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Compare one 3 x 3 layer, channels_last."""
    batch, channels, filters, side, groups, rank = case
    x = torch.randn(batch, channels, side, side, dtype=dtype, device="cuda")
    shapes = {
        "dense": [(filters, channels, 3, 3)],
        "factors": [(filters, groups * rank, 1, 1), (groups * rank, channels // groups, 3, 3)],
    }
    calls = {
        "dense": lambda x, w: F.conv2d(x, w, padding=1),
        "two calls": lambda x, U, V: F.conv2d(F.conv2d(x, V, padding=1, groups=groups), U),
        "ours": lambda x, U, V: ops.lowrank_conv2d(x, U, V, None, (1, 1), (1, 1), (1, 1), groups),
    }
    name = f"conv {batch} x {channels} x {side}^2 -> {filters}, {groups} groups of rank {rank}"
    return compare(name, x.to(memory_format=torch.channels_last), shapes, calls, repeats)


def linear(case: tuple[int, ...], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Compare one linear layer."""
    rows, inside, filters, rank = case
    x = torch.randn(rows, inside, dtype=dtype, device="cuda")
    shapes = {"dense": [(filters, inside)], "factors": [(filters, rank), (rank, inside)]}
    calls = {
        "dense": F.linear,
        "two calls": lambda x, U, V: F.linear(F.linear(x, V), U),
        "ours": lambda x, U, V: ops.lowrank_linear(x, U, V),
    }
    name = f"linear {rows} x {inside} -> {filters}, rank {rank}"
    return compare(name, x, shapes, calls, repeats)


def main() -> None:
    """Print and write the tables."""
    args = arguments(__doc__, repeats=50)
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: nothing was timed")
    rows = []
    with torch.inference_mode():
        for dtype in FLOPS_PER_SECOND:
            rows += [row for case in CONVOLUTIONS for row in convolution(case, dtype, args.repeats)]
            rows += [row for case in LINEARS for row in linear(case, dtype, args.repeats)]
    device = {"device": f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"}
    publish("Factored layers on CUDA", args, [device | row for row in rows])


if __name__ == "__main__":
    main()
