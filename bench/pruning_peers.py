"""ResNet20 on CIFAR-10 by Torch-Pruning, without labels: top-1 at several sizes, for the picture in README.

    LRCOMPRESS_DATA=<folder> python bench/pruning_peers.py [--json results.json]  # pip install torch-pruning

Whole channels go by the L2 norm of their groups, the same share in every layer or over all layers at once.
Batch norm is re-estimated on the 1,000 unlabelled training images that our methods are fitted to; without
that the networks are far worse.
"""

from __future__ import annotations

import copy
import os
import sys
from argparse import ArgumentParser
from importlib.metadata import version
from pathlib import Path

import torch_pruning
from common import arguments, publish

import lrcompress as lrc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from resnet20_cifar10 import images, top1, trained

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4)  # of the channels that go


def main() -> None:
    """Prune, re-estimate batch norm, evaluate; print a table."""

    def add(parser: ArgumentParser) -> None:
        parser.add_argument("--test-images", type=int, default=10_000)

    args = arguments(__doc__ or "", 1, add)
    folder = Path(os.environ["LRCOMPRESS_DATA"])
    model = trained(folder)
    x, labels = images(folder / "cifar10_test.npz", args.test_images)
    calibration = list(images(folder / "cifar10_train.npz", 1000)[0].split(100))
    params = sum(p.numel() for p in model.parameters())
    rows = []
    for everywhere in (False, True):
        for share in SHARES:
            small = copy.deepcopy(model)
            pruner = torch_pruning.pruner.BasePruner(
                small,
                x[:1],
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=share,
                global_pruning=everywhere,
                ignored_layers=[small.linear],
            )
            pruner.step()
            small.eval()
            lrc.reestimate_batchnorm(small, calibration)
            kept = sum(p.numel() for p in small.parameters()) / params
            way = "over all layers" if everywhere else "the same share in every layer"
            rows.append({"way": way, "share": share, "params": kept, "top1": top1(small, x, labels)})
    publish(f"Torch-Pruning {version('torch-pruning')}, ResNet20", args, rows)


if __name__ == "__main__":
    main()
