"""Remove channels from a trained ResNet20 by Linear Neural Reconstruction, beside low rank at equal budgets.

    LRCOMPRESS_DATA=<folder> python examples/resnet20_lnr.py

The folder is that of ``resnet20_cifar10.py``. Top-1 on all CIFAR-10 test images, without labels or
fine-tuning; calibrated on the first 1,000 training images. Writes bench/results/resnet20_lnr.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from resnet20_cifar10 import images, top1, trained
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lrcompress as lrc

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "resnet20_lnr.json"
BUDGETS = (0.9, 0.8, 0.7)
RECIPES = {
    "parallel": lrc.lnr("parallel"),
    "bottom-up+top-down": lrc.lnr(),
    "activation_aware": lrc.activation_aware(),
}


def main() -> None:
    """Plan, apply and evaluate every combination; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    if "LRCOMPRESS_DATA" not in os.environ:
        parser.error("set LRCOMPRESS_DATA to the folder with CIFAR-10 and resnet20_cifar10.safetensors")
    folder = Path(os.environ["LRCOMPRESS_DATA"])
    model = trained(folder)
    x, labels = images(folder / "cifar10_test.npz", 10_000)
    batches = list(images(folder / "cifar10_train.npz", 1000)[0].split(100))
    statistics = lrc.collect(model, batches)
    dense = top1(model, x, labels)
    rows = []
    jobs = [(name, budget) for name in RECIPES for budget in BUDGETS]
    for name, budget in track(jobs, console=Console(stderr=True)):
        start = time.perf_counter()
        plan = lrc.plan(
            model, lrc.Budget(params=budget), RECIPES[name], statistics=statistics, example_inputs=x[:1]
        )
        small = lrc.apply(model, plan, batches=batches)
        seconds = time.perf_counter() - start
        kept = plan.params_after / plan.params
        row = {"recipe": name, "budget": budget, "kept": kept, "top1": top1(small, x, labels)}
        rows.append({**row, "seconds": seconds})
    table = Table("recipe", *(f"params {budget}" for budget in BUDGETS), title=f"dense {dense:.2f} %")
    for name in RECIPES:
        table.add_row(name, *(f"{row['top1']:.2f}" for row in rows if row["recipe"] == name))
    Console().print(table)
    results = {"dense": dense, "torch": torch.__version__, "lrcompress": lrc.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
