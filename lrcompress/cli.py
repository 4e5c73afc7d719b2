"""The command line: arguments -> pipeline -> report. torch is imported in commands, to keep help quick."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console, RenderableType

from lrcompress import files
from lrcompress.arguments import (
    BytesOption,
    ChainingOption,
    DeviceOption,
    ErrorOption,
    Fit,
    FitOption,
    IgnoreOption,
    ImageSizeOption,
    InputsOption,
    JsonOption,
    LatencyMsOption,
    LatencyOption,
    LowRankOption,
    MacsOption,
    MeanOption,
    ModelArgument,
    ParamsOption,
    PresetOption,
    SamplesOption,
    ShapesOption,
    StdOption,
    WeightsOption,
)
from lrcompress.types import CompressionError, Plan
from lrcompress.types.plain import LONGEST_JSON

PIPED_WIDTH = 160  # columns of a table that is not shown on a terminal
EXCEEDED = 3  # exit code
MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"  # of ImageNet, as most pretrained networks expect


class Commands(typer.core.TyperGroup):
    """The commands; what a user can mend becomes one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command line."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (CompressionError, OSError) as error:
            if ctx.params["traceback"]:
                raise
            typer.echo(f"lrcompress: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 an error that you can mend, said on stderr; 2 wrong usage; "
    "3 verify found a larger error than --max-error.",
)


def main() -> None:
    """Run the command line: the console script and ``python -m lrcompress``."""
    app(prog_name="lrcompress")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lrcompress {importlib.import_module('lrcompress').__version__}")
        raise typer.Exit


