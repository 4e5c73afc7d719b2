"""Budgets, plans and their JSON."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompress as lrc
from lrcompress import calibrate
from lrcompress.types import LayerPlan, LowRank

RECIPES = [lrc.alds(), lrc.svd(), lrc.svd_energy(), lrc.lrank()]


class Net(nn.Module):
    """Two convolutions, a head, and an embedding that planning leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        conv = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)]
        self.features = nn.Sequential(*conv, nn.Flatten())
        self.head = nn.Linear(8 * 16, 10)
        self.embedding = nn.Embedding(7, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x)) + self.embedding.weight[0]


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"params": 0.5, "macs": 0.5}, "exactly one"),
        ({"params": 0}, "positive"),
        ({"params": 0.0}, "positive"),
        ({"macs": -3}, "positive"),
        ({"macs": -0.5}, "positive"),
        ({"params": math.nan}, "finite"),
        ({"params": math.inf}, "finite"),
        ({"params": True}, "finite number"),
        ({"params": "0.5"}, "finite number"),
        ({"params": 1.5}, "fraction"),
    ],
)
def test_a_budget_that_makes_no_sense(given, message):
    with pytest.raises(lrc.BudgetError, match=message):
        lrc.Budget(**given)


def test_a_budget_is_a_fraction_or_a_count():
    assert lrc.Budget(params=0.5).limit(101) == 50
    assert lrc.Budget(macs=30).limit(101) == 30
    assert lrc.Budget(params=1.0).limit(101) == 101
    assert lrc.Budget(params=1).limit(101) == 1
    assert [lrc.Budget(params=1).cost, lrc.Budget(macs=1).cost] == ["params", "macs"]


def test_errors_share_one_base():
    for error in (lrc.BudgetError, lrc.PlanError, lrc.WeightError, lrc.FormatError):
        assert issubclass(error, lrc.CompressionError)
        assert issubclass(error, ValueError)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
@pytest.mark.parametrize("cost", ["params", "macs"])
def test_an_impossible_budget_says_the_least_which_is_then_feasible(recipe, cost):
    model = Net()
    with pytest.raises(lrc.BudgetError, match="the least possible is") as refused:
        lrc.plan(model, lrc.Budget(**{cost: 1}), recipe, example_inputs=X)
    least = int(str(refused.value).split("least possible is ")[1].split()[0])
    plan = lrc.plan(model, lrc.Budget(**{cost: least}), recipe, example_inputs=X)
    assert {"params": plan.params_after, "macs": plan.macs_after}[cost] == least
    with pytest.raises(lrc.BudgetError, match=f"the least possible is {least}"):
        lrc.plan(model, lrc.Budget(**{cost: least - 1}), recipe, example_inputs=X)


@given(
    st.sampled_from(RECIPES),
    st.sampled_from(["params", "macs"]),
    st.floats(0.35, 1.0),
    st.booleans(),
)
@settings(max_examples=12)
def test_the_budget_holds_on_the_model_that_runs(recipe, cost, fraction, as_count):
    torch.manual_seed(1)
    model = Net()
    totals = {"params": count_params(model), "macs": calibrate.count_macs(model, X)}
    limit = math.floor(fraction * totals[cost])
    budget = lrc.Budget(**{cost: limit if as_count else fraction})
    small, plan = lrc.compress(model, budget, recipe, example_inputs=X)
    after = {"params": count_params(small), "macs": calibrate.count_macs(small, X)}
    assert after[cost] <= limit
    assert (plan.params, plan.macs) == (totals["params"], totals["macs"])
    assert (plan.params_after, plan.macs_after) == (after["params"], after["macs"])


def test_a_whole_budget_keeps_everything_dense():
    for recipe in RECIPES:
        plan = lrc.plan(Net(), lrc.Budget(params=1.0), recipe, example_inputs=X)
        assert all(entry.choice.config is None for entry in plan)
        assert plan.error == 0


