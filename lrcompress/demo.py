"""A demonstration: train a small network on handwritten digits, compress it in several ways, compare."""

from __future__ import annotations

import dataclasses
import statistics
import time
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
from lrcompress.types import Budget, CompressionError, Plan, Verification

SEED = 0
RECIPES = {"alds": presets.alds, "svd": presets.svd}
BUDGETS = (0.5, 0.3, 0.2, 0.1)  # of the parameters
BATCH = 64
LEARNING_RATE = 0.05
TIMED_BATCH = 256
TIMED_ROUNDS = 21  # odd, so that the median is one of them
ACCEPTED_DROP = 0.01  # of accuracy, by the setting that is kept


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
    accuracy: float  # right after compression
    reestimated_accuracy: float | None = None  # with the statistics of batch norm renewed, without labels
    tuned_accuracy: float | None = None  # and after one epoch of training
    milliseconds: float = 0.0  # a batch of TIMED_BATCH images, median
    speedup: float = 1.0  # the dense network's time over this one's, timed in turn


@dataclass(frozen=True)
class Candidate:
    """A setting with the network that it ends in."""

    row: Row
    model: nn.Module
    plan: Plan


@dataclass(frozen=True)
class Result:
    """All rows, the setting that was kept, and the folder where it lies."""

    rows: tuple[Row, ...]
    kept: Row
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"rows": rows, "kept": dataclasses.asdict(self.kept), "output": str(self.output)}

    def closing_words(self) -> str:
        """Say what was written, and what can be tried next."""
        weights = self.output / "dense.safetensors"
        return "\n".join(
            (
                f"kept:   {self.output / 'compressed'} ({self.kept.method} at {self.kept.budget}); "
                "loaded again, it gives equal outputs",
                f"report: {self.output / 'report.html'}",
                "next:   lrcompress plan lrcompress.demo:DigitsNet --input 1,1,8,8 --params 0.25 "
                f"--weights {weights}",
            )
        )


def run(
    output: Path,
    epochs: int,
    console: Console,  # for the progress bar
) -> Result:
    """Train, compress and compare; write the dense weights, the kept artefact and a report into ``output``.

    Deterministic but for the times.

    Raises:
        CompressionError: scikit-learn is missing, or the reloaded artefact gives other outputs.
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
        settings = [(method, budget) for budget in BUDGETS for method in RECIPES]
        candidates = [
            compress_and_tune(dense, digits, method, budget)
            for method, budget in progress.track(settings, description="compressing")
        ]
        kept = choose(candidates, digits.accuracy(dense))
        check = keep(dense, kept, digits, output / "compressed")
        size = (output / "dense.safetensors").stat().st_size
        first = Row("dense", 1.0, check.params_before, check.macs_before, size, digits.accuracy(dense))
        models = [dense, *(candidate.model for candidate in candidates)]
        images = digits.train_images[:TIMED_BATCH]
        rows = timed([first, *(candidate.row for candidate in candidates)], models, images)
    title = f"Digits: {kept.row.method} at {kept.row.budget} of the parameters"
    write_html(output / "report.html", kept.plan, check, title=title, sheets=[comparison(rows)])
    return Result(rows, rows[1 + candidates.index(kept)], output)


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


def compress_and_tune(dense: nn.Module, digits: Digits, method: str, budget: float) -> Candidate:
    """Compress at a budget, renew batch norm, fine-tune for one epoch; measure the accuracy after each."""
    example = digits.train_images[:1]
    model, plan = pipeline.compress(dense, Budget(params=budget), RECIPES[method](), example_inputs=example)
    accuracy = digits.accuracy(model)
    reestimate_batchnorm(model, torch.split(digits.train_images, TIMED_BATCH))
    reestimated = digits.accuracy(model)
    torch.manual_seed(SEED)  # the same batches for every candidate
    train(model, digits, epochs=1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "artefact"
        pipeline.save(model, plan, path)
        size = sum(file.stat().st_size for file in path.iterdir())
    costs = plan.params_after, plan.macs_after, size
    row = Row(method, budget, *costs, accuracy, reestimated, digits.accuracy(model))
    return Candidate(row, model, plan)


def choose(candidates: list[Candidate], dense_accuracy: float) -> Candidate:
    """Return the smallest ALDS network about as accurate as the dense one, or else the most accurate."""
    ours = [candidate for candidate in candidates if candidate.row.method == "alds"]
    good = [each for each in ours if (each.row.tuned_accuracy or 0) >= dense_accuracy - ACCEPTED_DROP]
    if good:
        return min(good, key=lambda each: each.row.params)
    return max(ours, key=lambda each: each.row.tuned_accuracy or 0)


def keep(dense: nn.Module, kept: Candidate, digits: Digits, path: Path) -> Verification:
    """Save a network, load it into a new instance, and compare it with the dense one.

    Raises:
        CompressionError: what was loaded gives other outputs than what was saved.
    """
    pipeline.save(kept.model, kept.plan, path)
    loaded = pipeline.load(path, DigitsNet()).eval()
    with torch.no_grad():
        if not torch.equal(loaded(digits.test_images), kept.model(digits.test_images)):
            raise CompressionError(f"{path} gives other outputs than the model that was saved")
    return measure.verify(dense, loaded, digits.test_images)


def timed(rows: list[Row], models: list[nn.Module], images: Tensor) -> tuple[Row, ...]:
    """Add the times, taken in turn, so that whatever else the machine does falls on all alike."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(1 + TIMED_ROUNDS):
            for spent, model in zip(times, models, strict=True):
                start = time.perf_counter()
                model(images)
                spent.append(1000 * (time.perf_counter() - start))
    medians = [statistics.median(spent[1:]) for spent in times]  # the first round warms up
    return tuple(
        dataclasses.replace(row, milliseconds=median, speedup=medians[0] / median)
        for row, median in zip(rows, medians, strict=True)
    )


def comparison(rows: tuple[Row, ...]) -> Sheet:
    """Tabulate the rows."""

    def percent(accuracy: float | None) -> str:
        return "" if accuracy is None else f"{accuracy:.1%}"

    def cells(row: Row) -> tuple[str, ...]:
        accuracies = (row.accuracy, row.reestimated_accuracy, row.tuned_accuracy)
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
        "new BN",
        "tuned",
        f"ms / {TIMED_BATCH}",
        "speed-up",
    )
    return Sheet(
        title="Held-out accuracy at once, with renewed batch norm, and one epoch later (times: one thread)",
        columns=(Column("method", "text"), *map(Column, names)),
        rows=tuple(map(cells, rows)),
    )
