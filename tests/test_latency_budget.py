"""A budget in time: options measured and interpolated, never one that is slower than its dense layer."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress as lrc
from lrcompress import allocate
from lrcompress.measure import clock, correction, options
from lrcompress.report import sheet as report
from lrcompress.types import Option
from lrcompress.types.options import OptionTable

X = torch.linspace(-1, 1, 3 * 32).reshape(3, 32)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24)).eval()


def clocked(monkeypatch, seconds, rest=1e-3, saved=lambda: 1.0):
    """Let the clock show ``seconds(name, module)`` for each layer, and ``rest`` for what is between them.

    Of what layers save alone, a whole network of them saves the share ``saved()``.
    """

    def fake(model, variants, inputs, device, budget, progress):
        if progress:
            progress(1, 1)
        found = {}
        for variant, modules in variants.items():
            times = {name: seconds(name, module) for name, module in modules.items()}
            found[variant] = {name: [time] for name, time in times.items()} | {
                "": [rest + sum(times.values())]
            }
        return found

    def share(model, modules, inputs, device, budget):
        dense = {n: seconds(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        less = sum(dense[name] - seconds(name, module) for name, module in modules.items())
        return 1 - saved() * less / (rest + sum(dense.values()))

    monkeypatch.setattr(options, "seconds_of_layers", fake)
    monkeypatch.setattr(correction, "share_of_dense", share)


def linear_in_rank(name: str, module: nn.Module) -> float:
    """Dense layers take 1 ms; factored ones 0.1 ms and 0.02 ms for each unit of width between the parts."""
    return 1e-3 if isinstance(module, nn.Linear) else 1e-4 + 2e-5 * module.groups * module.rank


def test_the_plan_meets_the_budget_in_measured_time(monkeypatch):
    clocked(monkeypatch, linear_in_rank)
    model = network()
    steps = []
    for budget, limit in ((lrc.Budget(latency=0.6), 2.4e6), (lrc.Budget(latency_ms=2.4), 2.4e6)):
        plan = lrc.plan(model, budget, example_inputs=X, progress=lambda done, of: steps.append((done, of)))
        assert plan.latency == 4_000_000
        assert plan.latency_after <= limit
        assert plan.latency_after == plan.latency - sum(e.layer.latency - e.choice.latency for e in plan)
        for entry in plan:
            assert entry.layer.latency == 1_000_000
            config = entry.choice.config
            if config is None:
                assert entry.choice.latency == entry.layer.latency
            else:
                assert config.groups * config.rank % 8 == 0
                assert entry.choice.latency == 100_000 + 20_000 * config.groups * config.rank
                assert entry.choice.latency < entry.layer.latency
        assert max(point.fraction for point in plan.tradeoff) == 1.0
    assert steps == [(1, 1)] * 2
    small = lrc.apply(model, plan)
    assert any(isinstance(module, lrc.nn.LowRankLinear) for module in small)


@pytest.mark.parametrize("share", [0.7, 1.3])
def test_the_plan_is_corrected_by_the_time_of_its_whole_network(monkeypatch, share):
    clocked(monkeypatch, linear_in_rank, saved=lambda: share)
    plan = lrc.plan(network(), lrc.Budget(latency=0.7), example_inputs=X)
    configs = [entry.choice.config for entry in plan if entry.choice.config]
    alone = sum(1e6 - (1e5 + 2e4 * config.groups * config.rank) for config in configs)
    assert plan.latency_after == pytest.approx(4e6 - share * alone, abs=3)
    assert 0.9 * 2.8e6 < plan.latency_after <= 2.8e6


@pytest.mark.parametrize("share", [0.2, -0.2])
def test_layers_that_save_too_little_together_are_said(monkeypatch, share):
    clocked(monkeypatch, linear_in_rank, saved=lambda: share)
    with pytest.warns(UserWarning, match=r"takes \d+ nanoseconds where the budget allows 2000000"):
        plan = lrc.plan(network(), lrc.Budget(latency=0.5), example_inputs=X)
    assert plan.latency_after > 2e6


def test_the_share_of_the_dense_time_is_of_the_changed_network():
    model = network()
    layer = model[0]
    work = nn.Sequential(*(nn.Linear(32, 32) for _ in range(100)), layer)
    assert clock.share_of_dense(model, {"0": work}, X, torch.device("cpu"), 0.0) > 3
    assert model[0] is layer


def test_what_is_slower_than_dense_is_never_chosen(monkeypatch):
    """Even where every option of one layer is smaller and the budget asks for less."""
    clocked(
        monkeypatch,
        lambda name, module: (
            2e-3 if name == "0" and not isinstance(module, nn.Linear) else linear_in_rank(name, module)
        ),
    )
    plan = lrc.plan(network(), lrc.Budget(latency=0.7), example_inputs=X)
    assert plan["0"].choice.config is None
    assert plan["2"].choice.config is not None
    with pytest.raises(
        lrc.BudgetError, match=r"latency=0.1 allows 400000 nanoseconds, the least possible is \d+"
    ):
        lrc.plan(network(), lrc.Budget(latency=0.1), example_inputs=X)


def test_ranks_between_the_measured_ones_are_interpolated(monkeypatch):
    measured = set()

    def seconds(name, module):
        if isinstance(module, nn.Linear):
            return 1.0
        if name == "0":
            measured.add((module.groups, module.rank))
        return 1e-4 * module.rank**2

    clocked(monkeypatch, seconds)
    model = nn.Sequential(nn.Linear(64, 256, bias=False))
    plan = lrc.plan(model, lrc.Budget(latency=0.9), lrc.svd(), example_inputs=torch.randn(2, 64))
    ranks = sorted(rank for _, rank in measured)
    assert ranks[0] == 8
    assert len(ranks) == 4
    curve = {o.config.rank: o.latency for o in plan["0"].curve if o.config}
    assert set(curve) == set(range(8, 52, 8))
    for rank, latency in curve.items():
        assert latency == pytest.approx(1e9 * np.interp(rank, ranks, [1e-4 * r**2 for r in ranks]), abs=1)


def test_group_counts_are_thinned_and_ranks_keep_the_width_round():
    layers = [nn.Linear(64, 64)]
    plan = lrc.plan(nn.Sequential(*layers), lrc.Budget(params=1.0), lrc.alds())
    table = lrc.alds().local_step((plan["0"].layer,), (layers[0].weight,), {})[0]
    thin = options._thinned(table)
    counts = sorted(set(thin.groups.tolist()))
    assert counts[0] == 0
    assert len(counts) <= 1 + options._GROUP_COUNTS
    assert all(rank * groups % 8 == 0 for rank, groups in zip(thin.rank, thin.groups, strict=True))
    odd = table.only((table.groups == 0) | ((table.groups == 1) & (table.rank < 8)))
    assert len(options._thinned(odd)) == len(odd)  # no rank is liked: all stay


def test_alike_layers_have_the_same_times(monkeypatch):
    clocked(monkeypatch, lambda name, module: linear_in_rank(name, module) * (1 + int(name)))
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    plan = lrc.plan(model, lrc.Budget(latency=0.9), example_inputs=X)
    assert [entry.layer.latency for entry in plan] == [2_000_000] * 3


@pytest.mark.parametrize(
    "step", [allocate.MinMax(), allocate.ConstantRatio(), allocate.WeightedSum()], ids=str
)
def test_global_steps_take_times_that_do_not_rise_with_the_rank(step):
    rows = np.arange(4)
    table = OptionTable(
        scheme=rows * 0,
        groups=np.array([0, 1, 1, 1]),
        rank=np.array([0, 1, 2, 3]),
        relative_rank=np.array([np.inf, 0.25, 0.5, 0.75]),
        params=np.array([100, 20, 40, 60]),
        macs=np.array([100, 20, 40, 60]),
        error=np.array([0.0, 0.6, 0.4, 0.2]),
        latency=np.array([1000, 400, 300, 700]),
    )
    chosen = step([table, table], "latency", 1100)
    assert sum(int(table.latency[row]) for row in chosen) <= 1100
    assert 1 not in chosen  # slower and worse than rank 2


def test_a_real_measurement(monkeypatch):
    monkeypatch.setattr(options, "_SECONDS", 0.0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 64)
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    plan = lrc.plan(model, lrc.Budget(latency=1.0), example_inputs=x)
    assert plan.latency > sum(entry.layer.latency for entry in plan) > 0
    assert plan.latency_after <= plan.latency
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    lrc.apply(model, plan)(x)


def test_times_are_printed_and_survive_json(monkeypatch):
    clocked(monkeypatch, linear_in_rank)
    plan = lrc.plan(network(), lrc.Budget(latency=0.6), example_inputs=X)
    assert f"4.000 -> {plan.latency_after / 1e6:.3f} ms measured" in str(plan)
    facts = dict(report.plan_facts(plan))
    after = f"{plan.latency_after / 1e6:.3f} ms ({plan.latency_after / 4e6:.1%})"
    assert facts["time of a forward"] == f"4.000 -> {after}"
    again = lrc.Plan.from_json(plan.to_json())
    assert again == plan
    assert json.loads(plan.to_json())["budget"] == {
        "params": None,
        "macs": None,
        "bytes": None,
        "latency": 0.6,
        "latency_ms": None,
    }
    edited = plan.edit("2", rank=1)
    assert edited["2"].choice.latency == 0
    assert edited.latency_after >= plan.latency_after  # what was not measured counts as dense
    assert plan.keep_dense("0")["0"].choice == Option(None, 32 * 48, 3 * 0 + 32 * 48, 0.0, 1_000_000)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency": 1.5}, r"latency must be a fraction in \(0, 1\], got 1.5"),
        ({"latency": 2}, r"latency must be a fraction in \(0, 1\], got 2.0"),
        ({"latency": 0}, "latency must be positive .*, got 0"),
        ({"latency_ms": -1.0}, "latency_ms must be positive .*, got -1.0"),
        ({"latency_ms": float("nan")}, "latency_ms must be a finite number"),
        (
            {"latency": 0.5, "macs": 0.5},
            r"exactly one of params, macs, bytes, latency, latency_ms, got \['macs', 'latency'\]",
        ),
        ({}, "exactly one of .*, got none"),
    ],
)
def test_budgets_that_make_no_sense(given, message):
    with pytest.raises(lrc.BudgetError, match=message):
        lrc.Budget(**given)


def test_inputs_are_needed():
    for budget in (lrc.Budget(latency=0.5), lrc.Budget(latency_ms=1)):
        with pytest.raises(lrc.PlanError, match="a budget in latency needs example_inputs, to measure on"):
            lrc.plan(network(), budget)
