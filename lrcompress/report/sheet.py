"""Tables before they are drawn: what a Plan and a Verification say, as cells of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lrcompress.types import LayerCheck, Option, Plan, Verification

Facts = tuple[tuple[str, str], ...]  # (what, value)


@dataclass(frozen=True)
class Column:
    """The heading of a column and what its cells hold."""

    name: str
    holds: Literal["number", "text", "words"] = (
        "number"  # right-aligned; left-aligned; left-aligned, may wrap
    )


@dataclass(frozen=True)
class Sheet:
    """A table of text: drawn by ``tables`` on a terminal and by ``html`` on a page."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    total: tuple[str, ...] = ()  # a last row that stands apart


def scaled(count: int) -> str:
    """Write a count with three digits and its SI prefix: ``1.23M``."""
    if count < 1000:
        return str(count)
    number = float(count)
    for prefix in ("k", "M", "G"):
        number /= 1000
        if number < 999.5:  # what rounds to 1000 takes the next prefix
            return f"{number:#.3g}".rstrip(".") + prefix
    return f"{number / 1000:.3g}T"


def kept(before: int, after: int) -> str:
    """Write the part that is kept."""
    return f"{after / before:.1%}" if before else "n/a"


def choice_text(option: Option) -> str:
    """Write the configuration of an option: ``s0 g2 r16``."""
    config = option.config
    return f"s{config.scheme} g{config.groups} r{config.rank}" if config else "dense"


def error_text(error: float) -> str:
    """Write an error; nan stands for a choice that was edited in and never evaluated."""
    return "n/a" if math.isnan(error) else f"{error:.4f}"


def plan_facts(plan: Plan) -> Facts:
    """Summarise a plan."""
    return (
        ("recipe", plan.recipe),
        ("budget", str(plan.budget)),
        *_size_facts(plan.params, plan.params_after, plan.macs, plan.macs_after),
        *_memory_facts(plan),
        *_time_facts(plan),
        ("largest error of a layer", error_text(plan.error)),
    )


def verification_facts(check: Verification) -> Facts:
    """Summarise a verification."""
    agreement = () if check.agreement is None else (("same argmax", f"{check.agreement:.1%}"),)
    return (
        ("samples", f"{check.samples:,}"),
        ("output error", error_text(check.output_error)),
        ("largest difference of an output", f"{check.max_difference:.4g}"),
        *agreement,
        *_size_facts(check.params_before, check.params_after, check.macs_before, check.macs_after),
    )


def _size_facts(params: int, params_after: int, macs: int, macs_after: int) -> Facts:
    facts = (("parameters", f"{params:,} -> {params_after:,} ({kept(params, params_after)})"),)
    if not macs:  # planned without example inputs
        return facts
    return (*facts, ("MACs a sample", f"{scaled(macs)} -> {scaled(macs_after)} ({kept(macs, macs_after)})"))


def _memory_facts(plan: Plan) -> Facts:
    if plan.budget.cost != "bytes" or not plan.bytes:
        return ()
    sizes = f"{plan.bytes:,} -> {plan.bytes_after:,} ({kept(plan.bytes, plan.bytes_after)})"
    return (("bytes of the parameters", sizes),)


def _time_facts(plan: Plan) -> Facts:
    if not plan.latency:
        return ()
    before, after = (f"{nanoseconds / 1e6:.3f}" for nanoseconds in (plan.latency, plan.latency_after))
    return (("time of a forward", f"{before} -> {after} ms ({kept(plan.latency, plan.latency_after)})"),)


def layers_sheet(plan: Plan) -> Sheet:
    """Tabulate the choice of each layer, with a last row for the whole model; MACs only where known."""

    def costs(params: int, params_after: int, macs: int, macs_after: int) -> tuple[str, ...]:
        numbers = (params, params_after, macs, macs_after) if plan.macs else (params, params_after)
        return tuple(map(scaled, numbers))

    rows = []
    for entry in plan:
        layer, choice = entry.layer, entry.choice
        shape = "x".join(map(str, layer.weight_shape))
        cells = costs(layer.params, choice.params, layer.macs, choice.macs)
        rows.append((layer.name, shape, choice_text(choice), *cells, error_text(choice.error)))
    whole = costs(plan.params, plan.params_after, plan.macs, plan.macs_after)
    macs = (Column("MACs"), Column("after")) if plan.macs else ()
    return Sheet(
        title="Layers (s: fold scheme, g: groups, r: rank per group)",
        columns=(
            *(Column("layer", "words"), Column("weight", "text"), Column("choice", "text")),
            *(Column("params"), Column("after"), *macs, Column("error")),
        ),
        rows=tuple(rows),
        total=("whole model", "", "", *whole, error_text(plan.error)),
    )


def removals_sheet(plan: Plan) -> Sheet:
    """Tabulate the channels that go, and what the layers that read them lose."""
    rows = []
    for item in plan.removals:
        readers = ", ".join(slot.name for slot in item.coupling.consumers)
        counts = str(item.coupling.channels), str(len(item.kept))
        rows.append((item.coupling.name, readers, *counts, error_text(item.error)))
    return Sheet(
        title="Channels removed, before the layers below are factored",
        columns=(
            *(Column("made by", "words"), Column("read by", "words")),
            *(Column("channels"), Column("after"), Column("error")),
        ),
        rows=tuple(rows),
    )


def splits_sheet(plan: Plan) -> Sheet:
    """Tabulate the splits of the budget between removal and low rank."""
    rows = []
    for split in plan.splits:
        taken = "taken" if split.error == plan.objective else ""
        errors = error_text(split.error), error_text(split.output_error)
        fitted = str(split.samples or "statistics")
        rows.append((f"{split.fraction:.3f}", *errors, fitted, taken))
    return Sheet(
        title="Splits tried: size after the removal, and what low rank on top of it loses",
        columns=(
            *(Column("size"), Column("objective"), Column("output error"), Column("fitted to")),
            Column("", "words"),
        ),
        rows=tuple(rows),
    )


def extra_sheets(plan: Plan) -> tuple[Sheet, ...]:
    """Return the sheets of which a plan has rows, other than the layers."""
    sheets = (splits_sheet(plan), removals_sheet(plan), left_alone_sheet(plan))
    return tuple(sheet for sheet in sheets if sheet.rows)


def left_alone_sheet(plan: Plan) -> Sheet:
    """Tabulate the modules that keep their weights, and why."""
    return Sheet(
        title="Left alone",
        columns=(
            Column("module", "words"),
            Column("kind", "text"),
            Column("params"),
            Column("reason", "words"),
        ),
        rows=tuple((item.name, item.kind, scaled(item.params), item.reason) for item in plan.left_alone),
    )


def checks_sheet(verification: Verification) -> Sheet:
    """Tabulate what each replaced layer gives on the inputs that the original layer saw."""

    def row(check: LayerCheck) -> tuple[str, ...]:
        sizes = scaled(check.params_before), scaled(check.params_after)
        return check.name, check.kind, *sizes, error_text(check.output_error)

    return Sheet(
        title="Layer checks",
        columns=(
            *(Column("layer", "words"), Column("kind", "text")),
            *(Column("params"), Column("after"), Column("output error")),
        ),
        rows=tuple(row(check) for check in verification.layers),
    )
