"""A Plan and a Verification for people: tables on a terminal and HTML reports."""

from lrcompress.report.html import write_html
from lrcompress.report.plots import plot_plan
from lrcompress.report.sheet import Column, Sheet, scaled
from lrcompress.report.tables import facts_table, plan_table, sheet_table, verification_table

__all__ = [
    "Column",
    "Sheet",
    "facts_table",
    "plan_table",
    "plot_plan",
    "scaled",
    "sheet_table",
    "verification_table",
    "write_html",
]
