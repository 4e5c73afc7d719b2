"""Autocorrelation of patches on CUDA: ours against stored patches and the composition of shared products.

Times are of one call, by events; the error is against float64. Needs a CUDA GPU.

python bench/autocorrelation_cuda.py [--repeats 10] [--json bench/results/autocorrelation_cuda.json]
"""

import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from autocorrelation import LAYERS, Layer, stored
from common import arguments, publish

from lrcompress import ops
from lrcompress.ops._windows import Axis

IMAGES = 64  # times those of the layers for one core


def milliseconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Time calls one by one behind two that warm up."""
    run()
    run()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return found


def measure(layer: Layer, repeats: int) -> list[dict[str, Any]]:
    """Return a row a method; the bfloat16 images are the rounded ones, compared with those of float32."""
    images = IMAGES * layer.images
    x = torch.randn(images, layer.channels, layer.side, layer.side, device="cuda")
    half = x.bfloat16()
    side, pad = layer.channels * layer.kernel**2, layer.kernel // 2
    geometry = ((layer.kernel,) * 2, layer.stride, pad)
    axis = Axis(layer.side, layer.kernel, padding=pad, out=layer.side)
    axes = (Axis(1), axis, axis)
    into = ops.autocorrelation(x[:0], *geometry)
    single = torch.zeros(side, side, device="cuda")
    compose = import_module("lrcompress.ops.autocorrelation")._compose

    def in_parts() -> None:
        """Stored patches, some images at a time, or they do not fit."""
        for part in x.split(layer.images):
            stored(part, layer, single)

    methods: dict[str, Callable[[], Any]] = {
        "unfold + mm fp32": in_parts,
        "shared products, library": lambda: compose(x[:, None, :, None], axes, into.products, into.sums),
        "lrcompress": lambda: ops.autocorrelation(x, *geometry, into=into),
        "lrcompress, bfloat16": lambda: ops.autocorrelation(half, *geometry, into=into),
    }
    exact = ops.autocorrelation(x.double(), *geometry).products[0]
    rows = []
    for method, run in methods.items():
        for tensor in (single, into.products, into.sums):
            tensor.zero_()
        run()
        found = single if method == "unfold + mm fp32" else into.products[0]
        error = float((found - exact).norm() / exact.norm())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        extra = (torch.cuda.max_memory_allocated() - before) / (x.numel() * x.element_size())
        taken = milliseconds(run, repeats)
        median = statistics.median(taken)
        name = f"N{images} C{layer.channels} {layer.side}x{layer.side} K{layer.kernel}"
        row = {"layer": name, "method": method, "ms": median, "spread": (max(taken) - min(taken)) / median}
        rows.append(row | {"memory / input": extra, "error": error})
    return rows


def main() -> None:
    """Print and write the table."""
    args = arguments(__doc__, repeats=10)
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: nothing was timed")
    device = {"device": f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"}
    rows = [row for layer in LAYERS for row in measure(layer, args.repeats)]
    publish("Autocorrelation of patches on CUDA", args, [device | row for row in rows])


if __name__ == "__main__":
    main()