def test_macs_need_example_inputs():
    with pytest.raises(lrc.PlanError, match="example_inputs"):
        lrc.plan(Net(), lrc.Budget(macs=0.5))
    plan = lrc.plan(Net(), lrc.Budget(params=0.6))
    assert plan.macs == plan.macs_after == 0


def test_example_inputs_must_hold_a_sample():
    for empty in (torch.zeros(0, 4, 6, 6), (), {}):
        with pytest.raises(lrc.PlanError, match="samples"):
            lrc.plan(Net(), lrc.Budget(params=0.6), example_inputs=empty)


@pytest.mark.parametrize(
    ("ignore", "kept"),
    [
        (("head",), {"features.0", "features.3"}),
        (("features.*",), {"head"}),
        (["*.0", "h?ad"], {"features.3"}),
        ("head", {"features.0", "features.3"}),
    ],
)
def test_ignored_layers_are_listed(ignore, kept):
    plan = lrc.plan(Net(), lrc.Budget(params=0.99), example_inputs=X, ignore=ignore)
    assert {entry.layer.name for entry in plan} == kept
    ignored = {item.name for item in plan.left_alone if item.reason == "ignored by name"}
    assert ignored == {"features.0", "features.3", "head"} - kept


@pytest.mark.parametrize("ignore", ["Head", ["head", "nothing.*"]])
def test_a_pattern_that_matches_nothing_is_refused(ignore):
    with pytest.raises(lrc.PlanError, match="matches no module"):
        lrc.plan(Net(), lrc.Budget(params=0.99), ignore=ignore)


def test_planning_is_deterministic_and_leaves_no_trace():
    model = Net()
    model.features[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    first, second = (lrc.plan(model, lrc.Budget(macs=0.6), example_inputs=X) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@given(st.lists(st.integers(2, 12), min_size=2, max_size=4), st.integers(0, 99))
@settings(max_examples=20)
def test_the_tradeoff_never_rises(widths, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    plan = lrc.plan(model, lrc.Budget(params=1.0))
    fractions, errors = ([getattr(t, key) for t in plan.tradeoff] for key in ("fraction", "error"))
    assert fractions == sorted(fractions)
    assert errors == sorted(errors, reverse=True)
    assert (fractions[-1], errors[-1]) == (1.0, 0.0)


def test_a_curve_holds_the_choice_and_runs_along_the_front():
    plan = lrc.plan(Net(), lrc.Budget(params=0.6), example_inputs=X)
    for entry in plan:
        assert entry.choice in entry.curve
        costs = [option.params for option in entry.curve]
        assert costs == sorted(costs)
        assert entry.curve[-1] == entry.layer.dense
        for option in entry.curve[:-1]:
            assert entry.layer.option(option.config, option.error) == option


def test_edit_and_keep_dense_change_one_layer_of_a_copy():
    model = Net()
    plan = lrc.plan(model, lrc.Budget(params=0.6), example_inputs=X)
    before = plan.to_json()
    edited = plan.edit("head", groups=2, rank=3)
    assert edited["head"].choice.config == LowRank(0, 2, 3)
    assert edited["head"].choice.params == 3 * (2 * 10 + 128)
    assert math.isnan(edited["head"].choice.error)
    assert edited["features.0"] == plan["features.0"]
    dense = edited.keep_dense("head")
    assert dense["head"] == LayerPlan(plan["head"].layer, plan["head"].layer.dense, plan["head"].curve)
    assert plan.to_json() == before
    for changed in (edited, dense):
        small = lrc.apply(model, changed)
        assert count_params(small) == changed.params_after
        assert calibrate.count_macs(small, X) == changed.macs_after


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"rank": 0}, "ranks 1 to 10"),
        ({"rank": 11}, "ranks 1 to 10"),
        ({"rank": -1}, "ranks 1 to 10"),
        ({"rank": 1, "groups": 3}, "groups must divide 128"),
        ({"rank": 1, "groups": 0}, "groups must divide 128"),
        ({"rank": 2, "groups": 128}, "ranks 1 to 1 "),
        ({"rank": 1, "scheme": 1}, "schemes"),
        ({"rank": 1, "scheme": -1}, "schemes"),
    ],
)
def test_edits_that_a_layer_cannot_take(choice, message):
    plan = lrc.plan(Net(), lrc.Budget(params=0.6), example_inputs=X)
    with pytest.raises(lrc.PlanError, match=message) as refused:
        plan.keep_dense("head").edit("head", **choice)
    assert "'head'" in str(refused.value)


