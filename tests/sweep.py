"""What every network must be capable of: each property is checked on one network and says what was found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from architectures import SAMPLES, Architecture
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import lrcompress as lrc
from lrcompress import removal, rewrite
from lrcompress.types import Coupling, Removal

SAME = 1e-3  # of the largest output: fits go through moments
EQUAL = 1e-4  # of the largest output: the same float32 function, sums in another order
REMOVED = 1e-9  # of the largest output in float64
TAKEN = 0.3  # of the weights that can be factored


@dataclass
class Subject:
    """A network with its inputs, and what several properties look at."""

    architecture: Architecture
    folder: Path  # to save into

    @cached_property
    def model(self) -> nn.Module:
        return self.architecture.built()

    @cached_property
    def batches(self) -> list[Any]:
        torch.manual_seed(1)
        return [self.architecture.inputs(SAMPLES) for _ in range(2)]

    @cached_property
    def unseen(self) -> Any:
        """Inputs that nothing was fitted to, shifted where they are numbers."""
        torch.manual_seed(2)
        return tree_map(lambda x: x + 0.5 if x.is_floating_point() else x, self.architecture.inputs(SAMPLES))

    @cached_property
    def statistics(self) -> lrc.Statistics:
        return lrc.collect(self.model, self.batches)

    @cached_property
    def layers(self) -> lrc.Plan:
        """The plan that keeps every layer."""
        return lrc.plan(self.model, lrc.Budget(params=1.0), lrc.svd(), example_inputs=self.batches[0])

    @cached_property
    def budget(self) -> lrc.Budget:
        return lrc.Budget(params=self.layers.params - int(TAKEN * sum(e.layer.params for e in self.layers)))

    @cached_property
    def plan(self) -> lrc.Plan:
        return lrc.plan(
            self.model,
            self.budget,
            lrc.activation_aware(),
            statistics=self.statistics,
            example_inputs=self.batches[0],
        )

    @cached_property
    def by_weights(self) -> lrc.Plan:
        return lrc.plan(self.model, self.budget, lrc.svd(), example_inputs=self.batches[0])

    @cached_property
    def small(self) -> nn.Module:
        """The network compressed without data: what comes after fits is tested on its own."""
        return lrc.apply(self.model, self.by_weights)


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the floating tensors among the outputs."""
    with torch.no_grad():
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    found = [y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]
    assert found, "no outputs"
    return found


def assert_close(model: nn.Module, other: nn.Module, inputs: Any, tolerance: float) -> None:
    """Compare all outputs; the tolerance is a share of each one's largest number."""
    for wanted, found in zip(run(model, inputs), run(other, inputs), strict=True):
        assert wanted.shape == found.shape
        error = float((found - wanted).abs().max() / wanted.abs().max())
        assert error <= tolerance, f"{error:.1e} > {tolerance:.0e}"


def layers(subject: Subject) -> str:
    count, weights = len(subject.layers.layers), sum(entry.layer.params for entry in subject.layers)
    assert count, "no layer"
    return f"{count} ({100 * weights / subject.layers.params:.0f} %)"


def full_rank(subject: Subject, **data: Any) -> str:
    plan = subject.layers
    for entry in subject.layers:
        plan = plan.edit(entry.layer.name, rank=entry.layer.full_rank(0, 1), groups=1, scheme=0)
    same = lrc.apply(subject.model, plan, **data)
    for inputs in (subject.batches[0], subject.unseen):
        assert_close(subject.model, same, inputs, SAME)
    return "yes"


def full_rank_statistics(subject: Subject) -> str:
    return full_rank(subject, statistics=subject.statistics)


def full_rank_batches(subject: Subject) -> str:
    return full_rank(subject, batches=subject.batches)


def full_rank_decoders(subject: Subject) -> str:
    return full_rank(subject, batches=subject.batches, refinement=lrc.Refinement(sweeps=0))


