"""Which channels stay: how many of each coupling, and which, in the order of the chaining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lrcompress import allocate, calibrate, rewrite
from lrcompress.factorize import columns
from lrcompress.reconstruct.fit import refit
from lrcompress.reconstruct.problem import Data, Moments, consumers_of, moments_of, problem_of
from lrcompress.reconstruct.sizes import sizes_of
from lrcompress.subject import Subject
from lrcompress.types import Coupling, Reconstruction, Removal

Chosen = dict[Coupling, columns.Support]


@dataclass(frozen=True)
class Paths:
    """Every coupling's supports along its own path, solved once for all budgets."""

    model: nn.Module
    recipe: Reconstruction
    data: Data
    moments: Moments  # of all consumers, in the original network
    supports: Mapping[Coupling, list[columns.Support]]
    sizes: allocate.Sizes  # couplings in the same order

    @classmethod
    def of(
        cls, subject: Subject, couplings: Sequence[Coupling], recipe: Reconstruction, data: Data, cost: str
    ) -> Paths:
        """Solve the path of each coupling on the original network."""
        moments = moments_of(subject.model, consumers_of(couplings), data)
        supports = {
            coupling: columns.supports(
                problem_of(subject.model, coupling, moments), recipe.penalties, recipe.smallest
            )
            for coupling in couplings
        }
        return cls(subject.model, recipe, data, moments, supports, sizes_of(subject, couplings, cost))

    def chosen(self, limit: int) -> list[Removal]:
        """Choose the channels of a network that costs at most ``limit``.

        How many each coupling keeps comes from its own path; the chaining then chooses which.

        Raises:
            BudgetError: not even the narrowest network costs as little.
        """
        counts = [np.array([len(support.kept) for support in path]) for path in self.supports.values()]
        errors = [np.array([support.error for support in path]) for path in self.supports.values()]
        rows = allocate.shrink(self.sizes, counts, errors, limit)
        chosen = {
            coupling: path[row]
            for (coupling, path), row in zip(self.supports.items(), rows, strict=True)
            if len(path[row].kept) < coupling.channels
        }
        if self.recipe.chaining.startswith("bottom-up"):
            chosen = self._bottom_up(chosen)
        elif self.recipe.chaining == "top-down" and not isinstance(self.data, calibrate.Statistics):
            chosen = self._top_down(chosen)
        return [
            Removal(coupling, support.kept, support.error, 0.0 if self.recipe.debias else support.penalty)
            for coupling, support in chosen.items()
        ]

    def _bottom_up(self, chosen: Chosen) -> Chosen:
        """Choose from the last coupling back: each has to give only the outputs that are kept."""
        rows: dict[str, list[int]] = {}
        found: Chosen = {}
        for coupling in reversed(list(chosen)):
            found[coupling] = chosen[coupling]
            if rows.keys() & consumers_of([coupling]):
                problem = problem_of(self.model, coupling, self.moments, rows)
                found[coupling] = self._support(problem, chosen[coupling])
            rows |= {name: list(found[coupling].kept) for name in coupling.producers}
        return {coupling: found[coupling] for coupling in chosen}

    def _top_down(self, chosen: Chosen) -> Chosen:
        """Choose from the first coupling on, each on what the reduced layers before it give."""
        assert not isinstance(self.data, calibrate.Statistics)
        wide, found = rewrite.copied(self.model), dict(chosen)
        for coupling in chosen:
            names = consumers_of([coupling])
            moments = calibrate.cross_moments(self.model, wide, names, self.data)
            found[coupling] = self._support(problem_of(wide, coupling, moments), chosen[coupling])
            for name in names:
                refit(wide, name, [Removal(coupling, found[coupling].kept)], moments[name])
        return found

    def _support(self, problem: columns.ColumnProblem, like: columns.Support) -> columns.Support:
        """Return a support of as many channels."""
        return columns.support_of(problem, len(like.kept), self.recipe.penalties, self.recipe.smallest)
