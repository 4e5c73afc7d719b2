"""Sheets on a terminal, through rich."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrcompress.report.sheet import (
    Facts,
    Sheet,
    checks_sheet,
    extra_sheets,
    layers_sheet,
    plan_facts,
    verification_facts,
)
from lrcompress.types import Plan, Verification


def plan_table(plan: Plan) -> RenderableType:
    """Draw a plan: summary, one row a layer with a total, what goes, and the modules left alone."""
    sheets = (layers_sheet(plan), *extra_sheets(plan))
    return Group(facts_table(plan_facts(plan)), *map(sheet_table, sheets))


def verification_table(verification: Verification) -> RenderableType:
    """Draw a verification: summary, and one row a replaced layer."""
    return Group(facts_table(verification_facts(verification)), sheet_table(checks_sheet(verification)))


def sheet_table(sheet: Sheet) -> RenderableType:
    """Draw a sheet; words fold rather than lose letters, and square brackets in them are no markup."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_footer=bool(sheet.total))
    footer = sheet.total or ("",) * len(sheet.columns)
    for column, cell in zip(sheet.columns, footer, strict=True):
        table.add_column(
            column.name,
            footer=Text(cell),
            justify="right" if column.holds == "number" else "left",
            no_wrap=column.holds == "number",
            overflow="fold",
            min_width=12 if column.holds == "words" else None,
        )
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return Group(Text(f"\n{sheet.title}", style="bold"), table)


def facts_table(facts: Facts) -> RenderableType:
    """Draw a summary as two columns."""
    table = Table.grid(padding=(0, 2))
    for what, value in facts:
        table.add_row(Text(what, style="dim"), Text(value))
    return table