@pytest.mark.parametrize("rank", [2.5, 2.0, True, "2", None])
def test_a_rank_must_be_whole(rank):
    plan = lrc.plan(Net(), lrc.Budget(params=0.6), example_inputs=X)
    with pytest.raises(lrc.PlanError, match="rank"):
        plan.edit("head", rank=rank)


def test_a_rank_may_come_from_numpy():
    plan = lrc.plan(Net(), lrc.Budget(params=0.6), example_inputs=X)
    edited = plan.edit("head", rank=np.int64(2))
    assert edited.to_json() == plan.edit("head", rank=2).to_json()


def test_unknown_layers_are_named_with_the_known_ones():
    plan = lrc.plan(Net(), lrc.Budget(params=0.6), example_inputs=X)
    for ask in (plan.__getitem__, plan.keep_dense, lambda name: plan.edit(name, rank=1)):
        with pytest.raises(lrc.PlanError, match=r"'tail'.*features\.0"):
            ask("tail")


def test_the_printed_plan_holds_everything():
    plan = lrc.plan(Net(), lrc.Budget(params=0.99), example_inputs=X, ignore=("head",))
    lines = str(plan).splitlines()
    assert lines[0] == f"{lrc.alds()}, budget params=0.99"
    for entry in plan:
        row = next(line for line in lines if line.startswith(entry.layer.name))
        assert str(entry.choice.config or "dense") in row
        assert f"{entry.layer.params} -> {entry.choice.params}" in row
    for item in plan.left_alone:
        assert f"left alone: {item.name} ({item.kind}): {item.reason}" in lines
    assert f"params {plan.params} -> {plan.params_after}" in lines[-1]
    assert f"macs {plan.macs} -> {plan.macs_after}" in lines[-1]


def test_a_model_without_layers_has_an_empty_plan():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))
    plan = lrc.plan(model, lrc.Budget(params=1.0), example_inputs=torch.zeros(2, 3))
    assert (list(plan), plan.error, plan.params, plan.params_after) == ([], 0.0, 6, 6)
    assert lrc.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(lrc.BudgetError, match="least possible is 6 of 6"):
        lrc.plan(model, lrc.Budget(params=0.5))


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("value", [1.0, 3.7])
def test_constant_weights_have_rank_one(side, value):
    model = nn.Sequential(nn.Linear(side, side))
    nn.init.constant_(model[0].weight, value)
    plan = lrc.plan(model, lrc.Budget(params=0.5))
    assert plan.error <= 1e-7
    assert torch.allclose(lrc.apply(model, plan)[0].weight, model[0].weight)


def test_zero_weights_and_single_outputs():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    nn.init.zeros_(model[0].weight)
    plan = lrc.plan(model, lrc.Budget(params=0.9))
    assert plan.error == 0
    assert plan["1"].choice.config is None
    small = lrc.apply(model, plan)
    assert torch.equal(small[0].weight, torch.zeros(8, 8))
    assert torch.equal(small(torch.ones(2, 8)), model(torch.ones(2, 8)))


def test_budgets_in_bytes_count_what_the_model_holds():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32).to(torch.bfloat16))
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    found = lrc.plan(model, lrc.Budget(bytes=0.6), lrc.svd_energy())
    small = lrc.apply(model, found)
    kept = sum(p.numel() * p.element_size() for p in small.parameters())
    assert kept <= 0.6 * held
    least = min(e.layer.itemsize * e.layer.unit_cost(0, 1)[0] for e in found)
    assert kept + least > 0.6 * held or all(e.choice.config is None for e in found)
    with pytest.raises(lrc.BudgetError, match="bytes=10 allows 10 bytes"):
        lrc.plan(model, lrc.Budget(bytes=10), lrc.svd())
