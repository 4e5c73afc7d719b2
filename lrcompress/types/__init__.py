"""The values that travel between rooms: frozen dataclasses, validation only, no torch.

``types.options`` is imported by name: it needs NumPy, which the command line's help should not wait for.
"""

from lrcompress.types.errors import BudgetError, CompressionError, FormatError, PlanError, WeightError
from lrcompress.types.layer import Call, Layer, LowRank, Option, encoder_axes
from lrcompress.types.plan import Budget, LayerPlan, LeftAlone, Plan, Tradeoff, from_plain, to_plain
from lrcompress.types.recipe import GlobalStep, LocalStep, Recipe
from lrcompress.types.tuning import LayerTuning, Tuning
from lrcompress.types.verification import LayerCheck, Verification

__all__ = [
    "Budget",
    "BudgetError",
    "Call",
    "CompressionError",
    "FormatError",
    "GlobalStep",
    "Layer",
    "LayerCheck",
    "LayerPlan",
    "LayerTuning",
    "LeftAlone",
    "LocalStep",
    "LowRank",
    "Option",
    "Plan",
    "PlanError",
    "Recipe",
    "Tradeoff",
    "Tuning",
    "Verification",
    "WeightError",
    "encoder_axes",
    "from_plain",
    "to_plain",
]
