"""What the command line names: a model, its weights, its inputs. Here the user's own code runs."""

from __future__ import annotations

import importlib
import json
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor, nn

from lrcompress import samples
from lrcompress.samples import Pictures
from lrcompress.types import CompressionError

PICTURES = Pictures()
SEED = 0  # of random inputs, and of a factory's random weights


@dataclass(frozen=True)
class Inputs:
    """What a model is run on."""

    example: Any = None  # what one call of the model takes; None: nothing is known
    batches: list[Any] | None = None  # all samples that were given, in batches; None: none were
    every: Any = None  # the same as one input


@contextmanager
def step(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show what is being done and how long it takes on stderr, where the prints of the user's code go too.

    Yields a function of the steps done and all steps, from which on a percentage is shown.

    Raises:
        CompressionError: whatever the user's code raised, as one line.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as bar, redirect_stdout(sys.stderr):
        task = bar.add_task(doing, total=None)
        try:
            yield lambda done, of: bar.update(task, completed=done, total=of)
        except (CompressionError, OSError):
            raise
        except Exception as error:
            raise CompressionError(f"{doing}: {type(error).__name__}: {error}") from error


def load_model(reference: str, weights: Path | None, device: str) -> nn.Module:
    """Import, call and fill what ``package.module:factory`` names, in evaluation mode.

    Raises:
        CompressionError: no such thing, it failed, or the weights are not all of its weights.
    """
    name, _, attribute = reference.partition(":")
    if not name or not attribute:
        raise typer.BadParameter(f"must be package.module:factory, got {reference!r}", param_hint="MODEL")
    sys.path.insert(0, str(Path.cwd()))
    with step(f"loading {reference}"):
        torch.manual_seed(SEED)
        made = operator.attrgetter(attribute)(importlib.import_module(name))
        torch.manual_seed(SEED)  # again: the same model, whatever importing drew
        model = made if isinstance(made, nn.Module) else made()
        if not isinstance(model, nn.Module):
            raise CompressionError(f"{reference} must give a torch.nn.Module, got {type(model).__name__}")
        model.eval()
    if weights is not None:
        with step(f"loading {weights}"):
            _fill(model, weights)
    with step(f"moving to {device}"):
        return model.to(device)


def _fill(model: nn.Module, weights: Path) -> None:
    stored = _state_dict(weights)
    expected = model.state_dict()
    shared = {name for names in _tied(model) for name in names[1:] if any(n in stored for n in names)}
    missing, unexpected = expected.keys() - stored.keys() - shared, stored.keys() - expected.keys()
    wrong = [
        f"{what} {', '.join(sorted(names))}"
        for what, names in (("lacks", missing), ("adds", unexpected))
        if names
    ]
    for name in sorted(expected.keys() & stored.keys()):
        shapes = [list(getattr(tensors[name], "shape", [])) for tensors in (expected, stored)]
        if shapes[0] != shapes[1]:
            wrong.append(f"gives {name} the shape {shapes[1]} for {shapes[0]}")
    if wrong:
        raise CompressionError(f"{weights} does not fit the model: it {' and '.join(wrong)}")
    model.load_state_dict(stored, strict=False)  # strict would also ask for tied parameters by each name


def _tied(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]


def _state_dict(weights: Path) -> dict[str, Tensor]:
    """Read tensors by name.

    Raises:
        CompressionError: the file is of a kind that is not taken, or holds more than tensors.
    """
    index = (
        next(iter(sorted(weights.glob("*.safetensors.index.json"))), None) if weights.is_dir() else weights
    )
    if index is not None and index.name.endswith(".safetensors.index.json"):
        return _shards(index)
    if weights.is_dir():
        files = sorted(weights.glob("*.safetensors"))
        if len(files) != 1:
            raise CompressionError(
                f"{weights} must hold one .safetensors file or a .safetensors.index.json, got "
                f"{[file.name for file in files]}"
            )
        return load_file(files[0])
    if weights.suffix == ".safetensors":
        return load_file(weights)
    if weights.suffix in (".pt", ".pth", ".bin"):
        found = torch.load(weights, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model", "model_state_dict"):  # where training scripts put it
            found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise CompressionError(f"{weights} must hold tensors by name, got {type(found).__name__}")
        return found
    taken = ".safetensors, a sharded .safetensors.index.json or its folder, .pt, .pth and .bin"
    raise CompressionError(f"{weights} must be one of {taken}")


def _shards(index: Path) -> dict[str, Tensor]:
    """Read the files that an index names, which lie beside it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({Path(place).name for place in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressionError(f"{index} is no index of shards: {error!r}") from None
    tensors = {key: value for name in names for key, value in load_file(index.parent / name).items()}
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise CompressionError(f"{index} names {absent[0]!r}, which is in none of its {len(names)} files")
    return tensors


def load_inputs(
    model: nn.Module,  # whose dtype floating-point inputs take
    shapes: list[str] | None,
    path: Path | None,
    device: str,
    most: int | None = None,
    pictures: Pictures = PICTURES,
) -> Inputs:
    """Read samples, or draw one random normal input.

    Raises:
        CompressionError: nothing can be read, see ``lrcompress.samples``.
    """
    if shapes and path:
        raise typer.BadParameter("give --input or --inputs, not both", param_hint="--input")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if path:
        with step(f"reading {path}"):
            every = samples.moved(samples.read(path, most, pictures, dtype), device)
            batches = samples.in_batches(every)
        return Inputs(batches[0], batches, every)
    if not shapes:
        return Inputs()
    generator = torch.Generator().manual_seed(SEED)
    drawn = tuple(torch.randn(_shape(text), generator=generator).to(device, dtype) for text in shapes)
    example = drawn[0] if len(drawn) == 1 else drawn
    return Inputs(example, None, example)


def pictures(size: int | None, mean: str, std: str) -> Pictures:
    """Read how images become tensors."""
    try:
        numbers = [tuple(float(part) for part in text.split(",")) for text in (mean, std)]
        return Pictures(numbers[0], numbers[1], size)
    except (ValueError, CompressionError) as error:
        raise typer.BadParameter(str(error), param_hint="--mean") from None


def _shape(text: str) -> list[int]:
    """Read a shape: positive numbers with commas between."""
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(
            f"must be positive sizes such as 1,3,32,32, got {text!r}", param_hint="--input"
        )
    return [int(size) for size in sizes]
