"""A budget, and the plan that meets it: immutable, printable, editable, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lrcompress.types.coupling import Removal
from lrcompress.types.errors import BudgetError, PlanError
from lrcompress.types.layer import Layer, LowRank, Option
from lrcompress.types.plain import LARGEST, from_plain, parsed, shown, to_plain

PLAN_FORMAT = 5  # raised whenever plans written before could no longer be read
_ADDED = {"bytes": 0, "saved_bytes": 0}  # fields that the first plans of this format lack


@dataclass(frozen=True)
class Budget:
    """How much of the whole model may be KEPT: a fraction (float in (0, 1]) or a count (int).

    ``params`` counts every parameter of the model, ``bytes`` their memory as the model holds them, ``macs``
    the multiply-accumulates of one sample's forward.
    ``latency`` is a fraction of the time of one forward in inference, ``latency_ms`` that time in
    milliseconds: both measured, on the device of the model.

    Raises:
        BudgetError: not exactly one of them, or not a positive finite number.
    """

    params: float | int | None = None
    macs: float | int | None = None
    bytes: float | int | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        known = [field.name for field in dataclasses.fields(self)]
        given = [name for name in known if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(f"give exactly one of {', '.join(known)}, got {given or 'none'}")
        (name,) = given
        value = getattr(self, name)
        if hasattr(value, "__index__") and not isinstance(value, bool):
            value = operator.index(value)  # NumPy's integers too
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BudgetError(f"{name} must be a finite number, got {value!r}")
        if not 0 < value <= LARGEST:
            raise BudgetError(f"{name} must be positive and no larger than any network, got {value}")
        if name.startswith("latency"):
            value = float(value)
        if isinstance(value, float) and value > 1 and name != "latency_ms":
            count = "" if name == "latency" else " or an int count"
            raise BudgetError(f"{name} must be a fraction in (0, 1]{count}, got {value}")
        object.__setattr__(self, name, value)

    @property
    def cost(self) -> str:
        """What is bounded: ``"params"``, ``"macs"``, ``"bytes"`` or ``"latency"``."""
        return self._given.removesuffix("_ms")

    @property
    def _given(self) -> str:
        return next(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)

    def limit(self, total: int) -> int:
        """Largest cost allowed to a model that costs ``total``; for latency in nanoseconds."""
        value: float | int = getattr(self, self._given)
        if self.latency_ms is not None:
            return math.floor(1e6 * value)
        return math.floor(value * total) if isinstance(value, float) else value

    def __str__(self) -> str:
        return f"{self._given}={getattr(self, self._given)}"


@dataclass(frozen=True)
class LeftAlone:
    """A module that keeps its weights, and why."""

    name: str
    kind: str
    params: int
    reason: str


@dataclass(frozen=True)
class LayerPlan:
    """One layer's choice, with the thinned error curve that it was chosen from."""

    layer: Layer
    choice: Option
    curve: tuple[Option, ...] = ()  # along the Pareto front, cost rising


@dataclass(frozen=True)
class Tradeoff:
    """What another budget would have cost: the fraction kept and the objective reached."""

    fraction: float
    error: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.fraction):
            raise PlanError(f"fraction must be finite, got {self.fraction}")


