"""Remove channels from a trained ResNet20 by Linear Neural Reconstruction, beside low rank at equal budgets.

    LRCOMPRESS_DATA=<folder> python examples/resnet20_lnr.py [--only PATTERN]

The folder is that of ``resnet20_cifar10.py``. Top-1 on all CIFAR-10 test images, without labels or
fine-tuning; calibrated on the first 1,000 training images, to which all are fitted layer after layer, as are
the splits of a budget between removal and low rank. Writes bench/results/resnet20_lnr.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from resnet20_cifar10 import images, top1, trained
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import add_only, chosen, joined
from torch import Tensor, nn

import lrcompress as lrc
from lrcompress.types import Reconstruction

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "resnet20_lnr.json"
SMALL = (0.5, 0.35, 0.25)
BUDGETS = (0.9, 0.8, 0.7, *SMALL)
BOTH = "bottom-up+top-down, activation_aware on top"
RECIPES = {
    "parallel": lrc.lnr("parallel"),
    "bottom-up+top-down": lrc.lnr(),
    BOTH: lrc.lnr(low_rank=lrc.activation_aware()),
    "activation_aware": lrc.activation_aware(),
}


def measured(
    model: nn.Module, name: str, budget: float, x: Tensor, labels: Tensor, unlabelled: Tensor, known: Any
) -> dict[str, Any]:
    """Plan, apply and evaluate one combination."""
    recipe = RECIPES[name]
    # Splits are judged as they will be fitted: to images, where no statistics are given.
    competes = isinstance(recipe, Reconstruction) and recipe.low_rank is not None
    data = {"example_inputs": unlabelled} if competes else {"example_inputs": x[:1], "statistics": known}
    start = time.perf_counter()
    plan = lrc.plan(model, lrc.Budget(params=budget), recipe, **data)
    planned = time.perf_counter()
    small = lrc.apply(model, plan, batches=unlabelled.split(100))
    row = {"recipe": name, "budget": budget, "kept": plan.params_after / plan.params}
    row |= {"seconds": time.perf_counter() - start, "seconds_plan": planned - start}
    row["splits"] = [dataclasses.asdict(split) for split in plan.splits]
    return {**row, "top1": top1(lrc.merge(small), x, labels)}


def main() -> None:
    """Plan, apply and evaluate every combination; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_only(parser)
    every = [(name, budget) for name in RECIPES for budget in (SMALL if name == BOTH else BUDGETS)]
    jobs = chosen(parser, every, parser.parse_args().only)
    if "LRCOMPRESS_DATA" not in os.environ:
        parser.error("set LRCOMPRESS_DATA to the folder with CIFAR-10 and resnet20_cifar10.safetensors")
    folder = Path(os.environ["LRCOMPRESS_DATA"])
    model = trained(folder)
    x, labels = images(folder / "cifar10_test.npz", 10_000)
    unlabelled, _ = images(folder / "cifar10_train.npz", 1000)
    statistics = lrc.collect(model, unlabelled.split(100))
    dense = top1(model, x, labels)
    rows = [
        measured(model, name, budget, x, labels, unlabelled, statistics)
        for name, budget in track(jobs, console=Console(stderr=True))
    ]
    table = Table("recipe", *(f"params {budget}" for budget in BUDGETS), title=f"dense {dense:.2f} %")
    for name in dict.fromkeys(name for name, _ in jobs):
        cells = {row["budget"]: f"{row['top1']:.2f}" for row in rows if row["recipe"] == name}
        table.add_row(name, *(cells.get(budget, "") for budget in BUDGETS))
    Console().print(table)
    results = {"dense": dense, "torch": torch.__version__, "lrcompress": lrc.__version__}
    results["rows"] = joined(RESULTS, "recipe", every, rows)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
