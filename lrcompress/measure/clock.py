"""Seconds of whole models and of their layers, measured side by side."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompress import calibrate, rewrite
from lrcompress.types import PlanError

Progress = Callable[[int, int], None]  # steps done, all steps
Mark = Any  # a point in time: seconds, or an event on the GPU's own clock

_ROUNDS = (5, 40)  # at least, at most; one more warms up


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's and its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def seconds_of_models(
    models: Mapping[str, nn.Module],
    inputs: Any,
    device: torch.device,
    seconds: float,  # to spend on all of them together, about
) -> dict[str, float]:
    """Return the median seconds of one forward of each model in inference, all run in turn."""
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(calibrate.inference(model, inputs, fast_paths=True))
        found = _rounds({name: _runner(model, inputs, device, {}) for name, model in models.items()}, seconds)
    return {name: statistics.median(sample[""] for sample in samples) for name, samples in found.items()}


def share_of_dense(
    model: nn.Module,  # changed meanwhile, then put back
    modules: Mapping[str, nn.Module],  # layer's name -> module in its place
    inputs: Any,
    device: torch.device,
    seconds: float,  # to spend, about
) -> float:
    """Return the time of a forward with the given layers over that of the model's own, run in turn."""
    holder = nn.ModuleList([model])
    dense = _runner(model, inputs, device, {})

    def changed() -> dict[str, float]:
        with rewrite.swapped_in(holder, _inside(modules)):
            return _runner(holder[0], inputs, device, {})()

    with calibrate.inference(model, inputs, fast_paths=True):
        found = _rounds({"dense": dense, "changed": changed}, seconds)
    pairs = zip(found["changed"], found["dense"], strict=True)
    return statistics.median(new[""] / old[""] for new, old in pairs)


def _inside(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Name modules as the holder of their model does, so that the model itself may be one of them."""
    return {".".join(filter(None, ("0", name))): module for name, module in modules.items()}


def seconds_of_layers(
    model: nn.Module,  # changed meanwhile, then put back
    variants: Mapping[str, Mapping[str, nn.Module]],  # variant -> layer's name -> module in its place
    inputs: Any,
    device: torch.device,
    seconds: float,  # to spend on all of them together, about
    progress: Progress | None = None,
) -> dict[str, dict[str, list[float]]]:  # variant -> layer -> samples; "" is the whole model
    """Time layers inside the running model: caches, memory and layouts are then those of real use.

    Each variant of the model runs in turn, round after round, so that a slower or faster minute of the
    machine meets all of them. A layer's sample is the sum over its calls in one forward.

    Raises:
        PlanError: a layer did not run, because the model calls it from a place that is no submodule.
    """
    holder = nn.ModuleList([model])
    runs: dict[str, Callable[[], dict[str, float]]] = {}
    for variant, modules in variants.items():
        named = _inside(modules)

        def run(named: dict[str, nn.Module] = named, timed: Mapping[str, nn.Module] = modules) -> Any:
            with rewrite.swapped_in(holder, named):
                return _runner(holder[0], inputs, device, timed)()

        runs[variant] = run
    with calibrate.inference(model, inputs):
        found = _rounds(runs, seconds, progress)
    for variant, samples in found.items():
        for name in variants[variant]:
            if name not in samples[0]:
                raise PlanError(
                    f"layer {name!r} cannot be timed: the model calls it as no submodule of its own"
                )
    return {v: {name: [s[name] for s in found[v]] for name in ("", *variants[v])} for v in found}


def _rounds(
    runs: Mapping[str, Callable[[], dict[str, float]]], seconds: float, progress: Progress | None = None
) -> dict[str, list[dict[str, float]]]:
    """Run all once to warm up, then in turn for about the given time; return the samples of each."""
    for run in runs.values():
        run()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    rounds, done, start = _ROUNDS[0], 0, time.perf_counter()
    while done < rounds:
        for name, run in runs.items():
            found[name].append(run())
        done += 1
        if done == 1:
            wanted = math.ceil(seconds / max(time.perf_counter() - start, 1e-9))
            rounds = min(max(wanted, _ROUNDS[0]), _ROUNDS[1])
        if progress:
            progress(done, rounds)
    return found


def _runner(
    model: nn.Module, inputs: Any, device: torch.device, timed: Mapping[str, nn.Module]
) -> Callable[[], dict[str, float]]:
    """Return a call that runs the model, and gives the seconds of it (``""``) and of some of its modules."""

    def run() -> dict[str, float]:
        marks: dict[str, list[Mark]] = {"": []}
        with _marking(timed, marks, device):
            marks[""].append(_mark(device))
            calibrate.run(model, inputs)
            marks[""].append(_mark(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {name: _elapsed(points) for name, points in marks.items()}

    return run


@contextmanager
def _marking(
    modules: Mapping[str, nn.Module], marks: dict[str, list[Mark]], device: torch.device
) -> Iterator[None]:
    """Mark the time before and after every call of the modules."""
    handles = []
    for name, module in modules.items():

        def mark(*_: Any, name: str = name) -> None:
            marks.setdefault(name, []).append(_mark(device))

        handles += [module.register_forward_pre_hook(mark), module.register_forward_hook(mark)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(marks: list[Mark]) -> float:
    """Return the seconds between each mark of even index and the next, summed."""
    pairs = list(zip(marks[::2], marks[1::2], strict=True))
    if isinstance(marks[0], float):
        return float(sum(after - before for before, after in pairs))
    return float(sum(before.elapsed_time(after) for before, after in pairs)) / 1e3
