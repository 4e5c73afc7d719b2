"""Factored layers and whole networks: dense, two library calls, compiled, and ours, side by side in one run.

python bench/lowrank.py [--device cpu] [--compile] [--large] [--only layers] [--json bench/results/x.json]

On the CPU with one thread and with --threads. A dense layer is what merged factors run as, too. ``floor`` is
the least time that the factors' arithmetic and traffic can take at the rates of a large matrix product and a
large copy, measured in the same run. On CUDA the weights rotate through more than twice the L2 cache.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import arguments, median_and_spread, publish, timed_in_turn
from networks import halved, networks
from torch import Tensor, nn

import lrcompress as lrc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from resnet20_cifar10 import ResNet20, trained

ROTATED = 120 << 20  # bytes of weights on CUDA: more than twice the L2 cache
CALLS = 20  # in one sample on CUDA
NETWORK_SECONDS = 4  # for all ways of one network, at least
OURS = "ours"


@dataclass(frozen=True)
class Shape:
    """One factored layer: a Linear of ``batch`` rows, or with ``side`` a 3 x 3 convolution."""

    batch: int
    inputs: int
    outputs: int
    rank: int
    groups: int = 1
    side: int = 0
    kernel: int = 3

    def __str__(self) -> str:
        image = f"x{self.side}^2 {self.kernel}x{self.kernel}" if self.side else ""
        return f"{self.batch}x{self.inputs}{image} -> {self.outputs} r{self.rank} g{self.groups}"

    @property
    def weights(self) -> tuple[int, int, int]:
        """Entries of the dense weight, and of both factors."""
        area = self.kernel**2 if self.side else 1
        inner = self.groups * self.rank
        return self.inputs * self.outputs * area, self.rank * self.inputs * area, inner * self.outputs

    @property
    def positions(self) -> int:
        """Rows of the products."""
        return self.batch * (self.side**2 or 1)


LAYERS = {
    "cuda": [
        *(Shape(m, 4096, 4096, 1024) for m in (1, 16, 4096)),
        Shape(1, 4096, 11008, 1024),
        Shape(128, 4096, 4096, 512),
        Shape(4096, 4096, 4096, 128),
        Shape(256, 256, 256, 64, side=14, kernel=1),
        *(Shape(256, 64, 64, 32, groups, 56) for groups in (1, 2)),
        Shape(256, 128, 128, 16, 4, 28),
        Shape(256, 256, 256, 32, 4, 14),
        Shape(256, 512, 512, 256, 1, 7),
        Shape(256, 16, 16, 4, 2, 32),
    ],
    "cpu": [
        *(Shape(m, 4096, 4096, 1024) for m in (1, 16)),
        Shape(512, 1024, 1024, 128),
        Shape(4096, 256, 256, 64),
        *(Shape(n, 16, 16, 4, 2, 32) for n in (1, 64)),
        Shape(64, 32, 32, 3, 16, 16),
        *(Shape(8, 64, 64, rank, groups, 56) for groups, rank in ((1, 32), (2, 16), (4, 8))),
        *(Shape(8, 128, 128, rank, groups, 28) for groups, rank in ((1, 32), (4, 16))),
        *(Shape(8, 256, 256, rank, groups, 14) for groups, rank in ((1, 64), (4, 32))),
        *(Shape(8, 512, 512, rank, groups, 7) for groups, rank in ((1, 64), (8, 16))),
    ],
}


def layer_methods(shape: Shape, made: Mapping[str, Any], compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed; each call takes the next of the sets of weights."""
    entry = made["dtype"].itemsize
    copies = max(1, ROTATED // (sum(shape.weights[1:]) * entry)) if made["device"] == "cuda" else 1
    if shape.side:
        given = {"groups": shape.groups, "padding": shape.kernel // 2, **made}
        sizes = (shape.inputs, shape.outputs, shape.kernel)
        factored = [lrc.nn.LowRankConv2d(*sizes, shape.rank, **given) for _ in range(copies)]
        x = torch.randn(shape.batch, shape.inputs, shape.side, shape.side, **made)
    else:
        sizes = (shape.inputs, shape.outputs, shape.rank)
        factored = [lrc.nn.LowRankLinear(*sizes, shape.groups, **made) for _ in range(copies)]
        x = torch.randn(shape.batch, shape.inputs, **made)
    layers = nn.ModuleList(factored).eval().requires_grad_(False)
    dense = nn.ModuleList(lrc.merge(layers)[: max(1, ROTATED // (shape.weights[0] * entry))])
    found = {"dense": rotating(dense, x), "two": rotating(with_kernel(layers, "composed"), x)}
    if shape.side:
        last = x.to(memory_format=torch.channels_last)
        found["dense channels_last"] = rotating(channels_last(dense), last)
        found["two channels_last"] = rotating(with_kernel(channels_last(layers), "composed"), last)
    fused = with_kernel(layers, "fused")
    if fused[0].runs_fused(x):
        found[OURS] = rotating(fused, x)
        if shape.side:
            found[f"{OURS} channels_last"] = rotating(channels_last(fused), last)
    if compiled:
        found |= compiled_methods(with_kernel(layers, "composed"), x)
    if made["device"] == "cuda":
        eager = [name for name in found if "compiled" not in name]
        found |= {f"{name} in a graph": in_graph(found[name]) for name in eager}
    return found


def with_kernel(layers: nn.ModuleList, kernel: str) -> nn.ModuleList:
    """Copy the layers with another choice of kernel."""
    copied = copy.deepcopy(layers)
    for layer in copied:
        layer.kernel = kernel
    return copied


def channels_last(layers: nn.ModuleList) -> nn.ModuleList:
    """Copy the layers into the other memory format."""
    return copy.deepcopy(layers).to(memory_format=torch.channels_last)


def rotating(layers: nn.ModuleList, x: Tensor) -> Callable[[], Tensor]:
    """Return a call that takes the next layer each time."""
    turn = [0]
    calls = list(layers)

    def call() -> Tensor:
        turn[0] = (turn[0] + 1) % len(calls)
        return calls[turn[0]](x)

    return call


def compiled_methods(layers: nn.ModuleList, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Compile the composition with max-autotune, without and with the pass that joins two products."""
    import torch._inductor.config as inductor

    found = {}
    for name, joined in (("compiled", False), ("compiled b2b", True)):
        torch._dynamo.reset()
        with inductor.patch(b2b_gemm_pass=joined):
            call = torch.compile(layers[0].forward, mode="max-autotune-no-cudagraphs", fullgraph=True)
            call(x)
        found[name] = lambda call=call: call(x)
    return found


def in_graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture as many calls as one sample makes; a replay stands for all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            results = [call()]

    def replay() -> Tensor:
        graph.replay()
        return results[0]

    return replay


def timed(methods: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of one call of each method, all in turn."""
    if device == "cpu":
        return timed_in_turn(methods, repeats)[1]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for sample in range(repeats + 3):
        for name, call in methods.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(1 if name.endswith("in a graph") else CALLS):
                call()
            end.record()
            end.synchronize()
            if sample >= 3:  # the first warm up
                seconds[name].append(start.elapsed_time(end) / 1e3 / CALLS)
    return seconds


def peaks(made: Mapping[str, Any], repeats: int) -> tuple[float, float]:
    """Return the rate of a large matrix product (FLOP/s), and of a large copy (bytes/s, both ways)."""
    side, size = (8192, 1 << 28) if made["device"] == "cuda" else (1536, 1 << 25)
    a, b = torch.randn(side, side, **made), torch.randn(side, side, **made)
    source = torch.randn(size, device=made["device"])
    target = torch.empty_like(source)
    times = timed({"mm": lambda: a @ b, "copy": lambda: target.copy_(source)}, made["device"], repeats)
    fastest = {name: min(seconds) for name, seconds in times.items()}
    return 2 * side**3 / fastest["mm"], 8 * size / fastest["copy"]


def layer_row(shape: Shape, made: Mapping[str, Any], args: Any, rates: tuple[float, float]) -> dict[str, Any]:
    """Time one layer: microseconds, spread and the fraction of the floor of each method."""
    with torch.no_grad():
        methods = layer_methods(shape, made, args.compile)
        check(methods)
        times = timed(methods, made["device"], args.repeats)
    found = {name: median_and_spread(seconds) for name, seconds in times.items()}
    us = {name: 1e6 * median for name, (median, _) in found.items()}
    item = torch.empty(0, dtype=made["dtype"]).element_size()
    flops = 2 * shape.positions * sum(shape.weights[1:])
    moved = item * (sum(shape.weights[1:]) + shape.positions * (shape.inputs + shape.outputs))
    floor = max(flops / rates[0], moved / rates[1])
    best = min((name for name in us if name.startswith(OURS)), key=us.__getitem__, default="two")
    others = {kind: min(us[name] for name in us if name.startswith(kind)) for kind in ("dense", "two")}
    return {
        "layer": str(shape),
        **us,
        "floor": 1e6 * floor,
        "dense / ours": others["dense"] / us[best],
        "two / ours": others["two"] / us[best],
        "GFLOP/s": flops / us[best] / 1e3,
        "GB/s": moved / us[best] / 1e3,
        "of the floor": 1e6 * floor / us[best],
        "spread": found[best][1],
    }


def check(methods: Mapping[str, Callable[[], Tensor]]) -> None:
    """See that ours computes what the two calls do, before either is timed."""
    if OURS in methods:
        ours, two = methods[OURS]().double(), methods["two"]().double()
        error = float((ours - two).norm() / two.norm())
        assert error < 0.02, f"relative error {error}"


def network_rows(args: Any, made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Time whole networks at half of their MACs."""
    cases = []
    resnet20 = trained(Path(os.environ["LRCOMPRESS_DATA"])) if "LRCOMPRESS_DATA" in os.environ else ResNet20()
    resnet20 = resnet20.eval()
    image = torch.randn(1, 3, 32, 32)
    for name, recipe in (("alds", lrc.alds()), ("svd", lrc.svd())):
        small, _ = lrc.compress(resnet20, lrc.Budget(macs=0.5), recipe, example_inputs=image)
        cases += [(f"ResNet20 {name}", resnet20, small, torch.randn(n, 3, 32, 32)) for n in (1, 64)]
    if args.large:
        for name, (model, inputs) in networks(made["device"]).items():
            small = halved(model.eval())
            cases += [(name, model, small, x) for x in inputs]
    return [network_row(name, *(each.to(**made) for each in case), args) for name, *case in cases]


def network_row(name: str, model: nn.Module, small: nn.Module, x: Tensor, args: Any) -> dict[str, Any]:
    """Time one network: dense, two calls, ours, and ours tuned; dense and tuned folded, too."""
    model, small = (each.eval().requires_grad_(False) for each in (model, small))
    composed = copy.deepcopy(small)
    for module in composed.modules():
        if hasattr(module, "kernel"):
            module.kernel = "composed"
    fast, tuning = lrc.tune(small, x)
    models = {"dense": model, "two": composed, OURS: small, "tuned": fast}
    if lrc.foldable(model, x).folds:
        models["dense folded"] = lrc.fold(model, x)
    if lrc.foldable(small, x).folds:
        models["tuned folded"] = lrc.tune(lrc.fold(small, x), x)[0]
    if x.ndim == 4:
        for kind in [kind for kind in ("dense", "two", "dense folded") if kind in models]:
            last = copy.deepcopy(models[kind]).to(memory_format=torch.channels_last)
            models[f"{kind} channels_last"] = last
    with torch.no_grad():
        methods = {kind: (lambda each=each: each(x)) for kind, each in models.items()}
        if args.compile:
            methods["compiled"] = compiled_network(composed, x)
        once = sum(map(sum, timed(methods, x.device.type, 1).values()))
        times = timed(methods, x.device.type, max(args.repeats, min(200, round(NETWORK_SECONDS / once))))
    ms = {kind: 1e3 * median_and_spread(seconds)[0] for kind, seconds in times.items()}
    ways = [layer.choice for layer in tuning.layers]
    dense, folded = {"dense", "dense channels_last"} & ms.keys(), {k for k in ms if k.startswith("dense")}
    return {
        "network": f"{name}, {list(x.shape)}",
        **ms,
        "dense / tuned": min(ms[k] for k in dense) / ms["tuned"],
        "dense / tuned, both folded": min(ms[k] for k in folded) / ms.get("tuned folded", ms["tuned"]),
        "two / tuned": min(ms[k] for k in ms if k.startswith("two")) / ms["tuned"],
        "spread": median_and_spread(times["tuned"])[1],
        "ways": ", ".join(f"{ways.count(way)} {way}" for way in sorted(set(ways))),
    }


def compiled_network(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Compile a network with max-autotune."""
    torch._dynamo.reset()
    call = torch.compile(copy.deepcopy(model).forward, mode="max-autotune-no-cudagraphs")
    call(x)
    return lambda: call(x)


def main() -> None:
    """Time layers, then networks."""

    def add(parser: Any) -> None:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
        parser.add_argument("--compile", action="store_true", help="torch.compile as a peer: takes minutes")
        parser.add_argument("--large", action="store_true", help="networks beyond ResNet20, too")
        parser.add_argument("--only", choices=("layers", "networks"))

    args = arguments(__doc__, 20, add)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    made = {"device": args.device, "dtype": getattr(torch, dtype)}
    torch.backends.cudnn.benchmark = True
    rows = []
    for threads in sorted({1, args.threads}) if args.device == "cpu" else [args.threads]:
        torch.set_num_threads(threads)
        found = []
        if args.only != "networks":
            rates = peaks(made, args.repeats)
            print(f"large product {rates[0] / 1e9:.0f} GFLOP/s, large copy {rates[1] / 1e9:.1f} GB/s")
            found += [layer_row(shape, made, args, rates) for shape in LAYERS[args.device]]
        if args.only != "layers":
            found += network_rows(args, made)
        rows += [{"threads": threads, **row} for row in found]
    publish(f"{dtype}; layers in microseconds, networks at half of their MACs in milliseconds", args, rows)


if __name__ == "__main__":
    main()
