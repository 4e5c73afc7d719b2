"""Autocorrelation of patches: ours against stored patches and weight-gradient calls, in one run.

python bench/autocorrelation.py [--threads 2] [--repeats 3] [--json bench/results/autocorrelation.json]
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import arguments, median_and_spread, publish, timed_in_turn
from torch import Tensor
from torch.nn.grad import conv2d_weight

from lrcompress import ops

OURS = "lrcompress"
STORED = "unfold + mm fp32"  # bmm of groups
POSITIONS = "K^2 weight gradients"
BORDERLESS = "1 weight gradient, no borders"
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


class Layer(NamedTuple):
    """A convolution with padding (kernel - 1) / 2; so many of them, so many input images of side x side."""

    channels: int
    side: int
    kernel: int
    images: int
    stride: int = 1
    out: int = 0
    count: int = 1
    groups: int = 1  # 1, or as many as the channels


LAYERS = [
    Layer(64, 56, 3, 4),
    Layer(128, 28, 3, 8),
    Layer(256, 14, 3, 16),
    Layer(512, 7, 3, 32),
    Layer(64, 32, 5, 4),
    Layer(32, 32, 7, 4),
]
DEPTHWISE = [
    Layer(96, 113, 3, 8, 2, groups=96),
    Layer(672, 14, 5, 8, groups=672),
]
RESNET20 = [
    Layer(3, 32, 3, 100, out=16),
    Layer(16, 32, 3, 100, out=16, count=6),
    Layer(16, 32, 3, 100, 2, out=32),
    Layer(32, 16, 3, 100, out=32, count=5),
    Layer(32, 16, 3, 100, 2, out=64),
    Layer(64, 8, 3, 100, out=64, count=5),
]
CALIBRATION_BATCHES = 10


def patches(x: Tensor, layer: Layer) -> Tensor:  # [d, patches]; of groups [groups, d, patches]
    """Store all patches."""
    columns = F.unfold(x, layer.kernel, padding=layer.kernel // 2, stride=layer.stride).transpose(0, 1)
    flat = columns.reshape(columns.shape[0], -1)
    return flat if layer.groups == 1 else flat.unflatten(0, (layer.groups, -1))


def stored(x: Tensor, layer: Layer, out: Tensor) -> Tensor:
    """Multiply the stored patches by themselves."""
    columns = patches(x.to(out.dtype), layer)
    if layer.groups > 1:
        return out.baddbmm_(columns, columns.mT)
    return out.addmm_(columns, columns.T)


def by_positions(x: Tensor, layer: Layer, out: Tensor) -> Tensor:
    """Call the weight gradient once a kernel position: the image's window there is the output's gradient."""
    channels, kernel, stride = layer.channels, layer.kernel, layer.stride
    padded = F.pad(x, (kernel // 2,) * 4)
    places = (layer.side - 1) // stride + 1
    blocks = out.view(channels, kernel, kernel, channels, kernel, kernel)
    for a in range(kernel):
        for b in range(kernel):
            window = padded[:, :, a::stride, b::stride][:, :, :places, :places].contiguous()
            shape = (channels, channels, kernel, kernel)
            blocks[:, a, b] += conv2d_weight(x, shape, window, stride, kernel // 2)
    return out


def interior(x: Tensor, layer: Layer) -> Tensor:
    """Call the weight gradient once for all distances of half a plane: no border is taken off."""
    span = layer.kernel - 1
    shape = (layer.channels, layer.channels, layer.kernel, 2 * span + 1)
    return conv2d_weight(F.pad(x, (span, span, 0, span)), shape, x)


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far resident memory rises while it runs, when all that is freed goes back to the system."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    libc.mallopt(MMAP_THRESHOLD, 1 << 25)
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Read one line of this process's memory figures."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def measure(layer: Layer, repeats: int) -> list[dict[str, Any]]:
    """Time one layer by all methods in turn; results are added to what exists, in the method's precision."""
    x = torch.randn(layer.images, layer.channels, layer.side, layer.side)
    side = layer.channels // layer.groups * layer.kernel**2
    single = torch.zeros(side, side) if layer.groups == 1 else torch.zeros(layer.groups, side, side)
    exact = stored(x, layer, single.double())
    geometry = ((layer.kernel,) * 2, layer.stride, layer.kernel // 2)
    into = ops.autocorrelation(x[:0], *geometry, groups=layer.groups)
    methods: dict[str, Callable[[], Any]] = {
        STORED: lambda: stored(x, layer, single),
        POSITIONS: lambda: by_positions(x, layer, single),
        BORDERLESS: lambda: interior(x, layer),
        OURS: lambda: ops.autocorrelation(x, *geometry, groups=layer.groups, into=into),
    }
    if layer.stride > 1 or layer.groups > 1:
        del methods[BORDERLESS]
    if layer.groups > 1:
        del methods[POSITIONS]
    extra: dict[str, int] = {}
    errors: dict[str, float | None] = {}
    for method, run in methods.items():
        run()  # brings code and tables to memory, which later calls share
        for tensor in (single, into.products):
            tensor.zero_()
        extra[method] = peak_bytes(run)
        found = into.products.view_as(single) if method == OURS else single
        errors[method] = float((found - exact).norm() / exact.norm())
    errors[BORDERLESS] = None
    _, times = timed_in_turn(methods, repeats)
    name = f"N{layer.images} C{layer.channels} {layer.side}x{layer.side} K{layer.kernel} s{layer.stride}"
    name += f" groups {layer.groups}" if layer.groups > 1 else ""
    base = median_and_spread(times[STORED])[0]
    rows = []
    for method, seconds in times.items():
        median, spread = median_and_spread(seconds)
        row = {"layer": name, "method": method, "ms": 1e3 * median, "spread": spread}
        row |= {"speedup": base / median, "memory / input": extra[method] / (x.numel() * x.element_size())}
        rows.append(row | {"error": errors[method]})
    return rows


def calibrate(add: Callable[[Tensor, Layer, int], Any]) -> None:
    """Run random images through random layers of ResNet20's shapes and hand over each layer's input."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(CALIBRATION_BATCHES):
        x = torch.randn(RESNET20[0].images, 3, 32, 32, generator=generator)
        for i, layer in enumerate(RESNET20):
            for _ in range(layer.count):
                add(x, layer, i)
                weight = torch.randn(layer.out, x.shape[1], 3, 3, generator=generator)
                x = F.conv2d(x, weight / (3 * x.shape[1] ** 0.5), None, layer.stride, 1).relu()


def measure_calibration(repeats: int) -> list[dict[str, Any]]:
    """Time a few hundred images by ours, by the loop over stored patches, and without statistics."""
    sides = [layer.channels * 9 for layer in RESNET20]
    single = [torch.zeros(side, side) for side in sides]
    into = [ops.autocorrelation(torch.zeros(0, layer.channels, 4, 4), (3, 3)) for layer in RESNET20]
    methods: dict[str, Callable[[], Any]] = {
        STORED: lambda: calibrate(lambda x, layer, i: stored(x, layer, single[i])),
        "forward pass alone": lambda: calibrate(lambda x, layer, i: None),
        OURS: lambda: calibrate(
            lambda x, layer, i: ops.autocorrelation(x, (3, 3), layer.stride, 1, into=into[i])
        ),
    }
    _, times = timed_in_turn(methods, repeats)
    name = f"ResNet20, {CALIBRATION_BATCHES * RESNET20[0].images} images"
    base = median_and_spread(times[STORED])[0]
    rows = []
    for method, seconds in times.items():
        median, spread = median_and_spread(seconds)
        row = {"layer": name, "method": method, "ms": 1e3 * median, "spread": spread}
        rows.append(row | {"speedup": base / median, "memory / input": None, "error": None})
    return rows


def main() -> None:
    """Time all layers and a whole network and print a table."""
    args = arguments(__doc__, repeats=3)
    layers = [*LAYERS, *DEPTHWISE, *RESNET20]
    rows = [row for layer in layers for row in measure(layer, args.repeats)]
    publish("Autocorrelation of patches", args, rows + measure_calibration(args.repeats))


if __name__ == "__main__":
    main()
