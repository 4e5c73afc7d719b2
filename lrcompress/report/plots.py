"""The plots of a plan as matplotlib figures, for notebooks and papers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrcompress.types import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_plan(plan: Plan) -> Figure:
    """Draw parameters before and after each layer, every layer's error curve, and budget against error.

    Raises:
        ImportError: matplotlib is missing; install the extra ``plots``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lrcompress[plots]'") from error
    figure = Figure(figsize=(12, 4), layout="constrained")
    sizes, curves, budgets = figure.subplots(1, 3)
    names = [entry.layer.name for entry in plan]
    sizes.barh(names, [entry.layer.params for entry in plan], color="#b8c4d0", label="before")
    sizes.barh(names, [entry.choice.params for entry in plan], color="#0072b2", label="after")
    sizes.invert_yaxis()
    sizes.set(xlabel="parameters")
    sizes.legend()
    for entry in plan:
        kept = [point.params / entry.layer.params for point in entry.curve]
        curves.plot(kept, [point.error for point in entry.curve], color="#7f8c99", linewidth=0.8)
        curves.plot(entry.choice.params / entry.layer.params, entry.choice.error, "o", color="#d55e00")
    curves.set(xlabel="fraction of the layer kept", ylabel="error")
    budgets.plot([point.fraction for point in plan.tradeoff], [point.error for point in plan.tradeoff])
    budgets.set(xlabel=f"fraction of {plan.budget.cost} kept", ylabel="objective of the global step")
    return figure
