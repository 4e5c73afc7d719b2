"""What a user wants of single layers: weights of their errors, and a floor under their sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from lrcompress.types import Layer, PlanError
from lrcompress.types.options import OptionTable


def factors(
    names: Sequence[str],
    weights: Mapping[str, float],  # by shell pattern
) -> list[float]:
    """Return the weight of each layer's errors: of the patterns that match it the last counts, else 1.

    Raises:
        PlanError: a pattern matches no layer, or a weight is not a positive finite number.
    """
    for pattern, weight in weights.items():
        if not _is_number(weight) or not 0 < weight < math.inf:
            raise PlanError(f"weight of {pattern!r} must be a positive finite number, got {weight!r}")
    return _by_layer("weights", names, weights, 1.0)


def weighed(tables: list[OptionTable], factors: list[float]) -> list[OptionTable]:
    """Return the tables with each layer's errors multiplied by its factor."""
    return [replace(table, error=table.error * f) for table, f in zip(tables, factors, strict=True)]


def floored(
    layers: Sequence[Layer],
    tables: list[OptionTable],
    min_keep: float | Mapping[str, float],  # of each layer's parameters: of all, or by shell pattern
) -> list[OptionTable]:
    """Return the tables without factored options below a fraction of the layer's parameters.

    Of the patterns that match a layer the last counts, else there is no floor.

    Raises:
        PlanError: a pattern matches no layer, or a fraction is outside [0, 1].
    """
    given = min_keep if isinstance(min_keep, Mapping) else {"": min_keep}
    for pattern, fraction in given.items():
        if not _is_number(fraction) or not 0 <= fraction <= 1:
            where = f" of {pattern!r}" if pattern else ""
            raise PlanError(f"min_keep{where} must be a fraction in [0, 1], got {fraction!r}")
    if isinstance(min_keep, Mapping):
        floors = _by_layer("min_keep", [layer.name for layer in layers], min_keep, 0.0)
    else:
        floors = [float(min_keep)] * len(layers)
    return [
        table.only((table.groups == 0) | (table.params >= floor * layer.params))
        for layer, table, floor in zip(layers, tables, floors, strict=True)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by_layer(what: str, names: Sequence[str], values: Mapping[str, float], default: float) -> list[float]:
    for pattern in values:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PlanError(f"{what} pattern {pattern!r} matches no layer")
    return [
        next((float(v) for p, v in reversed(list(values.items())) if fnmatchcase(name, p)), default)
        for name in names
    ]
