"""Make trained PyTorch networks smaller and faster by low-rank structure.

plan  = lrc.plan(model, lrc.Budget(params=0.5), lrc.alds(), example_inputs=x)
small = lrc.apply(model, plan)
check = lrc.verify(model, small, x)
lrc.save(small, plan, "out")
again = lrc.load("out", model)
"""

import importlib
from typing import TYPE_CHECKING, Any

from lrcompress.types import (
    Budget,
    BudgetError,
    CompressionError,
    Folding,
    FormatError,
    LowRank,
    Plan,
    PlanError,
    Recipe,
    Refinement,
    Tuning,
    Verification,
    WeightError,
)

if TYPE_CHECKING:
    from lrcompress import nn as nn
    from lrcompress import ops as ops
    from lrcompress.calibrate import CollectionInterrupted, Statistics, reestimate_batchnorm
    from lrcompress.measure import tune, verify
    from lrcompress.pipeline import apply, compress, fold, foldable, load, load_plan, plan, save
    from lrcompress.presets import (
        activation_aware,
        alds,
        kfac_svd,
        lnr,
        lrank,
        pca,
        svd,
        svd_energy,
        svd_llm,
    )
    from lrcompress.refine import collect
    from lrcompress.rewrite import merge, unfuse

__all__ = [
    "Budget",
    "BudgetError",
    "CollectionInterrupted",
    "CompressionError",
    "Folding",
    "FormatError",
    "LowRank",
    "Plan",
    "PlanError",
    "Recipe",
    "Refinement",
    "Statistics",
    "Tuning",
    "Verification",
    "WeightError",
    "activation_aware",
    "alds",
    "apply",
    "collect",
    "compress",
    "fold",
    "foldable",
    "kfac_svd",
    "lnr",
    "load",
    "load_plan",
    "lrank",
    "merge",
    "pca",
    "plan",
    "reestimate_batchnorm",
    "save",
    "svd",
    "svd_energy",
    "svd_llm",
    "tune",
    "unfuse",
    "verify",
]

# Resolved at first use, so that `lrcompress --help` does not wait for torch.
_LAZY = {
    **dict.fromkeys(
        ("apply", "compress", "fold", "foldable", "load", "load_plan", "plan", "save"), "lrcompress.pipeline"
    ),
    **dict.fromkeys(
        ("activation_aware", "alds", "kfac_svd", "lnr", "lrank", "pca", "svd", "svd_energy", "svd_llm"),
        "lrcompress.presets",
    ),
    **dict.fromkeys(("tune", "verify"), "lrcompress.measure"),
    **dict.fromkeys(("merge", "unfuse"), "lrcompress.rewrite"),
    "collect": "lrcompress.refine",
    **dict.fromkeys(("CollectionInterrupted", "Statistics", "reestimate_batchnorm"), "lrcompress.calibrate"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lrcompress")
    if name in ("nn", "ops"):
        return importlib.import_module(f"lrcompress.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lrcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "nn", "ops"]
