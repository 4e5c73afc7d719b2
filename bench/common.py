"""What every benchmark shares: timing in turn, medians, the machine's description, tables and JSON."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lrcompress

PIPED_WIDTH = 160  # columns of a table that is not shown on a terminal


def arguments(
    description: str, repeats: int, add: Callable[[argparse.ArgumentParser], Any] | None = None
) -> argparse.Namespace:
    """Read --threads, --repeats, --json and what ``add`` adds, and set the threads and the seed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path)
    if add is not None:
        add(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def timed_in_turn(
    methods: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Run all methods once to warm up, then in turn ``repeats`` times; return results and seconds of each."""
    results = {name: run() for name, run in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, run in methods.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return results, seconds


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median, and the range over the median."""
    median = statistics.median(seconds)
    return median, (max(seconds) - min(seconds)) / median


def environment() -> dict[str, Any]:
    """Describe where and with what a figure was taken."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lrcompress": lrcompress.__version__,
    }


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def compared(
    results: Mapping[str, Any],
    times: Mapping[str, Sequence[float]],
    base: str,  # the method that the others are compared with
    error: Callable[[Any], float],  # of a method's result
) -> list[dict[str, Any]]:
    """Return a row a method: median seconds, spread, speed-up and error."""
    reference = median_and_spread(times[base])[0]
    rows = []
    for name, seconds in times.items():
        median, spread = median_and_spread(seconds)
        row = {"method": name, "seconds": median, "spread": spread, "speedup": reference / median}
        rows.append(row | {"error": error(results[name])})
    return rows


def publish(title: str, args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each stretch of rows of equal keys, and write JSON where asked."""
    for _, alike in itertools.groupby(rows, key=tuple):
        print_table(f"{title}, {args.threads} threads", list(alike))
    results = {"threads": args.threads, "repeats": args.repeats, "rows": rows, **environment()}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
