"""A demonstration: train a small network on handwritten digits, compress it in several ways, compare."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lrcompress import measure, pipeline, presets
from lrcompress.calibrate import reestimate_batchnorm
from lrcompress.report import Column, Sheet, scaled, write_html
from lrcompress.types import Budget, CompressionError, Plan, Recipe, Reconstruction, Tuning, Verification

SEED = 0
RECIPES: dict[str, Callable[[], Recipe | Reconstruction]] = {
    "activation_aware": presets.activation_aware,
    "lnr": presets.lnr,
    "svd": presets.svd,
}
PLAIN = "svd"  # what the others are compared with: weights alone, no fit
BUDGETS = (0.5, 0.25, 0.1)  # of the parameters
BATCH = 64
LEARNING_RATE = 0.05
CALIBRATION_IMAGES = 400  # unlabelled
CALIBRATION_BATCH = 100
TIMED_BATCH = 256
TUNING_SECONDS = 1.0  # for each network
TIMED_SECONDS = 4.0  # for all networks
ACCEPTED_DROP = 0.01  # of accuracy, by the network that is kept
ABOUT_EQUAL = 0.005  # of accuracy: 3 of the 599 test images


class DigitsNet(nn.Module):
    """Four convolutions with batch norm and a classifier, for 8 x 8 images of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = _block(1, 32)
        self.block2 = _block(32, 64)
        self.block3 = _block(64, 64)
        self.block4 = _block(64, 128)
        self.classifier = nn.Linear(128, 10)

    def forward(
        self,
        images: Tensor,  # [batch, 1, 8, 8]
    ) -> Tensor:
        """Return the logits of the ten digits."""
        features = functional.max_pool2d(self.block2(self.block1(images)), 2)
        features = self.block4(self.block3(features))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def _block(before: int, after: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(after), relu=nn.ReLU()))


@dataclass(frozen=True)
class Digits:
    """Images and labels; a third is held out for testing."""

    train_images: Tensor  # [1198, 1, 8, 8]
    train_labels: Tensor  # [1198]
    test_images: Tensor  # [599, 1, 8, 8]
    test_labels: Tensor  # [599]

    def accuracy(self, model: nn.Module) -> float:
        """Return the part of the test images that the model gets right."""
        model.eval()
        with torch.no_grad():
            return float((model(self.test_images).argmax(1) == self.test_labels).double().mean())


@dataclass(frozen=True)
class Row:
    """What one setting gives; the first row is the network as it was trained."""

    method: str
    budget: float
    params: int
    macs: int
    bytes: int  # on disk
    accuracy: float  # right after compression: no labels
    tuned_accuracy: float | None = None  # and after one epoch of training
    milliseconds: float = 0.0  # a batch of TIMED_BATCH images, median; folded and tuned
    speedup: float = 1.0  # the dense network's time over this one's, both folded, run in turn


@dataclass(frozen=True)
class Candidate:
    """A setting with the network that it gives without labels."""

    row: Row
    model: nn.Module
    plan: Plan
    fast: nn.Module  # tuned and folded
    tuning: Tuning | None


@dataclass(frozen=True)
class Result:
    """All rows, the best row of each budget, the one that was saved, and the folder."""

    rows: tuple[Row, ...]
    best: tuple[Row, ...]
    kept: Row
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        lists = {name: [dataclasses.asdict(row) for row in getattr(self, name)] for name in ("rows", "best")}
        return {**lists, "kept": dataclasses.asdict(self.kept), "output": str(self.output)}

    def closing_words(self) -> str:
        """Say what was reached and written, and what can be tried next."""
        dense, weights = self.rows[0], self.output / "dense.safetensors"
        lines = [
            f"{row.budget:.0%} of the parameters: {row.method}, {row.accuracy:.1%} right "
            f"(dense {dense.accuracy:.1%}), {row.speedup:.2f} times as fast"
            for row in self.best
        ]
        lines += [
            f"kept:   {self.output / 'compressed'} ({self.kept.method} at {self.kept.budget:g}); "
            "loaded again, it holds equal values",
            f"report: {self.output / 'report.html'}",
            "next:   lrcompress compress lrcompress.demo:DigitsNet --params 0.25 --tune -o smaller "
            f"--weights {weights} --inputs {self.output / 'images.safetensors'}",
        ]
        return "\n".join(lines)


