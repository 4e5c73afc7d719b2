"""A model as planning sees it: what can be compressed, what it costs, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrcompress import calibrate, rewrite
from lrcompress.types import Call, Layer, LeftAlone


@dataclass
class Subject:
    """The layers of a model that can be compressed; callers may take some out of ``modules``."""

    model: nn.Module
    modules: dict[str, rewrite.Dense]
    left_alone: list[LeftAlone]
    calls: Mapping[str, tuple[Call, ...]]  # of each module, on one sample; empty without example inputs
    macs: int  # of the whole model for one sample; 0 without example inputs

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers in the order of the modules.

        Raises:
            WeightError: a weight is not finite, or on the meta device.
        """
        for name, module in self.modules.items():
            rewrite.check_weight(name, module.weight)
        return tuple(
            rewrite.describe(name, module, self.calls.get(name, ())) for name, module in self.modules.items()
        )

    def total(self, cost: str) -> int:
        """Return what the whole model costs in ``"params"``, ``"macs"`` or ``"bytes"``."""
        if cost == "macs":
            return self.macs
        count = rewrite.count_params if cost == "params" else rewrite.count_bytes
        return count(self.model)


def opened(
    model: nn.Module,  # untouched
    ignored: tuple[str, ...],  # shell patterns
    run: Callable[[], Any] | None,  # runs the model once; None: nothing is known of forwards
    inputs: Any = None,  # which the model may write to
    known: Iterable[str] = (),  # names of layers, those inside of modules to be opened among them
) -> tuple[nn.Module, dict[str, str]]:
    """Open modules whose own forward runs the layer that they derive from; say of the others why not."""
    found = rewrite.own_forwards(model, ignored)
    reasons: dict[str, str | None] = {
        name: f"{rewrite.otherwise(module)}; example_inputs would show what its forward does"
        for name, module in found.items()
    }
    if found and run is not None:
        reasons = calibrate.inner_calls(model, found, run, inputs)
    reasons = {name: reason or rewrite.closed(found[name]) for name, reason in reasons.items()}
    names = {*known, *(name for name, reason in reasons.items() if reason is None)}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    return rewrite.with_opened(model, names), left


def surveyed(
    model: nn.Module,
    ignored: tuple[str, ...],  # shell patterns
    example_inputs: Any,  # run once; None: costs in MACs stay unknown
) -> Subject:
    """Find the layers that can be compressed; those that do not run on the example inputs are left alone."""
    modules, left_alone = rewrite.survey(model, ignored)
    if example_inputs is None:
        return Subject(model, modules, left_alone, {}, 0)
    calls, macs = calibrate.observe_calls(model, modules, example_inputs)
    for name in [name for name in modules if name not in calls]:
        reason = "its forward did not run on the example inputs"
        left_alone.append(rewrite.left_out(name, modules.pop(name), reason))
    return Subject(model, modules, left_alone, calls, macs)
