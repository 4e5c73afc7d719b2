"""The arguments that commands share, and what they accept."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Preset(str, Enum):
    """The methods: the functions of ``lrcompress.presets``."""

    activation_aware = "activation_aware"
    alds = "alds"
    lnr = "lnr"
    svd = "svd"
    svd_energy = "svd_energy"
    lrank = "lrank"
    pca = "pca"
    svd_llm = "svd_llm"
    kfac_svd = "kfac_svd"


class Fit(str, Enum):
    """What the new weights are fitted to."""

    batches = "batches"
    statistics = "statistics"
    nothing = "nothing"


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
    typer.Option(
        help="Weights of the model: .safetensors, a sharded .safetensors.index.json or the folder that holds "
        "it, or .pt and .pth with plain tensors.",
        metavar="FILE",
        exists=True,
    ),
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
        help="Unlabelled samples to calibrate with: .safetensors, .npz, .npy, or a folder of images. "
        "One tensor is the input; several are arguments by name. 8-bit arrays are images.",
        metavar="PATH",
        exists=True,
    ),
]
SamplesOption = Annotated[
    int | None, typer.Option(min=1, help="Read at most so many samples of --inputs, evenly spaced.")
]
ImageSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Resize and crop images in a folder to so many pixels a side.")
]
MeanOption = Annotated[
    str, typer.Option(metavar="R,G,B", help="Taken from images scaled to 0 to 1; one number: grey images.")
]
StdOption = Annotated[str, typer.Option(metavar="R,G,B", help="What images are divided by after that.")]
FitOption = Annotated[
    Fit | None,
    typer.Option(
        help="What the new weights are fitted to, with --inputs: batches, layer after layer (the default); "
        "statistics, each layer by itself, the safer choice for few samples; or nothing."
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
    Preset | None,
    typer.Option(
        help="The method; by default activation_aware with --inputs, else alds. lnr removes neurons."
    ),
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
