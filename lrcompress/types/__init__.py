"""The values that travel between rooms: frozen dataclasses, validation only, no torch.

``types.options`` is imported by name: it needs NumPy, which the command line's help should not wait for.
"""

from lrcompress.types.coupling import Coupling, Held, Removal, Slot, Wiring
from lrcompress.types.errors import BudgetError, CompressionError, FormatError, PlanError, WeightError
from lrcompress.types.folding import Fold, Folding, Uses
from lrcompress.types.layer import Call, Layer, LowRank, Option, encoder_axes
from lrcompress.types.plain import from_plain, to_plain
from lrcompress.types.plan import Budget, LayerPlan, LeftAlone, Plan, Split, Tradeoff
from lrcompress.types.recipe import Chaining, GlobalStep, LocalStep, Recipe, Reconstruction
from lrcompress.types.statistics import LayerStatistics, Refinement
from lrcompress.types.tuning import LayerTuning, Tuning
from lrcompress.types.verification import LayerCheck, Verification

__all__ = [
    "Budget",
    "BudgetError",
    "Call",
    "Chaining",
    "CompressionError",
    "Coupling",
    "Fold",
    "Folding",
    "FormatError",
    "GlobalStep",
    "Held",
    "Layer",
    "LayerCheck",
    "LayerPlan",
    "LayerStatistics",
    "LayerTuning",
    "LeftAlone",
    "LocalStep",
    "LowRank",
    "Option",
    "Plan",
    "PlanError",
    "Recipe",
    "Reconstruction",
    "Refinement",
    "Removal",
    "Slot",
    "Split",
    "Tradeoff",
    "Tuning",
    "Uses",
    "Verification",
    "WeightError",
    "Wiring",
    "encoder_axes",
    "from_plain",
    "to_plain",
]