def within_budget(subject: Subject, **data: Any) -> str:
    """Fit the activation-aware plan; return the error of the outputs."""
    small = lrc.apply(subject.model, subject.plan, **data)
    check = lrc.verify(subject.model, small, subject.batches[0])
    wanted, kept = subject.plan.params_after, check.params_after
    assert kept == wanted == sum(p.numel() for p in small.parameters()), f"{kept} params of {wanted}"
    assert kept <= subject.budget.limit(check.params_before), f"{kept} params for {subject.budget}"
    assert check.macs_after < check.macs_before, f"{check.macs_before} -> {check.macs_after} MACs"
    assert all(
        y.isfinite().all() for inputs in (*subject.batches, subject.unseen) for y in run(small, inputs)
    )
    assert check.output_error < 1, f"{check.output_error:.2f}, none at all would be 1"
    return f"{check.output_error:.3f}"


def aware_statistics(subject: Subject) -> str:
    return within_budget(subject, statistics=subject.statistics)


def aware_batches(subject: Subject) -> str:
    return within_budget(subject, batches=subject.batches)


def saved(subject: Subject) -> str:
    lrc.save(subject.small, subject.by_weights, subject.folder)
    with torch.device("meta"):
        skeleton = subject.architecture.make().eval()
    again = lrc.load(subject.folder, skeleton)
    for wanted, found in zip(run(subject.small, subject.unseen), run(again, subject.unseen), strict=True):
        assert torch.equal(wanted, found), f"differs by {float((wanted - found).abs().max()):.1e}"
    return "yes"


def folded(subject: Subject) -> str:
    for model in (subject.model, subject.small):
        assert_close(model, lrc.fold(model, subject.batches[0]), subject.unseen, EQUAL)
    return f"{len(lrc.foldable(subject.small, subject.batches[0]).folds)}"


def unfused(subject: Subject) -> str:
    plain = lrc.unfuse(subject.small)
    ours = [m for m in plain.modules() if type(m).__module__.startswith("lrcompress")]
    assert all(isinstance(m, lrc.nn.LayersInRow) for m in ours)  # containers of ordinary layers
    assert_close(subject.small, plain, subject.unseen, EQUAL)
    return "yes"


def exported(subject: Subject) -> str:
    inputs = subject.batches[0]
    by_name = inputs if isinstance(inputs, dict) else {}
    program = torch.export.export(subject.small, () if by_name else (inputs,), by_name)
    assert_close(subject.small, program.module(), subject.unseen, EQUAL)
    return "yes"


def removable(subject: Subject) -> str:
    """Zero half of every coupling's columns: they go without a trace."""
    linear = rewrite.with_linears(subject.model)
    couplings = [c for c in removal.trace(linear, subject.batches[0]).couplings if c.producers]
    if not couplings:
        lrc.plan(subject.model, subject.budget, lrc.lnr(), example_inputs=subject.batches[0])  # to be refused
    assert couplings, "no couplings"
    model = copy.deepcopy(linear).double()
    inputs = tree_map(lambda x: x.double() if x.is_floating_point() else x, subject.batches[0])
    removals = [halved(coupling) for coupling in couplings]
    for item in removals:
        for slot in item.coupling.consumers:
            model.get_submodule(slot.name).weight.data[:, item.gone(slot)] = 0
    small = removal.removed(model, removals)
    assert sum(p.numel() for p in small.parameters()) < subject.layers.params
    assert_close(model, small, inputs, REMOVED)
    return f"{len(couplings)}"


def halved(coupling: Coupling) -> Removal:
    return Removal(coupling, tuple(range(0, coupling.channels, 2)))


PROPERTIES: dict[str, Callable[[Subject], str]] = {
    "layers": layers,
    "full rank": full_rank,
    "full rank, statistics": full_rank_statistics,
    "full rank, batches": full_rank_batches,
    "full rank, decoders": full_rank_decoders,
    "activation_aware, statistics": aware_statistics,
    "activation_aware, batches": aware_batches,
    "save and load": saved,
    "fold": folded,
    "unfuse": unfused,
    "export": exported,
    "lnr": removable,
}