@app.callback()
def lrcompress(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Make trained PyTorch networks smaller and faster by low-rank structure."""


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the report and the artefact.")
    ] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 12,
    as_json: JsonOption = False,
) -> None:
    """Train a small network on handwritten digits, compress it in several ways, and compare."""
    from lrcompress import demo as demonstration
    from lrcompress.report import sheet_table

    result = demonstration.run(output, epochs, Console(stderr=True))
    if as_json:
        _print_json(result.to_dict())
        return
    _print(sheet_table(demonstration.comparison(result.rows)))
    typer.echo(result.closing_words())


@app.command()
def plan(
    model: ModelArgument,
    params: ParamsOption = None,
    macs: MacsOption = None,
    held: BytesOption = None,
    latency: LatencyOption = None,
    latency_ms: LatencyMsOption = None,
    preset: PresetOption = None,
    error: ErrorOption = None,
    chaining: ChainingOption = None,
    low_rank: LowRankOption = False,
    ignore: IgnoreOption = None,
    weights: WeightsOption = None,
    shapes: ShapesOption = None,
    inputs: InputsOption = None,
    samples: SamplesOption = None,
    image_size: ImageSizeOption = None,
    mean: MeanOption = MEAN,
    std: StdOption = STD,
    device: DeviceOption = "cpu",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN.json", help="Write the plan.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose ranks for a budget and show them; --json prints what -o writes."""
    from lrcompress import sources, steps
    from lrcompress.report import plan_table

    budget, recipe = (
        steps.budget(params=params, macs=macs, bytes=held, latency=latency, latency_ms=latency_ms),
        steps.recipe(preset, error, chaining, low_rank, inputs),
    )
    pictures = sources.pictures(image_size, mean, std)
    network = sources.load_model(model, weights, device)
    data = sources.load_inputs(network, shapes, inputs, device, samples, pictures)
    made, _ = steps.planned(network, budget, recipe, data, ignore)
    if output is not None:
        output.write_text(made.to_json() + "\n", encoding="utf-8")
    if as_json:
        typer.echo(made.to_json())
    else:
        _print(plan_table(made))


@app.command()
def compress(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the artefact.")
    ],
    params: ParamsOption = None,
    macs: MacsOption = None,
    held: BytesOption = None,
    latency: LatencyOption = None,
    latency_ms: LatencyMsOption = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", metavar="PLAN.json", exists=True, help="A plan, in place of a budget."),
    ] = None,
    preset: PresetOption = None,
    error: ErrorOption = None,
    chaining: ChainingOption = None,
    low_rank: LowRankOption = False,
    ignore: IgnoreOption = None,
    weights: WeightsOption = None,
    shapes: ShapesOption = None,
    inputs: InputsOption = None,
    samples: SamplesOption = None,
    image_size: ImageSizeOption = None,
    mean: MeanOption = MEAN,
    std: StdOption = STD,
    fit: FitOption = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure which kernels are fastest here, and store the choice.")
    ] = False,
    fold: Annotated[
        bool,
        typer.Option("--fold", help="Let load fold batch norms and activations into layers, for inference."),
    ] = False,
    device: DeviceOption = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and show, but write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model into a folder, from a budget or from a plan."""
    from lrcompress import pipeline, sources, steps
    from lrcompress.report import plan_table

    chosen = (params, macs, held, latency, latency_ms, preset, error, chaining, low_rank, ignore)
    if plan_file is not None and any(chosen):
        raise typer.BadParameter("a plan has its budget, method and ignored layers", param_hint="--plan")
    if fit and fit is not Fit.nothing and inputs is None:
        raise typer.BadParameter("what is fitted to samples needs --inputs", param_hint="--fit")
    if (tune or fold) and not (inputs or shapes):
        hint = "--tune" if tune else "--fold"
        raise typer.BadParameter("the model has to run: give --input or --inputs", param_hint=hint)
    pictures = sources.pictures(image_size, mean, std)
    network = sources.load_model(model, weights, device)
    data = sources.load_inputs(network, shapes, inputs, device, samples, pictures)
    if plan_file is not None:
        made, statistics = _read_plan(plan_file), None
    else:
        budget = steps.budget(params=params, macs=macs, bytes=held, latency=latency, latency_ms=latency_ms)
        recipe = steps.recipe(preset, error, chaining, low_rank, inputs)
        made, statistics = steps.planned(network, budget, recipe, data, ignore)
    small = steps.fitted(network, made, data, fit, statistics)  # in a dry run too: refuses what does not fit
    folding = pipeline.foldable(small, data.example) if fold else None
    tunings, times = steps.tuned(network, small, folding, data, device) if tune else ([], {})
    if not dry_run:
        pipeline.save(small, made, output, tunings=tunings, folding=folding)
    size = None if dry_run else sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        facts = {"artefact": str(output), "dry_run": dry_run, "bytes": size, "milliseconds": times or None}
        costs = {name: getattr(made, name) for name in ("params", "params_after", "macs", "macs_after")}
        _print_json({**facts, **costs, "plan": json.loads(made.to_json())})
        return
    _print(plan_table(made))
    if times:
        dense, ours = times["dense"], times["compressed"]
        typer.echo(f"dense {dense:.2f} ms, compressed {ours:.2f} ms: {dense / ours:.2f} times as fast")
    typer.echo(f"would write {output}" if size is None else f"wrote {output}: {size / 1000:.1f} kB")


@app.command()
def verify(
    model: ModelArgument,
    artefact: Annotated[
        Path, typer.Option(metavar="FOLDER", exists=True, file_okay=False, help="What compress wrote.")
    ],
    weights: WeightsOption = None,
    shapes: ShapesOption = None,
    inputs: InputsOption = None,
    samples: SamplesOption = None,
    image_size: ImageSizeOption = None,
    mean: MeanOption = MEAN,
    std: StdOption = STD,
    device: DeviceOption = "cpu",
    max_error: Annotated[
        float | None, typer.Option(min=0, help="Exit with 3 if the output error is larger.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare an artefact with the original model on the same inputs."""
    from lrcompress import measure, pipeline, sources
    from lrcompress.report import verification_table

    network = sources.load_model(model, weights, device)
    pictures = sources.pictures(image_size, mean, std)
    data = sources.load_inputs(network, shapes, inputs, device, samples, pictures)
    if data.every is None:
        raise typer.BadParameter("verifying needs --input or --inputs", param_hint="--input")
    with sources.step("verifying"):
        found = measure.verify(network, pipeline.load(artefact, network, device=device), data.every)
    exceeded = max_error is not None and not found.output_error <= max_error  # nan exceeds every bound
    if as_json:
        _print_json({**found.to_dict(), "max_error": max_error, "exceeded": exceeded})
    else:
        _print(verification_table(found))
    if exceeded:
        typer.echo(f"lrcompress: output error {found.output_error:.4g} exceeds {max_error:.4g}", err=True)
        raise typer.Exit(EXCEEDED)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(exists=True, help="A plan (JSON) or an artefact's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="REPORT.html", help="The file to write.")],
    as_json: JsonOption = False,
) -> None:
    """Write a plan as one HTML file with tables and plots."""
    from lrcompress.report import write_html

    write_html(output, _read_plan(source), title=f"Compression report: {source.name}")
    if as_json:
        _print_json({"report": str(output)})
    else:
        typer.echo(f"wrote {output}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show what was built, what is installed, and what is missing; exit with 1 if it cannot work."""
    from lrcompress import doctor as examination
    from lrcompress.report import facts_table

    found = examination.examine()
    if as_json:
        _print_json(found)
    else:
        _print(facts_table(examination.facts(found)))
    if found["problems"]:
        raise typer.Exit(1)


def _read_plan(source: Path) -> Plan:
    """Read a plan from its JSON file or from an artefact's folder."""
    if source.is_dir():
        from lrcompress import pipeline

        return pipeline.load_plan(source)
    return Plan.from_json(files.text_of(source, LONGEST_JSON))


def _print(renderable: RenderableType) -> None:
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(renderable)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))
