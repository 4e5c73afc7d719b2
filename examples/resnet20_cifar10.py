"""Compress a trained ResNet20 with every error kind and preset; measure top-1 on all CIFAR-10 test images.

    LRCOMPRESS_DATA=<folder> python examples/resnet20_cifar10.py [--json results.json]

The folder holds ``cifar10_train.npz`` and ``cifar10_test.npz`` (JPEG bytes, offsets, labels) and
``resnet20_cifar10.safetensors``. No labels and no fine-tuning are used; the last columns re-estimate the
batch-norm statistics on 1,000 unlabelled training images. The accuracy is that of the merged network
(``lrc.merge``): the same function, faster to evaluate without fused kernels for its grouped convolutions.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import lrcompress as lrc

BUDGETS = (0.7, 0.5, 0.35, 0.25)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.added = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the input, subsampled and padded with zero channels."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.added // 2
        return F.relu(
            y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))
        )


class ResNet20(nn.Module):
    """The CIFAR-10 network of He et al. 2016 with 269,722 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify 3 x 32 x 32 images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def trained(folder: Path) -> nn.Module:
    """Return the trained network."""
    model = ResNet20()
    model.load_state_dict(load_file(folder / "resnet20_cifar10.safetensors"))
    return model.eval()


def images(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Decode and normalise the first images: [count, 3, 32, 32] and labels [count]."""
    with np.load(path) as file:
        data, offsets, labels = file["jpeg"], file["offsets"], file["labels"]
    decoded = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())))
            for i in range(count)
        ]
    )
    x = torch.from_numpy(decoded).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels[:count].astype(np.int64))


@torch.inference_mode()
def top1(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the accuracy in per cent."""
    found = torch.cat([model(batch).argmax(1) for batch in x.split(250)])
    return float((found == labels).double().mean()) * 100


def recipes() -> list[tuple[str, lrc.Recipe]]:
    """Return every error kind of ALDS, with all fold schemes too, and the other presets."""
    kinds = ("released", "bound", "sum_bound", "exact", "frobenius")
    named = [(f"alds, {kind}", lrc.alds(kind)) for kind in kinds]
    named.append(("alds, released, all schemes", lrc.alds("released", schemes=(0, 1, 2, 3))))
    return [*named, ("svd", lrc.svd()), ("svd_energy", lrc.svd_energy()), ("lrank", lrc.lrank())]


def main() -> None:
    """Plan, apply and evaluate every combination; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--test-images", type=int, default=10_000)
    args = parser.parse_args()
    if "LRCOMPRESS_DATA" not in os.environ:
        parser.error("set LRCOMPRESS_DATA to the folder with CIFAR-10 and resnet20_cifar10.safetensors")
    folder = Path(os.environ["LRCOMPRESS_DATA"])
    model = trained(folder)
    x, labels = images(folder / "cifar10_test.npz", args.test_images)
    calibration, _ = images(folder / "cifar10_train.npz", 1000)
    dense = top1(model, x, labels)

    rows = []
    jobs = [(name, recipe, budget) for name, recipe in recipes() for budget in BUDGETS]
    for name, recipe, budget in track(jobs, console=Console(stderr=True)):
        plan = lrc.plan(model, lrc.Budget(params=budget), recipe, example_inputs=x[:1])
        small = lrc.apply(model, plan)
        row = {"recipe": name, "budget": budget, "params": plan.params_after / plan.params}
        row |= {"macs": plan.macs_after / plan.macs, "error": plan.error}
        row["top1"] = top1(lrc.merge(small), x, labels)
        lrc.reestimate_batchnorm(small, calibration.split(250))
        row["top1_batchnorm"] = top1(lrc.merge(small), x, labels)
        rows.append(row)

    table = Table(
        title=f"ResNet20, dense {dense:.2f} %: top-1 % (after re-estimating batch norm) [largest error]"
    )
    table.add_column("recipe")
    for budget in BUDGETS:
        table.add_column(f"params {budget}", justify="right")
    for name, _ in recipes():
        mine = [row for row in rows if row["recipe"] == name]
        cells = [f"{r['top1']:.2f} ({r['top1_batchnorm']:.2f}) \\[{r['error']:.4f}]" for r in mine]
        table.add_row(name, *cells)
    Console().print(table)
    if args.json:
        versions = {
            "torch": torch.__version__,
            "lrcompress": lrc.__version__,
            "machine": platform.processor(),
        }
        args.json.write_text(
            json.dumps({"dense": dense, "versions": versions, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
