"""A report as one HTML file: nothing external, plots inside, dark and light."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lrcompress.report.sheet import (
    Facts,
    Sheet,
    checks_sheet,
    choice_text,
    extra_sheets,
    kept,
    layers_sheet,
    plan_facts,
    verification_facts,
)
from lrcompress.report.svg import Axis, Bar, bar_chart, line_chart
from lrcompress.types import Layer, Option, Plan, Verification

# The two data colours are the blue and the vermilion of Okabe and Ito (2008), which colour-blind readers can
# tell apart, and lighter relatives of them on dark ground.
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c2126; --faint: #5f6873; --rule: #d8dee4;
        --before: #c3cbd4; --after: #0072b2; --chosen: #d55e00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15191e; --ink: #e4e8ec; --faint: #9aa4af; --rule: #343c45;
          --before: #4a5561; --after: #56b4e9; --chosen: #f0a050; } }
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
       max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, dt { color: var(--faint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--rule); }
th { color: var(--faint); font-weight: 600; } tfoot td { font-weight: 600; border-bottom: none; }
.number, .text { white-space: nowrap; } .number { text-align: right; }
td.words { overflow-wrap: anywhere; min-width: 8rem; }
.plots { display: flex; flex-wrap: wrap; gap: .8rem; } svg { max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--rule); } .axis { stroke: var(--faint); }
.before { fill: var(--before); } .after { fill: var(--after); }
.curve { fill: none; stroke: var(--after); stroke-width: 1.8; }
line.chosen { stroke: var(--chosen); stroke-dasharray: 4 3; } circle.chosen { fill: var(--chosen); }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
"""


def write_html(
    path: Path,
    plan: Plan,
    verification: Verification | None = None,
    *,
    title: str = "Compression report",
    sheets: Sequence[Sheet] = (),
) -> None:
    """Write a report of a plan, of what was measured if given, and of further sheets, which come first."""
    parts = [f"<h1>{escape(title)}</h1>", *map(_table, sheets), _section("Plan", _facts(plan_facts(plan)))]
    if verification is not None:
        parts.append(_section("Verification", _facts(verification_facts(verification))))
    parts += [
        _size_plot(plan),
        _tradeoff_plot(plan),
        _table(layers_sheet(plan)),
        *map(_table, extra_sheets(plan)),
    ]
    if verification is not None:
        parts.append(_table(checks_sheet(verification)))
    parts.append(_curve_plots(plan))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join(filter(None, parts))
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    Path(path).write_text(page, encoding="utf-8")


def _size_plot(plan: Plan) -> str:
    if not plan.layers:
        return ""
    bars = [
        Bar(
            entry.layer.name,
            entry.layer.params,
            entry.choice.params,
            f"{kept(entry.layer.params, entry.choice.params)}, {choice_text(entry.choice)}",
        )
        for entry in plan
    ]
    key = " &nbsp; ".join(
        f'<span class="key" style="background: var(--{name})"></span>{name}' for name in ("before", "after")
    )
    return _section("Parameters of each layer", f"<p>{key}</p>{bar_chart(bars, 'parameters')}")


def _tradeoff_plot(plan: Plan) -> str:
    if not plan.tradeoff:
        return ""
    before, after = getattr(plan, plan.budget.cost), getattr(plan, f"{plan.budget.cost}_after")
    if not before:  # written by a version that did not count it
        return ""
    points = [(point.fraction, point.error) for point in plan.tradeoff]
    plot = line_chart(
        "",
        points,
        (after / before, math.nan),  # a plan does not hold its objective, which may combine errors
        Axis(f"{plan.budget.cost} kept of the whole model", 1.0),
        Axis("objective", _largest(error for _, error in points)),
        width=620,
        height=300,
    )
    note = "The objective that other budgets reach; the line marks this plan."
    return _section("Budget against error", f"<p>{escape(note)}</p>{plot}")


def _curve_plots(plan: Plan) -> str:
    cost = plan.budget.cost

    def point(option: Option, layer: Layer) -> tuple[float, float]:
        return layer.cost_of(option, cost) / max(layer.cost_of(layer.dense, cost), 1), option.error

    curves = {
        entry.layer.name: (
            [point(option, entry.layer) for option in entry.curve],
            point(entry.choice, entry.layer),
        )
        for entry in plan
        if entry.curve
    }
    if not curves:
        return ""
    x_axis = Axis(f"{cost} kept", max(1.0, *(chosen[0] for _, chosen in curves.values())))
    y_axis = Axis("error", _largest(y for points, chosen in curves.values() for _, y in (*points, chosen)))
    plots = "\n".join(
        line_chart(name, points, chosen, x_axis, y_axis) for name, (points, chosen) in curves.items()
    )
    note = (
        f"The error left by keeping a part of the layer's {cost}, and the chosen option. "
        "All plots have the same axes, so that layers can be compared."
    )
    return _section("Error curves", f'<p>{escape(note)}</p><div class="plots">{plots}</div>')


def _largest(errors: Iterable[float]) -> float:
    least_axis = 1e-6  # an axis needs a length even where every error is 0
    return max([least_axis, *filter(math.isfinite, errors)])


def _section(heading: str, body: str) -> str:
    return f"<h2>{escape(heading)}</h2>\n{body}"


def _facts(facts: Facts) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in facts)
        + "</dl>"
    )


def _table(sheet: Sheet) -> str:
    if not sheet.rows:
        return ""

    def row(cells: Sequence[str], tag: str) -> str:
        parts = (
            f'<{tag} class="{column.holds}">{escape(cell)}</{tag}>'
            for column, cell in zip(sheet.columns, cells, strict=True)
        )
        return f"<tr>{''.join(parts)}</tr>"

    head = row([column.name for column in sheet.columns], "th")
    body = "\n".join(row(cells, "td") for cells in sheet.rows)
    foot = f"<tfoot>{row(sheet.total, 'td')}</tfoot>" if sheet.total else ""
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody>{foot}</table>"
    return _section(sheet.title, f'<div class="scroll">{table}</div>')