@dataclass(frozen=True)
class Split:
    """How small removed neurons alone made the network, and what is lost once low rank has done the rest."""

    fraction: float  # of the cost that the budget bounds; 1: no neuron went
    error: float  # the objective: predicted, layer by layer
    output_error: float = math.nan  # relative, of the model's outputs on all samples: measured
    samples: int = 0  # that the measured model was fitted to, layer after layer; 0: to statistics


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer; ``edit`` and ``keep_dense`` return changed copies."""

    recipe: str
    budget: Budget
    params: int  # of the whole model, before
    macs: int  # of the whole model for one sample, before; 0 without example inputs
    layers: tuple[LayerPlan, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    tradeoff: tuple[Tradeoff, ...] = ()
    latency: int = 0  # nanoseconds of one forward of the whole model, before; 0: not measured
    removals: tuple[Removal, ...] = ()  # made first: `layers` are those of the network without these channels
    saved_params: int = 0  # by the removals
    saved_macs: int = 0
    sequential: bool = False  # weights behind removed channels are fitted to what the reduced layers give
    objective: float | None = None  # what the global step minimises, weighted errors combined; None: edited
    bound: float | None = None  # no choice within the budget has an objective below; None: not known
    splits: tuple[Split, ...] = ()  # tried between removal and low rank; the nearest outputs were taken
    bytes: int = 0  # of the whole model's parameters in memory, before; 0: not known
    saved_bytes: int = 0  # by the removals

    def __post_init__(self) -> None:
        names = [entry.layer.name for entry in self.layers]
        if len(set(names)) < len(names):
            raise PlanError(f"layers must have names of their own, got {names}")

    @property
    def params_after(self) -> int:
        """Parameters of the whole model once the plan is applied."""
        return (
            self.params
            - self.saved_params
            - sum(entry.layer.params - entry.choice.params for entry in self.layers)
        )

    @property
    def macs_after(self) -> int:
        """Multiply-accumulates of the whole model for one sample once the plan is applied."""
        return (
            self.macs - self.saved_macs - sum(entry.layer.macs - entry.choice.macs for entry in self.layers)
        )

    @property
    def bytes_after(self) -> int:
        """Bytes of the whole model's parameters in memory once the plan is applied."""
        saved = sum((e.layer.params - e.choice.params) * e.layer.itemsize for e in self.layers)
        return self.bytes - self.saved_bytes - saved

    @property
    def latency_after(self) -> int:
        """Nanoseconds of one forward of the whole model once the plan is applied, from the layers' times.

        Layers whose choice was not measured count as they were.
        """
        measured = (entry for entry in self.layers if entry.choice.latency)
        return self.latency - sum(entry.layer.latency - entry.choice.latency for entry in measured)

    @property
    def error(self) -> float:
        """Largest error of a layer, in the unit of the recipe's local step."""
        errors = [entry.choice.error for entry in self.layers] + [removal.error for removal in self.removals]
        return max(errors, default=0.0)

    def __getitem__(self, name: str) -> LayerPlan:
        for entry in self.layers:
            if entry.layer.name == name:
                return entry
        raise PlanError(f"the plan has no layer {name!r}; it has {[e.layer.name for e in self.layers]}")

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def edit(self, name: str, *, rank: int, groups: int | None = None, scheme: int | None = None) -> Plan:
        """Return a plan with another configuration for one layer; its error is nan (not evaluated).

        Groups and scheme not given stay what they are; a dense layer starts from one group and scheme 0.

        Raises:
            PlanError: no such layer, or a configuration that the layer cannot take.
        """
        now = self[name].choice.config or LowRank(scheme=0, groups=1, rank=1)
        config = LowRank(
            now.scheme if scheme is None else scheme, now.groups if groups is None else groups, rank
        )
        return self._with_choice(name, self[name].layer.option(config))

    def keep_dense(self, name: str) -> Plan:
        """Return a plan that leaves one layer as it is.

        Raises:
            PlanError: no such layer.
        """
        return self._with_choice(name, self[name].layer.dense)

    def _with_choice(self, name: str, choice: Option) -> Plan:
        layers = (
            dataclasses.replace(entry, choice=choice) if entry.layer.name == name else entry for entry in self
        )
        return dataclasses.replace(self, layers=tuple(layers), objective=None, bound=None)

    def to_json(self) -> str:
        """Return JSON text that ``Plan.from_json`` reads back to an equal plan."""
        return json.dumps({"plan_format": PLAN_FORMAT, **to_plain(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanError: not a plan, another format, or a choice that a layer cannot take or prices differently.
        """
        try:
            fields = parsed(text)
        except ValueError as error:
            raise PlanError(f"a plan must be JSON: {error}") from None
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: Any) -> Plan:
        """Read a plan back from what its JSON holds; raises as ``from_json``."""
        found = fields.get("plan_format") if isinstance(fields, dict) else type(fields).__name__
        if type(found) is not int or found != PLAN_FORMAT:
            raise PlanError(f"plan_format must be {PLAN_FORMAT}, got {shown(found)}")
        given = {name: value for name, value in fields.items() if name != "plan_format"}
        plan: Plan = from_plain(cls, _ADDED | given)
        plan._check_sizes()
        return plan

    def _check_sizes(self) -> None:
        """Refuse sizes that are not those of the plan's own layers."""
        for entry in self:
            for option in (entry.choice, *entry.curve):
                config = option.config
                priced = entry.layer.option(config) if config else entry.layer.dense
                if (priced.params, priced.macs) != (option.params, option.macs):
                    raise PlanError(
                        f"layer {entry.layer.name!r}: {config or 'dense'} costs {priced}, got {option}"
                    )
        planned = sum(entry.layer.params for entry in self)
        for name, least in (("params", planned), ("macs", 0), ("bytes", 0), ("latency", 0)):
            total, saved = getattr(self, name), getattr(self, f"saved_{name}", 0)
            if total < 0 or abs(saved) > total or total - saved < least:
                raise PlanError(f"{name} must be at least the layers' {least}, got {total} less {saved}")

    def __str__(self) -> str:
        width = max([len("layer"), *(len(entry.layer.name) for entry in self)])
        narrowed = [
            f"removed from {item.coupling.name}: {item.coupling.channels} -> {len(item.kept)} channels, "
            f"error {item.error:.4f}"
            for item in self.removals
        ]
        narrowed += [
            f"removed down to {split.fraction:.3f}, then low rank: objective {split.error:.4g}, "
            f"output error {split.output_error:.4f}"
            + (f" fitted to {split.samples} samples" if split.samples else "")
            for split in self.splits
        ]
        rows = [f"{'layer':<{width}}  {'weight':<16} {'choice':<32} {'params':>18} {'error':>8}"]
        rows[0] += f" {'ms':>16}" if self.latency else ""
        for entry in self:
            shape = "x".join(map(str, entry.layer.weight_shape))
            size = f"{entry.layer.params} -> {entry.choice.params}"
            choice = str(entry.choice.config or "dense")
            rows.append(
                f"{entry.layer.name:<{width}}  {shape:<16} {choice:<32} {size:>18} {entry.choice.error:>8.4f}"
            )
            if self.latency:
                rows[-1] += f" {_ms(entry.layer.latency):>6} -> {_ms(entry.choice.latency):>6}"
        rows += [f"left alone: {item.name} ({item.kind}): {item.reason}" for item in self.left_alone]
        kept = f"params {self.params} -> {self.params_after} ({self.params_after / max(self.params, 1):.3f})"
        if self.macs:
            kept += f", macs {self.macs} -> {self.macs_after} ({self.macs_after / self.macs:.3f})"
        if self.budget.cost == "bytes" and self.bytes:
            kept += f", bytes {self.bytes} -> {self.bytes_after} ({self.bytes_after / self.bytes:.3f})"
        if self.latency:
            kept += f", {_ms(self.latency)} -> {_ms(self.latency_after)} ms measured"
            kept += f" ({self.latency_after / self.latency:.3f})"
        kept += self._optimality
        return "\n".join([f"{self.recipe}, budget {self.budget}", *narrowed, *rows, kept])

    @property
    def _optimality(self) -> str:
        if self.objective is None:
            return ""
        reached = f", objective {self.objective:.4g}"
        if self.bound is None:
            return reached
        if self.objective <= self.bound * (1 + 1e-9):  # sums in another order
            return reached + ", the least possible"
        if self.bound <= 0:
            return reached + f", the least possible is at least {self.bound:.4g}"
        above = math.ceil(1000 * (self.objective / self.bound - 1)) / 10
        return reached + f", at most {above} % above the least possible"


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.3f}"
