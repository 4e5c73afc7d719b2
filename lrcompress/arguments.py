"""The arguments that commands share, and what they accept."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Preset(str, Enum):
    """The published methods."""

    alds = "alds"
    svd = "svd"
    svd_energy = "svd_energy"
    lrank = "lrank"
    lnr = "lnr"


class ChainingKind(str, Enum):
    """The order in which lnr chooses neurons and fits weights."""

    parallel = "parallel"
    top_down = "top-down"
    bottom_up = "bottom-up"
    bottom_up_top_down = "bottom-up+top-down"


class ErrorKind(str, Enum):
    """The error that ALDS minimises."""

    released = "released"
    bound = "bound"
    sum_bound = "sum_bound"
    exact = "exact"
    frobenius = "frobenius"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:factory, a Module or a function that returns one; looked up here too.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="Weights of the model.", metavar="FILE.safetensors", exists=True, dir_okay=False),
]
DeviceOption = Annotated[str, typer.Option(help="Where the model and its inputs live, such as cuda.")]
ShapesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="1,3,32,32", help="Shape of a random example input; repeat for several arguments."
    ),
]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        help="A file that holds one tensor: the input.",
        metavar="FILE.safetensors",
        exists=True,
        dir_okay=False,
    ),
]
ParamsOption = Annotated[
    str | None,
    typer.Option(
        metavar="AMOUNT", help="Parameters to keep: a fraction with a dot (0.5), or a count (120000)."
    ),
]
MacsOption = Annotated[
    str | None,
    typer.Option(metavar="AMOUNT", help="Multiply-accumulates to keep for one sample; needs an input."),
]
BytesOption = Annotated[
    str | None, typer.Option("--bytes", metavar="AMOUNT", help="Bytes of the parameters to keep.")
]
LatencyOption = Annotated[
    str | None,
    typer.Option(metavar="FRACTION", help="Measured time of a forward to keep, such as 0.6; needs an input."),
]
LatencyMsOption = Annotated[
    str | None, typer.Option(metavar="MS", help="Measured time of a forward in milliseconds; needs an input.")
]
PresetOption = Annotated[
    Preset, typer.Option(help="The method. lnr removes neurons and calibrates on the samples of --inputs.")
]
ErrorOption = Annotated[
    ErrorKind | None, typer.Option(help="The error that alds minimises; by default released.")
]
ChainingOption = Annotated[
    ChainingKind | None, typer.Option(help="The chaining of lnr; by default bottom-up+top-down.")
]
LowRankOption = Annotated[
    bool, typer.Option("--low-rank", help="lnr: let low rank compete with the removal for the budget.")
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers to leave alone, such as 'head.*'; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
