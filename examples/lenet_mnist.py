"""Remove the neurons that LeNet-300-100 and LeNet-5 can do without: every chaining, debiased and not.

    LRCOMPRESS_DATA=<folder> python examples/lenet_mnist.py [--full] [--plot results.svg]

The folder holds ``mnist_t10k.npz`` (images, labels): 8,000 of its images train the two networks of Robin and
Jain's figures, 2,000 are held out. Calibration uses training images without their labels; only the last
column, one epoch of fine-tuning, sees labels again. ``--full`` adds a third budget, low rank alone, and low
rank that competes with the removal. Writes bench/results/lenet.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lrcompress as lrc
from lrcompress.types import Chaining

TRAIN = 8000
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "lenet.json"
BUDGETS = {"LeNet-300-100": (0.46, 0.29), "LeNet-5": (0.16, 0.1)}
SMALLEST = {"LeNet-300-100": 0.2, "LeNet-5": 0.06}
CALIBRATION = {"LeNet-300-100": 8000, "LeNet-5": 2000}  # images; LeNet-5 has 64 patches an image and more
EPOCHS = {"LeNet-300-100": 20, "LeNet-5": 8}


def network(name: str) -> nn.Module:
    """Return an untrained network; LeNet-5 is the one of Caffe."""
    if name == "LeNet-300-100":
        layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
        return nn.Sequential(nn.Flatten(), *layers)
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def images(path: Path) -> tuple[Tensor, Tensor]:
    """Return shuffled and normalised images [10000, 1, 28, 28] and labels [10000]."""
    with np.load(path) as file:
        x = torch.from_numpy(file["images"]).float()[:, None] / 255
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - 0.1307) / 0.3081)[order], labels[order]


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int, rate: float, shift: int = 2) -> nn.Module:
    """Fit a network to images that are shifted by up to ``shift`` pixels; seeded, in place."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    batches = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * batches)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator)[: batches * 64].view(-1, 64):
            down, right = (int(torch.randint(-shift, shift + 1, (), generator=generator)) for _ in range(2))
            loss = F.cross_entropy(model(torch.roll(x[index], (down, right), (2, 3))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def error(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the share of wrong answers in per cent."""
    return float((model(x).argmax(1) != labels).double().mean()) * 100


def plans(
    model: nn.Module, name: str, budget: float, x: Tensor, chainings: Sequence[Chaining]
) -> dict[str, lrc.Plan]:
    """Plan every chaining, not debiased; bottom-up supports are the same whatever weights are fitted to."""
    calibration = x[: CALIBRATION[name]]
    found: dict[str, lrc.Plan] = {}
    for chaining in chainings:
        if chaining == "bottom-up+top-down" and "bottom-up" in found:
            found[chaining] = dataclasses.replace(found["bottom-up"], sequential=True)
        else:
            recipe = lrc.lnr(chaining, debias=False)
            found[chaining] = lrc.plan(model, lrc.Budget(params=budget), recipe, example_inputs=calibration)
    return found


def factored(model: nn.Module, name: str, budget: float, x: Tensor) -> dict[str, lrc.Plan]:
    """Plan low rank alone, and low rank that competes with the removal of neurons."""
    calibration, low_rank = x[: CALIBRATION[name]], lrc.activation_aware(groups=(1,))
    statistics = lrc.collect(model, calibration.split(500))
    kept = lrc.Budget(params=budget)
    return {
        "low rank": lrc.plan(model, kept, low_rank, example_inputs=x[:1], statistics=statistics),
        "removal and low rank": lrc.plan(model, kept, lrc.lnr(low_rank=low_rank), example_inputs=calibration),
    }


def measured(
    model: nn.Module, name: str, way: str, plan: lrc.Plan, x: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """Apply a plan as it is where it shrinks weights, then debiased, then with an epoch of fine-tuning."""
    # The supports are the same: least squares is penalty 0.
    removals = tuple(dataclasses.replace(removal, penalty=0.0) for removal in plan.removals)
    debiased = dataclasses.replace(plan, removals=removals)
    rows = []
    for debias, made in ((False, plan), (True, debiased)):
        if made == debiased and not debias:
            continue
        small = lrc.apply(model, made, batches=x[: CALIBRATION[name]].split(500))
        row: dict[str, Any] = {"network": name, "way": way, "debias": debias}
        row |= {"budget": plan.budget.params, "params": plan.params_after / plan.params}
        row["widths"] = {r.coupling.name: len(r.kept) for r in plan.removals}
        row["splits"] = [dataclasses.asdict(split) for split in plan.splits]
        row["error"] = error(small, x[TRAIN:], labels[TRAIN:])
        if debias:
            train(small, x[:TRAIN], labels[:TRAIN], 1, 2e-4, shift=0)
            row["error_retrained"] = error(small, x[TRAIN:], labels[TRAIN:])
        rows.append(row)
    return rows


def table(name: str, dense: float, rows: list[dict[str, Any]]) -> Table:
    """Lay the errors of one network out: a row a way, a column a budget."""
    title = f"{name}, dense {dense:.2f} %: error % without labels (after one epoch of fine-tuning)"
    found = Table(title=title)
    found.add_column("way")
    for budget in dict.fromkeys(row["budget"] for row in rows):
        found.add_column(f"params {budget}", justify="right")
    shrunk = {row["way"] for row in rows if not row["debias"]}  # low rank has no such variant
    for way, debias in dict.fromkeys((row["way"], row["debias"]) for row in rows):
        mine = [row for row in rows if (row["way"], row["debias"]) == (way, debias)]
        cells = [f"{r['error']:.2f}" + (f" ({r['error_retrained']:.2f})" if debias else "") for r in mine]
        kind = f", {'debiased' if debias else 'shrunk'}" if way in shrunk else ""
        found.add_row(way + kind, *cells)
    return found


def plot(path: Path, dense: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """Draw error against size, a panel a network: full lines debiased, dashed not."""
    from matplotlib.figure import Figure  # optional: the package's extra `plots`

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (name, floor) in zip(
        figure.subplots(1, len(dense), squeeze=False)[0], dense.items(), strict=True
    ):
        axes.axhline(floor, color="black", linewidth=0.8, label="dense")
        ways = dict.fromkeys(row["way"] for row in rows)
        for colour, way in enumerate(ways):
            for debias, style in ((True, "-"), (False, "--")):
                key = (name, way, debias)
                mine = [r for r in rows if (r["network"], r["way"], r["debias"]) == key]
                points = [(100 * r["params"], r["error"]) for r in mine]
                if not points:
                    continue
                label = way if debias else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", marker="o", label=label)
        axes.set(title=name, xlabel="parameters kept, %", ylabel="error, %")
        axes.legend()
    figure.savefig(path)


def main() -> None:
    """Train, reduce, measure; print a table a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="a third budget and low rank")
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw error against size into this file; needs matplotlib")
    args = parser.parse_args()
    if "LRCOMPRESS_DATA" not in os.environ:
        parser.error("set LRCOMPRESS_DATA to the folder with mnist_t10k.npz")
    x, labels = images(Path(os.environ["LRCOMPRESS_DATA"]) / "mnist_t10k.npz")
    rows: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    for name, budgets in BUDGETS.items():
        torch.manual_seed(0)
        model = train(network(name), x[:TRAIN], labels[:TRAIN], EPOCHS[name], 3e-3)
        dense[name] = error(model, x[TRAIN:], labels[TRAIN:])
        every = (*budgets, SMALLEST[name]) if args.full else budgets
        for budget in track(every, name, console=Console(stderr=True)):
            made = plans(model, name, budget, x, typing.get_args(Chaining))
            made |= factored(model, name, budget, x) if args.full else {}
            for way, plan in made.items():
                rows += measured(model, name, way, plan, x, labels)
        Console().print(table(name, dense[name], [row for row in rows if row["network"] == name]))
    if args.plot:
        plot(args.plot, dense, rows)
    versions = {"torch": torch.__version__, "lrcompress": lrc.__version__}
    results = {"dense": dense, "held_out": len(x) - TRAIN, "versions": versions, "rows": rows}
    args.json.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
