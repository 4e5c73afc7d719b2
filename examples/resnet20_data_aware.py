"""Compress a trained ResNet20 with 1,000 unlabelled images: what each step of the fit to data is worth.

    LRCOMPRESS_DATA=<folder> python examples/resnet20_data_aware.py [--json results.json] [--only PATTERN]

The folder is that of ``resnet20_cifar10.py``. Top-1 on all CIFAR-10 test images of the merged network; no
labels and no fine-tuning; the calibration images are the first 1,000 of the training set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from resnet20_cifar10 import images, top1, trained
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import add_only, chosen, joined

import lrcompress as lrc

BUDGETS = ({"params": 0.7}, {"params": 0.5}, {"params": 0.35}, {"params": 0.25}, {"macs": 0.5})
DECODERS = lrc.Refinement(sweeps=0)


def ways() -> list[tuple[str, lrc.Recipe, str, lrc.Refinement]]:
    """Return a name, a recipe, what its factors are fitted to, and how."""
    aware, full = lrc.activation_aware(), lrc.Refinement()
    return [
        ("activation_aware, not fitted", aware, "nothing", full),
        ("activation_aware, fitted layer by layer", aware, "statistics", full),
        ("activation_aware, decoders only", aware, "batches", DECODERS),
        ("activation_aware, without prior", aware, "batches", lrc.Refinement(prior=0)),
        ("activation_aware", aware, "batches", full),
        ("activation_aware, branches not weighted", lrc.activation_aware("relative"), "batches", full),
        ("alds", lrc.alds(), "batches", full),
        ("pca", lrc.pca(), "batches", full),
    ]


def main() -> None:
    """Plan, apply and evaluate every combination; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--test-images", type=int, default=10_000)
    add_only(parser)
    args = parser.parse_args()
    recipes = {name: how for name, *how in ways()}
    budgets = {" ".join(f"{key} {value}" for key, value in budget.items()): budget for budget in BUDGETS}
    every = [(name, budget) for name in recipes for budget in budgets]
    jobs = chosen(parser, every, args.only)
    if "LRCOMPRESS_DATA" not in os.environ:
        parser.error("set LRCOMPRESS_DATA to the folder with CIFAR-10 and resnet20_cifar10.safetensors")
    folder = Path(os.environ["LRCOMPRESS_DATA"])
    model = trained(folder)
    x, labels = images(folder / "cifar10_test.npz", args.test_images)
    batches = list(images(folder / "cifar10_train.npz", 1000)[0].split(100))
    dense = top1(model, x, labels)
    start = time.perf_counter()
    statistics = lrc.collect(model, batches)
    collected = time.perf_counter() - start

    data: dict[str, dict[str, Any]] = {
        "nothing": {},
        "statistics": {"statistics": statistics},
        "batches": {"batches": batches},
    }
    rows = []
    for name, budget in track(jobs, console=Console(stderr=True)):
        recipe, fitted_to, how = recipes[name]
        start = time.perf_counter()
        kept = lrc.Budget(**budgets[budget])
        plan = lrc.plan(model, kept, recipe, example_inputs=x[:1], statistics=statistics)
        small = lrc.apply(model, plan, **data[fitted_to], refinement=how)
        seconds = time.perf_counter() - start
        row: dict[str, Any] = {"way": name, "budget": budget}
        row |= {"params": plan.params_after / plan.params, "macs": plan.macs_after / plan.macs}
        rows.append({**row, "seconds": seconds, "top1": top1(lrc.merge(small), x, labels)})

    table = Table(title=f"ResNet20, dense {dense:.2f} %, statistics in {collected:.1f} s: top-1 %")
    table.add_column("way")
    for column in budgets:
        table.add_column(column, justify="right")
    for name in dict.fromkeys(name for name, _ in jobs):
        cells = {row["budget"]: f"{row['top1']:.2f}" for row in rows if row["way"] == name}
        table.add_row(name, *(cells.get(budget, "") for budget in budgets))
    Console().print(table)
    if args.json:
        versions = {
            "torch": torch.__version__,
            "lrcompress": lrc.__version__,
            "machine": platform.processor(),
        }
        results = {"dense": dense, "collected": collected, "versions": versions}
        results["rows"] = joined(args.json, "way", every, rows)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
