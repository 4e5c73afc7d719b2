"""Global steps against brute force on small instances, and their certificates on larger ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.allocate import ConstantRatio, MinMax, WeightedSum, weighted_sum
from lrcompress.types import BudgetError
from lrcompress.types.options import OptionTable

STEPS = [MinMax(), WeightedSum(), ConstantRatio()]


def table(options: list[tuple[int, int, int, float]], dense: int) -> OptionTable:
    """Build a table from (groups, rank, cost, error) with the dense option first."""
    rows = [(0, 0, dense, 0.0), *options]
    groups, rank, cost, error = (np.array(column) for column in zip(*rows, strict=True))
    relative = np.where(groups > 0, rank / 100, np.inf)
    zeros = np.zeros(len(rows), dtype=np.int64)
    return OptionTable(zeros, groups, rank, relative, cost, cost, error.astype(float))


@st.composite
def tables(draw: st.DrawFn) -> list[OptionTable]:
    """Draw 1 to 4 layers; for each group count the error falls and the cost rises with the rank."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        options = []
        for groups in (1, 2):
            per_rank = draw(st.integers(1, 9))
            ranks = draw(st.integers(0, 3))
            errors = sorted(draw(st.lists(st.integers(1, 60), min_size=ranks, max_size=ranks)), reverse=True)
            options += [(groups, r + 1, (r + 1) * per_rank, e / 10) for r, e in enumerate(errors)]
        found.append(table(options, draw(st.integers(28, 40))))
    return found


def least(found: list[OptionTable]) -> int:
    return sum(int(t.params.min()) for t in found)


def errors_of(found: list[OptionTable], rows: list[int]) -> list[float]:
    return [float(t.error[row]) for t, row in zip(found, rows, strict=True)]


def cost_of(found: list[OptionTable], rows: list[int]) -> int:
    return sum(int(t.params[row]) for t, row in zip(found, rows, strict=True))


def best_by_brute_force(found: list[OptionTable], limit: int, objective) -> float:
    choices = itertools.product(*(range(len(t)) for t in found))
    return min(objective(errors_of(found, rows)) for rows in choices if cost_of(found, rows) <= limit)


@given(tables(), st.integers(0, 60))
@settings(max_examples=150)
def test_minmax_is_the_global_optimum(found, slack):
    limit = least(found) + slack
    rows = MinMax()(found, "params", limit)
    assert cost_of(found, rows) <= limit
    assert max(errors_of(found, rows)) == best_by_brute_force(found, limit, max)


@given(tables(), st.integers(0, 60))
@settings(max_examples=100)
def test_minmax_leaves_no_rank_that_could_be_raised(found, slack):
    limit = least(found) + slack
    rows = MinMax()(found, "params", limit)
    left = limit - cost_of(found, rows)
    for t, row in zip(found, rows, strict=True):
        if t.groups[row]:
            same = (t.groups == t.groups[row]) & (t.rank == t.rank[row] + 1)
            nearest = t.params[same] if same.any() else t.params[t.groups == 0]
            assert nearest[0] - t.params[row] > left


def test_weighted_sum_is_exact_where_the_hull_fits():
    first = table([(1, 1, 10, 4.0), (1, 2, 20, 1.0)], 40)
    second = table([(1, 1, 10, 9.0), (1, 2, 20, 2.0), (1, 3, 30, 1.9)], 40)
    rows = WeightedSum()([first, second], "params", 40)
    assert errors_of([first, second], rows) == [1.0, 2.0]


def test_constant_ratio_gives_every_layer_the_same_relative_rank():
    found = [table([(1, r, 4 * r, 1 - r / 100) for r in range(1, 100)], 1000) for _ in range(3)]
    rows = ConstantRatio()(found, "params", 3 * 4 * 50 + 11)
    assert {int(t.rank[row]) for t, row in zip(found, rows, strict=True)} == {50}


@pytest.mark.parametrize("step", STEPS, ids=lambda s: type(s).__name__)
@given(found=tables(), slack=st.integers(0, 60))
@settings(max_examples=50)
def test_a_larger_budget_is_never_worse(step, found, slack):
    limit = least(found) + slack
    objectives = [
        step.objective(errors_of(found, step(found, "params", size))) for size in (limit, limit + 7)
    ]
    assert objectives[1] <= objectives[0] * (1 + 1e-12)  # sums in another order


@pytest.mark.parametrize("step", STEPS, ids=lambda s: type(s).__name__)
def test_an_impossible_budget_says_the_least_possible(step):
    found = [table([(1, 1, 10, 4.0)], 40), table([(1, 1, 7, 4.0)], 40)]
    with pytest.raises(BudgetError, match="least possible is 17"):
        step(found, "params", 16)
    assert cost_of(found, step(found, "params", 17)) == 17


@pytest.mark.parametrize("step", STEPS, ids=lambda s: type(s).__name__)
def test_the_whole_budget_keeps_every_layer_dense(step):
    found = [table([(1, 1, 10, 4.0)], 40), table([(1, 1, 7, 4.0)], 40)]
    assert step(found, "params", 80) == [0, 0]
    assert step([], "params", 0) == []


@given(tables(), st.integers(0, 60))
@settings(max_examples=150)
def test_weighted_sum_is_the_global_optimum_and_knows_it(found, slack):
    limit = least(found) + slack
    step = WeightedSum()
    rows = step(found, "params", limit)
    reached = sum(errors_of(found, rows))
    assert cost_of(found, rows) <= limit
    assert reached == pytest.approx(best_by_brute_force(found, limit, sum), rel=1e-9, abs=1e-12)
    assert step.bound(found, "params", limit) == reached


def many_layers(seed: int, layers: int = 24, points: int = 40) -> list[OptionTable]:
    """Draw fronts that are far from convex, with errors over many orders of magnitude."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        costs = np.sort(rng.choice(np.arange(1, 10_000), points, replace=False))
        errors = np.sort(10 ** rng.uniform(-6, 2, points))[::-1]
        options = [(1, r + 1, int(c), float(e)) for r, (c, e) in enumerate(zip(costs, errors, strict=True))]
        found.append(table(options, 10_000))
    return found


@pytest.mark.parametrize("pairs", [1, 300, 2**20])
@pytest.mark.parametrize("seed", range(4))
def test_a_search_that_is_cut_short_keeps_its_bound(seed, pairs, monkeypatch):
    found, step = many_layers(seed), WeightedSum()
    limit = 3 * least(found) + 20_000
    optimum = step.bound(found, "params", limit)  # of the default search, which goes through here
    assert optimum == sum(errors_of(found, step(found, "params", limit)))
    monkeypatch.setattr(weighted_sum, "_PAIRS", pairs)
    rows, bound = step(found, "params", limit), step.bound(found, "params", limit)
    assert cost_of(found, rows) <= limit
    reached = sum(errors_of(found, rows))
    assert 0 < bound <= optimum * (1 + 1e-9)
    assert optimum * (1 - 1e-9) <= reached
    assert (bound == reached) == (pairs > 1)


@given(found=tables(), slack=st.integers(0, 60))
@settings(max_examples=50)
def test_bounds_are_of_the_optimum_or_unknown(found, slack):
    limit = least(found) + slack
    rows = MinMax()(found, "params", limit)
    assert MinMax().bound(found, "params", limit) == max(errors_of(found, rows))
    assert ConstantRatio().bound(found, "params", limit) is None
