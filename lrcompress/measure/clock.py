"""Seconds of several calls, measured side by side."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Progress = Callable[[int, int], None]  # steps done, all steps

_SAMPLE = 2e-4  # seconds that one sample lasts at least: far above the clock's own cost and resolution
_ROUNDS = (5, 40)  # at least, at most


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


def seconds_in_turn(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,  # to spend on all of them together, about
) -> dict[str, float]:
    """Return the median seconds of each call.

    All run in turn, round after round, so that a slower or faster minute of the machine meets all of them.
    A short call is repeated within a sample.
    """
    repeats = {name: _repeats(run, device) for name, run in runs.items()}
    start = time.perf_counter()
    samples = {name: [_seconds(run, device, repeats[name])] for name, run in runs.items()}
    round_of_all = max(time.perf_counter() - start, 1e-9)
    for _ in range(min(max(math.ceil(seconds / round_of_all), _ROUNDS[0]), _ROUNDS[1]) - 1):
        for name, run in runs.items():
            samples[name].append(_seconds(run, device, repeats[name]))
    return {name: statistics.median(found) for name, found in samples.items()}


def _repeats(run: Callable[[], object], device: torch.device) -> int:
    """Warm up, and return how often the call must run for one sample."""
    run()
    return max(1, math.ceil(_SAMPLE / max(_seconds(run, device, 1), 1e-7)))


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the mean time of some calls in a row."""
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(repeats):
            run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats
