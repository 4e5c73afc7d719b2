"""The command line: arguments -> pipeline -> report. torch is imported in commands, to keep help quick."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console, RenderableType

from lrcompress.arguments import (
    BytesOption,
    ChainingKind,
    ChainingOption,
    DeviceOption,
    ErrorKind,
    ErrorOption,
    IgnoreOption,
    InputsOption,
    JsonOption,
    LatencyMsOption,
    LatencyOption,
    LowRankOption,
    MacsOption,
    ModelArgument,
    ParamsOption,
    Preset,
    PresetOption,
    ShapesOption,
    WeightsOption,
)
from lrcompress.types import Budget, CompressionError, Plan, Recipe, Reconstruction

if TYPE_CHECKING:
    from torch import nn

PIPED_WIDTH = 160  # columns of a table that is not shown on a terminal
EXCEEDED = 3  # exit code


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
    preset: PresetOption = Preset.alds,
    error: ErrorOption = None,
    chaining: ChainingOption = None,
    low_rank: LowRankOption = False,
    ignore: IgnoreOption = None,
    weights: WeightsOption = None,
    shapes: ShapesOption = None,
    inputs: InputsOption = None,
    device: DeviceOption = "cpu",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN.json", help="Write the plan.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose ranks for a budget and show them; --json prints what -o writes."""
    from lrcompress import sources
    from lrcompress.report import plan_table

    budget, recipe = (
        _budget(params=params, macs=macs, bytes=held, latency=latency, latency_ms=latency_ms),
        _recipe(preset, error, chaining, low_rank, inputs),
    )
    network = sources.load_model(model, weights, device)
    examples = sources.load_inputs(network, shapes, inputs, device)
    made = _make_plan(network, budget, recipe, examples, ignore)
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
    preset: PresetOption = Preset.alds,
    error: ErrorOption = None,
    chaining: ChainingOption = None,
    low_rank: LowRankOption = False,
    ignore: IgnoreOption = None,
    weights: WeightsOption = None,
    shapes: ShapesOption = None,
    inputs: InputsOption = None,
    device: DeviceOption = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and show, but write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model into a folder, from a budget or from a plan."""
    from lrcompress import calibrate, pipeline, sources
    from lrcompress.report import plan_table

    chosen = (params, macs, held, latency, latency_ms, error, chaining, low_rank, ignore)
    if plan_file is not None and any(chosen):
        raise typer.BadParameter("a plan has its budget, method and ignored layers", param_hint="--plan")
    network = sources.load_model(model, weights, device)
    examples = sources.load_inputs(network, shapes, inputs, device)
    if plan_file is not None:
        made = _read_plan(plan_file)
    else:
        budget = _budget(params=params, macs=macs, bytes=held, latency=latency, latency_ms=latency_ms)
        made = _make_plan(
            network, budget, _recipe(preset, error, chaining, low_rank, inputs), examples, ignore
        )
    with sources.step("compressing"):
        batches = calibrate.in_parts(examples) if inputs and (made.removals or made.splits) else None
        small = pipeline.apply(network, made, batches=batches)  # in a dry run too: refuses what does not fit
    if not dry_run:
        pipeline.save(small, made, output)
    size = None if dry_run else sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        facts = {"artefact": str(output), "dry_run": dry_run, "bytes": size}
        costs = {name: getattr(made, name) for name in ("params", "params_after", "macs", "macs_after")}
        _print_json({**facts, **costs, "plan": json.loads(made.to_json())})
        return
    _print(plan_table(made))
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
    examples = sources.load_inputs(network, shapes, inputs, device)
    if examples is None:
        raise typer.BadParameter("verifying needs --input or --inputs", param_hint="--input")
    with sources.step("verifying"):
        found = measure.verify(network, pipeline.load(artefact, network, device=device), examples)
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


def _budget(**options: str | None) -> Budget:
    """Read the budget options; exactly one must be given."""
    given = {name: text for name, text in options.items() if text is not None}
    if len(given) != 1:
        known = "--params, --macs, --bytes, --latency and --latency-ms"
        raise typer.BadParameter(f"give a budget: exactly one of {known}", param_hint="--params")
    ((name, text),) = given.items()
    try:
        return Budget(**{name: int(text) if text.isdecimal() else float(text)})
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name.replace('_', '-')}") from None


def _recipe(
    preset: Preset,
    error: ErrorKind | None,
    chaining: ChainingKind | None,
    low_rank: bool,
    inputs: Path | None,
) -> Recipe | Reconstruction:
    """Return the method that the options name."""
    from lrcompress import presets

    if error is not None and preset is not Preset.alds:
        raise typer.BadParameter(f"{preset.value} has an error of its own", param_hint="--error")
    if preset is Preset.lnr:
        if inputs is None:
            raise typer.BadParameter("lnr calibrates on samples: give a file of them", param_hint="--inputs")
        rest = presets.activation_aware() if low_rank else None
        return presets.lnr(chaining.value, low_rank=rest) if chaining else presets.lnr(low_rank=rest)
    if chaining or low_rank:
        hint = "--chaining" if chaining else "--low-rank"
        raise typer.BadParameter(f"{preset.value} removes no neurons", param_hint=hint)
    if error is not None:
        return presets.alds(error=error.value)
    chosen: Recipe = getattr(presets, preset.value)()
    return chosen


def _make_plan(
    network: nn.Module, budget: Budget, recipe: Recipe | Reconstruction, inputs: Any, ignore: list[str] | None
) -> Plan:
    from lrcompress import pipeline, sources

    with sources.step("planning"):
        return pipeline.plan(network, budget, recipe, example_inputs=inputs, ignore=ignore or ())


def _read_plan(source: Path) -> Plan:
    """Read a plan from its JSON file or from an artefact's folder."""
    if source.is_dir():
        from lrcompress import pipeline

        return pipeline.load_plan(source)
    return Plan.from_json(source.read_text(encoding="utf-8"))


def _print(renderable: RenderableType) -> None:
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(renderable)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))
