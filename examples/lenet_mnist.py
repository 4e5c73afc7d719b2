"""Remove the neurons that LeNet-300-100 and LeNet-5 can do without: every chaining, debiased and not.

    LRCOMPRESS_DATA=<folder> python examples/lenet_mnist.py [--json results.json] [--plot results.svg]

The folder holds ``mnist_t10k.npz`` (images, labels): 8,000 of its images train the two networks of Robin and
Jain's figures, 2,000 are held out. Calibration uses training images without their labels; only the last
column, one epoch of fine-tuning, sees labels again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import typing
from pathlib import Path

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
BUDGETS = {"LeNet-300-100": (0.46, 0.29, 0.2), "LeNet-5": (0.16, 0.1, 0.06)}
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


def reduced(
    model: nn.Module, name: str, chaining: Chaining, budget: float, x: Tensor, labels: Tensor
) -> list[dict[str, object]]:
    """Plan once, then apply with the group lasso's own weights, debiased, and debiased with an epoch more."""
    calibration = x[: CALIBRATION[name]]
    shrunk = lrc.plan(
        model, lrc.Budget(params=budget), lrc.lnr(chaining, debias=False), example_inputs=calibration
    )
    # The supports are the same: least squares is penalty 0.
    removals = tuple(dataclasses.replace(removal, penalty=0.0) for removal in shrunk.removals)
    debiased = dataclasses.replace(shrunk, removals=removals)
    rows = []
    for debias, plan in ((False, shrunk), (True, debiased)):
        small = lrc.apply(model, plan, batches=calibration.split(500))
        row: dict[str, object] = {"network": name, "chaining": chaining, "debias": debias, "budget": budget}
        row["params"] = plan.params_after / plan.params
        row["widths"] = {r.coupling.name: len(r.kept) for r in plan.removals}
        row["error"] = error(small, x[TRAIN:], labels[TRAIN:])
        if debias:
            train(small, x[:TRAIN], labels[:TRAIN], 1, 2e-4, shift=0)
            row["error_retrained"] = error(small, x[TRAIN:], labels[TRAIN:])
        rows.append(row)
    return rows


def table(name: str, dense: float, rows: list[dict[str, typing.Any]]) -> Table:
    """Lay the errors of one network out: a row a strategy, a column a budget."""
    title = f"{name}, dense {dense:.2f} %: error % without labels (after one epoch of fine-tuning)"
    found = Table(title=title)
    found.add_column("chaining")
    for budget in BUDGETS[name]:
        found.add_column(f"params {budget}", justify="right")
    for chaining in typing.get_args(Chaining):
        for debias in (False, True):
            mine = [row for row in rows if (row["chaining"], row["debias"]) == (chaining, debias)]
            cells = [f"{r['error']:.2f}" + (f" ({r['error_retrained']:.2f})" if debias else "") for r in mine]
            found.add_row(f"{chaining}, {'debiased' if debias else 'shrunk'}", *cells)
    return found


def plot(path: Path, dense: dict[str, float], rows: list[dict[str, typing.Any]]) -> None:
    """Draw error against size, a panel a network: full lines debiased, dashed not."""
    from matplotlib.figure import Figure  # optional: the package's extra `plots`

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (name, floor) in zip(
        figure.subplots(1, len(dense), squeeze=False)[0], dense.items(), strict=True
    ):
        axes.axhline(floor, color="black", linewidth=0.8, label="dense")
        for colour, chaining in enumerate(typing.get_args(Chaining)):
            for debias, style in ((True, "-"), (False, "--")):
                key = (name, chaining, debias)
                mine = [r for r in rows if (r["network"], r["chaining"], r["debias"]) == key]
                points = [(100 * r["params"], r["error"]) for r in mine]
                label = chaining if debias else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", marker="o", label=label)
        axes.set(title=name, xlabel="parameters kept, %", ylabel="error, %")
        axes.legend()
    figure.savefig(path)


def main() -> None:
    """Train, reduce, measure; print a table a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw error against size into this file; needs matplotlib")
    parser.add_argument("--network", choices=list(BUDGETS), action="append", help="only this one")
    args = parser.parse_args()
    if "LRCOMPRESS_DATA" not in os.environ:
        parser.error("set LRCOMPRESS_DATA to the folder with mnist_t10k.npz")
    x, labels = images(Path(os.environ["LRCOMPRESS_DATA"]) / "mnist_t10k.npz")
    rows: list[dict[str, typing.Any]] = []
    dense: dict[str, float] = {}
    for name in args.network or BUDGETS:
        torch.manual_seed(0)
        model = train(network(name), x[:TRAIN], labels[:TRAIN], EPOCHS[name], 3e-3)
        dense[name] = error(model, x[TRAIN:], labels[TRAIN:])
        jobs = [(chaining, budget) for chaining in typing.get_args(Chaining) for budget in BUDGETS[name]]
        for chaining, budget in track(jobs, name, console=Console(stderr=True)):
            rows += reduced(copy.deepcopy(model), name, chaining, budget, x, labels)
        Console().print(table(name, dense[name], [row for row in rows if row["network"] == name]))
    if args.plot:
        plot(args.plot, dense, rows)
    if args.json:
        versions = {"torch": torch.__version__, "lrcompress": lrc.__version__}
        args.json.write_text(
            json.dumps({"dense": dense, "versions": versions, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
