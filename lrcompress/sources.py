"""What the command line names: a model, its weights, its inputs. Here the user's own code runs."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn

from lrcompress.types import CompressionError

SEED = 0  # of random inputs, and of a factory's random weights


@contextmanager
def step(doing: str) -> Iterator[None]:
    """Show what is being done, and for how long, on stderr, where the prints of the user's code go too.

    Raises:
        CompressionError: whatever the user's code raised, as one line.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as bar, redirect_stdout(sys.stderr):
        bar.add_task(doing, total=None)  # no step knows its end before it is there
        try:
            yield
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
    missing, unexpected = load_weights(model, weights, strict=False)
    wrong = [
        f"{what} {', '.join(sorted(names))}"
        for what, names in (("lacks", missing), ("adds", unexpected))
        if names
    ]
    if wrong:
        raise CompressionError(f"{weights} does not fit the model: it {' and '.join(wrong)}")


def load_inputs(
    model: nn.Module,  # whose dtype random inputs take
    shapes: list[str] | None,
    file: Path | None,
    device: str,
) -> Tensor | tuple[Tensor, ...] | None:
    """Read one tensor from a file, or draw random normal ones; None where nothing is given.

    Raises:
        CompressionError: the file is damaged or holds another number of tensors.
    """
    if shapes and file:
        raise typer.BadParameter("give --input or --inputs, not both", param_hint="--input")
    if file:
        with step(f"reading {file}"):
            tensors = list(load_file(file, device).values())
        if len(tensors) != 1:
            raise CompressionError(f"{file} must hold one tensor, got {len(tensors)}")
        return tensors[0]
    if not shapes:
        return None
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype, generator = next(dtypes, torch.float32), torch.Generator().manual_seed(SEED)
    drawn = tuple(torch.randn(_shape(text), generator=generator).to(device, dtype) for text in shapes)
    return drawn[0] if len(drawn) == 1 else drawn


def _shape(text: str) -> list[int]:
    """Read a shape: positive numbers with commas between."""
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(
            f"must be positive sizes such as 1,3,32,32, got {text!r}", param_hint="--input"
        )
    return [int(size) for size in sizes]
