"""Low rank on top of removed neurons: errors in one unit, splits of a budget measured, the best one taken."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_reconstruct import convolutional, counted, perceptron

import lrcompress as lrc
from lrcompress import calibrate, planning
from lrcompress.types import Split

LOW_RANK = lrc.activation_aware()


def test_low_rank_goes_on_top_of_what_is_left(tmp_path):
    model, x = perceptron()
    narrow = lrc.plan(model, lrc.Budget(params=0.7), lrc.lnr(), example_inputs=x)
    small = lrc.apply(model, narrow, batches=[x])
    low = lrc.plan(small, lrc.Budget(params=0.8), lrc.svd(), example_inputs=x)
    both = dataclasses.replace(narrow, layers=low.layers)
    assert lrc.Plan.from_json(both.to_json()) == both
    smaller = lrc.apply(model, both, batches=[x])
    assert counted(smaller) == both.params_after == low.params_after < narrow.params_after
    torch.testing.assert_close(smaller(x), lrc.apply(small, low, batches=[x])(x))
    lrc.save(smaller, both, tmp_path)
    torch.testing.assert_close(lrc.load(tmp_path, model)(x), smaller(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [convolutional, perceptron])
@pytest.mark.parametrize("budget", [lrc.Budget(params=0.4), lrc.Budget(macs=0.4)], ids=str)
def test_removal_competes_with_low_rank(make, budget, tmp_path):
    """The best of all splits, each alone among them; met to the parameter, with statistics and batches."""
    model, x = make()
    known = lrc.collect(model, [x])
    plan = lrc.plan(model, budget, lrc.lnr(low_rank=LOW_RANK), statistics=known, example_inputs=x)
    taken = min(plan.splits, key=lambda split: split.output_error)
    assert plan.objective == taken.error
    fitted = lrc.apply(model, plan, statistics=known)
    assert lrc.verify(model, fitted, x).output_error == pytest.approx(taken.output_error)
    assert plan.splits[-1].fraction == 1
    alone = lrc.plan(model, budget, LOW_RANK, statistics=known, example_inputs=x[:1])
    assert plan.splits[-1].error == pytest.approx(alone.objective, rel=1e-9)
    for fit in ({"statistics": known}, {"batches": x.split(20)}):
        small = lrc.apply(model, plan, **fit)
        check = lrc.verify(model, small, x)
        assert (check.params_after, check.macs_after) == (plan.params_after, plan.macs_after)
        assert counted(small) == plan.params_after
    limit = budget.limit(plan.params if budget.params else plan.macs)
    assert (plan.params_after if budget.params else plan.macs_after) <= limit
    assert lrc.Plan.from_json(plan.to_json()) == plan
    lrc.save(small, plan, tmp_path)
    torch.testing.assert_close(lrc.load(tmp_path, model)(x), small(x), rtol=1e-12, atol=1e-12)
    assert all(f"removed down to {split.fraction:.3f}" in str(plan) for split in plan.splits)


def test_better_half_of_a_fit_to_few_samples_is_fitted_to_all():
    model = perceptron()[0]
    x = torch.randn(1000, 20, dtype=torch.float64)
    budget, recipe = lrc.Budget(params=0.4), lrc.lnr(low_rank=LOW_RANK)
    plan = lrc.plan(model, budget, recipe, example_inputs=x)
    assert len(plan.splits) == 6
    final = [split for split in plan.splits if split.samples == 1000]
    dropped = [split for split in plan.splits if split.samples != 1000]
    assert len(final) == len(dropped) == 3
    assert all(100 <= split.samples <= 200 for split in dropped)
    taken = min(final, key=lambda split: split.output_error)
    assert plan.objective == taken.error
    assert taken.output_error == min(split.output_error for split in plan.splits)
    small = lrc.apply(model, plan, batches=x.split(100))
    assert lrc.verify(model, small, x).output_error == pytest.approx(taken.output_error)
    plans = planning.narrower(model, budget, recipe, x, calibrate.in_parts(x), ())
    few = calibrate.thinned(x.split(100), 8, 100)
    errors = [lrc.verify(model, lrc.apply(model, made, batches=few), x).output_error for made in plans]
    assert sorted(split.output_error for split in dropped) == pytest.approx(sorted(errors)[3:], rel=1e-6)
    assert "fitted to 1000 samples" in str(plan)


def test_nothing_measured_is_nearer_than_what_is_taken(monkeypatch):
    """What looked worse after a fit to few samples, but better than all that were fitted to all, is too."""
    plans = [SimpleNamespace(splits=(Split(i / 4, 0.0),), number=i) for i in range(4)]
    rough, final = (1.0, 2.0, 3.0, 4.0), (9.0, 8.0, 7.0, 3.5)

    batches = [torch.zeros(100, 1)] * 16

    def tried(made, fitted):
        errors = final if len(fitted) == len(batches) else rough
        return Split(0.0, 0.0, errors[made.number], len(fitted))

    monkeypatch.setattr(planning, "replace", lambda made, splits: (made.number, splits))
    taken, splits = planning.nearest(plans, batches, True, tried)
    assert taken == 3
    assert [split.output_error for split in splits] == [9.0, 8.0, 7.0, 3.5]


def test_batches_are_thinned_evenly_down_to_the_least():
    batches = [torch.full((10, 1), float(i)) for i in range(20)]

    def left(share, least):
        return [int(batch[0]) for batch in calibrate.thinned(batches, share, least)]

    assert left(8, 10) == [0, 8, 16]
    assert left(8, 50) == [0, 4, 8, 12, 16]
    assert left(8, 200) == left(8, 1000) == list(range(20))


def test_options_of_layers_that_no_removal_touches_are_those_of_the_whole_network(monkeypatch):
    model, x = convolutional()
    known = lrc.collect(model, [x])
    recipe = lrc.lnr(low_rank=LOW_RANK)
    found = planning.narrower(model, lrc.Budget(params=0.5), recipe, x, known, ())
    monkeypatch.setattr(planning, "_tables", lambda *_: {})
    anew = planning.narrower(model, lrc.Budget(params=0.5), recipe, x, known, ())
    assert found == anew
    assert any(plan.removals for plan in found)


def test_one_call_judges_splits_by_the_fit_that_follows():
    model, x = convolutional()
    small, plan = lrc.compress(model, lrc.Budget(params=0.4), lrc.lnr(low_rank=LOW_RANK), batches=x.split(20))
    taken = min(plan.splits, key=lambda split: split.output_error)
    assert taken.samples == len(x)
    assert lrc.verify(model, small, x).output_error == pytest.approx(taken.output_error)


def test_errors_on_top_of_removal_are_those_of_the_original_outputs():
    """Each layer's error is the share of its outputs' variance that the applied layer loses on its inputs."""
    model, x = perceptron()
    for layer, rank in ((model[1], 4), (model[3], 3)):
        layer.weight.data = torch.randn(len(layer.weight), rank).double() @ torch.randn(
            rank, layer.in_features
        ).double() + 0.1 * torch.randn_like(layer.weight)
    model[5].weight.data[:, 6:] *= 0.05
    known = lrc.collect(model, [x])
    recipe = dataclasses.replace(lrc.lnr("bottom-up", low_rank=LOW_RANK), splits=4)
    plans = planning.narrower(model, lrc.Budget(params=0.3), recipe, x[:1], known, ())
    plan = next(p for p in plans if p.removals and any(entry.choice.config for entry in p))
    small = lrc.apply(model, plan, statistics=known, refinement=lrc.Refinement(sweeps=0, prior=0))
    kept = {item.coupling.name: list(item.kept) for item in plan.removals}
    rows = {"1": kept.get("1"), "3": kept.get("3"), "5": None}
    columns_of = {"1": kept.get("inputs of 1"), "3": kept.get("1"), "5": kept.get("3")}
    for name in ("1", "3", "5"):
        inputs = model[: int(name)](x).detach()
        wanted = model[int(name)](inputs).detach()[:, rows[name] or slice(None)]
        own = next(entry for entry in plan if entry.layer.name.split(".")[0] == name)
        layer = small.get_submodule(own.layer.name)
        given = layer(inputs[:, columns_of[name] or slice(None)]).detach()
        lost = float((wanted - given).var(0, correction=0).sum() / wanted.var(0, correction=0).sum())
        assert own.choice.error == pytest.approx(lost, rel=1e-3, abs=1e-6)


def test_low_rank_must_be_priced_as_removal_is():
    model, x = perceptron()
    for recipe in (lrc.alds(), lrc.pca(), lrc.svd_llm()):
        with pytest.raises(lrc.PlanError, match="relative errors of activation_aware"):
            lrc.plan(model, lrc.Budget(params=0.5), lrc.lnr(low_rank=recipe), example_inputs=x)
    with pytest.raises(lrc.BudgetError, match="allows 10 params, the least possible is 112"):
        lrc.plan(model, lrc.Budget(params=10), lrc.lnr(low_rank=LOW_RANK), example_inputs=x)
    with pytest.raises(lrc.PlanError, match="splits must be at least 2"):
        dataclasses.replace(lrc.lnr(), splits=1)


def test_split_without_statistics_calibrates_on_the_inputs():
    model, x = perceptron()
    plan = lrc.plan(model, lrc.Budget(params=0.4), lrc.lnr("top-down", low_rank=LOW_RANK), example_inputs=x)
    known = lrc.collect(model, [x])
    parallel = lrc.lnr("parallel", low_rank=LOW_RANK)
    same = lrc.plan(model, lrc.Budget(params=0.4), parallel, statistics=known, example_inputs=x[:1])
    assert plan.splits[-1].error == pytest.approx(same.splits[-1].error, rel=1e-6)
    assert counted(lrc.apply(model, plan, batches=[x])) == plan.params_after