def run(
    output: Path,
    epochs: int,
    console: Console,  # for the progress bar
) -> Result:
    """Train, compress without labels, and compare.

    Writes the dense weights, the calibration images, the kept artefact and a report into ``output``.
    Deterministic but for the times.

    Raises:
        CompressionError: scikit-learn is missing, or the reloaded artefact holds other values.
    """
    digits = load_digits()
    output.mkdir(parents=True, exist_ok=True)
    with (
        one_thread(),
        torch.random.fork_rng(devices=[]),
        Progress(console=console, transient=True) as progress,
    ):
        torch.manual_seed(SEED)
        dense = DigitsNet()
        task = progress.add_task("training", total=epochs)
        train(dense, digits, epochs, lambda: progress.advance(task))
        save_file(dense.state_dict(), output / "dense.safetensors")
        save_file({"images": digits.train_images[:CALIBRATION_IMAGES]}, output / "images.safetensors")
        settings = [(method, budget) for budget in BUDGETS for method in RECIPES]
        candidates = [
            compressed(dense, digits, method, budget)
            for method, budget in progress.track(settings, description="compressing")
        ]
        kept = choose(candidates, digits.accuracy(dense))
        check = keep(dense, kept, digits, output / "compressed")
        size = (output / "dense.safetensors").stat().st_size
        first = Row("dense", 1.0, check.params_before, check.macs_before, size, digits.accuracy(dense))
        images = digits.train_images[:TIMED_BATCH]
        models = [pipeline.fold(dense, images), *(candidate.fast for candidate in candidates)]
        rows = timed([first, *(candidate.row for candidate in candidates)], models, images)
    title = f"Digits: {kept.row.method} at {kept.row.budget} of the parameters"
    write_html(output / "report.html", kept.plan, check, title=title, sheets=[comparison(rows)])
    return Result(rows, best_of_each_budget(rows), rows[1 + candidates.index(kept)], output)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: so small a network gains less from threads than it waits for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_digits() -> Digits:
    """Return the digits that come with scikit-learn, scaled to [0, 1]."""
    try:
        from sklearn import datasets, model_selection
    except ImportError:
        raise CompressionError("the demo needs scikit-learn: pip install 'lrcompress[demo]'") from None
    images, labels = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(
        images / 16, labels, test_size=1 / 3, random_state=SEED, stratify=labels
    )
    train_images, test_images = (
        torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in parts[:2]
    )
    train_labels, test_labels = (torch.tensor(part) for part in parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    epoch_done: Callable[[], None] = lambda: None,
) -> None:
    """Train in place, with cross entropy, SGD, and a learning rate that falls to 0 along a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-len(digits.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(digits.train_images)), BATCH):
            loss: Tensor = functional.cross_entropy(
                model(digits.train_images[rows]), digits.train_labels[rows]
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        epoch_done()
    model.eval()


def compressed(dense: nn.Module, digits: Digits, method: str, budget: float) -> Candidate:
    """Compress without labels, measure the accuracy, and again after one epoch of training; tune and fold."""
    images = digits.train_images[:TIMED_BATCH]
    calibration = digits.train_images[:CALIBRATION_IMAGES].split(CALIBRATION_BATCH)
    batches = None if method == PLAIN else calibration
    model, plan = pipeline.compress(
        dense, Budget(params=budget), RECIPES[method](), example_inputs=images, batches=batches
    )
    if method == PLAIN:  # what it needs to be of any use
        reestimate_batchnorm(model, calibration)
    factored = any(entry.choice.config is not None for entry in plan)
    fast, tuning = measure.tune(model, images, seconds=TUNING_SECONDS) if factored else (model, None)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "artefact"
        pipeline.save(model, plan, path)
        size = sum(file.stat().st_size for file in path.iterdir())
    trained = copy.deepcopy(model)
    torch.manual_seed(SEED)  # the same batches for every candidate
    train(trained, digits, epochs=1)
    costs = plan.params_after, plan.macs_after, size
    row = Row(method, budget, *costs, digits.accuracy(model), digits.accuracy(trained))
    return Candidate(row, model, plan, pipeline.fold(fast, images), tuning)


def choose(candidates: list[Candidate], dense_accuracy: float) -> Candidate:
    """Return the smallest network of ours about as accurate as the dense one, or else the most accurate."""
    ours = [candidate for candidate in candidates if candidate.row.method != PLAIN]
    good = [each for each in ours if each.row.accuracy >= dense_accuracy - ACCEPTED_DROP]
    if good:
        return min(good, key=lambda each: each.row.params)
    return max(ours, key=lambda each: each.row.accuracy)


def best_of_each_budget(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return for each budget the fastest of the rows that are about as accurate as the most accurate one."""
    best = []
    for budget in BUDGETS:
        mine = [row for row in rows[1:] if row.budget == budget]
        least = max(row.accuracy for row in mine) - ABOUT_EQUAL
        best.append(max((row for row in mine if row.accuracy >= least), key=lambda row: row.speedup))
    return tuple(best)


def keep(dense: nn.Module, kept: Candidate, digits: Digits, path: Path) -> Verification:
    """Save a network, load it into a new instance, and compare it with the dense one.

    Raises:
        CompressionError: what was loaded holds other values than what was saved.
    """
    tunings = [] if kept.tuning is None else [kept.tuning]
    pipeline.save(kept.model, kept.plan, path, tunings=tunings)
    loaded = pipeline.load(path, DigitsNet(), tuned=False).eval()
    saved = kept.model.state_dict()
    if not all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items()):
        raise CompressionError(f"{path} holds other values than the model that was saved")
    return measure.verify(dense, loaded, digits.test_images)


def timed(rows: list[Row], models: list[nn.Module], images: Tensor) -> tuple[Row, ...]:
    """Add the times, taken in turn, so that whatever else the machine does falls on all alike."""
    named = {str(i): model for i, model in enumerate(models)}
    seconds = measure.seconds_of_models(named, images, images.device, TIMED_SECONDS)
    return tuple(
        dataclasses.replace(row, milliseconds=1000 * seconds[str(i)], speedup=seconds["0"] / seconds[str(i)])
        for i, row in enumerate(rows)
    )


def comparison(rows: tuple[Row, ...]) -> Sheet:
    """Tabulate the rows."""

    def percent(accuracy: float | None) -> str:
        return "" if accuracy is None else f"{accuracy:.1%}"

    def cells(row: Row) -> tuple[str, ...]:
        accuracies = (row.accuracy, row.tuned_accuracy)
        return (
            *(row.method, f"{row.budget:g}", scaled(row.params), scaled(row.macs), f"{row.bytes / 1000:.1f}"),
            *(*map(percent, accuracies), f"{row.milliseconds:.1f}", f"{row.speedup:.2f}"),
        )

    names = (
        "budget",
        "params",
        "MACs",
        "kB",
        "accuracy",
        "an epoch later",
        f"ms / {TIMED_BATCH}",
        "speed-up",
    )
    return Sheet(
        title="Held-out accuracy without labels, and after an epoch of training; times on one thread",
        columns=(Column("method", "text"), *map(Column, names)),
        rows=tuple(map(cells, rows)),
    )
