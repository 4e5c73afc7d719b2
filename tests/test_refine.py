"""Refinement without labels: weights fitted to statistics or batches, biases, batch norms, bad input."""

import warnings

import pytest
import torch
from torch import nn

import lrcompress as lrc
from lrcompress.types import Refinement


class Net(nn.Module):
    """Three convolutions that feed each other, a batch norm, grouped channels, a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 12, 3, padding=1, groups=2, stride=2)
        self.outer = nn.Conv2d(12, 16, 3, bias=False)
        self.fc = nn.Linear(16, 10)
        self.idle = nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.fc(self.outer(self.inner(x).relu()).relu().mean((2, 3)))


class Net1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 8, 5, padding=2), nn.Conv1d(8, 8, 3, dilation=2, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).relu().mean(2))


def pixels(count, size=(3, 8, 8), seed=7):
    """Smooth images with a mean, as neighbours and channels of real ones are alike."""
    raw = torch.randn(count, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (raw.cumsum(-1) + raw.roll(1, 1)) / 2 + 0.5


@pytest.fixture(scope="module")
def case():
    """A float64 network, calibration batches and their statistics."""
    torch.manual_seed(0)
    model, x = Net().double(), pixels(96)
    model(x)  # gives the batch norm statistics
    model.eval()
    return model, x.split(32), lrc.collect(model, x.split(32), gradients=True)


def halved(model, **kwargs):
    """Plan the same ranks for every layer, without data."""
    return lrc.plan(model, lrc.Budget(params=0.6), lrc.svd(), ignore="idle", **kwargs)


def error(model, small, x):
    return lrc.verify(model, small, x).output_error


def outputs_of(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, y: seen.append(y))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def means(y):
    return y.transpose(0, 1).flatten(1).mean(1)


def test_data_lowers_the_output_error_and_what_the_prefix_gives_lowers_it_more(case):
    model, batches, statistics = case
    plan = lrc.plan(model, lrc.Budget(params=0.4), lrc.alds(), ignore="idle")
    x, unseen = torch.cat(batches), pixels(64, seed=8)
    made = [
        lrc.apply(model, plan),
        lrc.apply(model, plan, statistics=statistics),
        lrc.apply(model, plan, batches=batches),
    ]
    for inputs in (x, unseen):
        free, parallel, sequential = (error(model, small, inputs) for small in made)
        assert sequential < parallel < free


def test_layers_fitted_in_sequence_are_each_best_on_the_inputs_they_get():
    """Three Linear layers of rank 2: each weight is the regression of the original outputs, truncated."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    plan = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd())
    for name in ("0", "2", "4"):
        plan = plan.edit(name, rank=2)
    small = lrc.apply(model, plan, batches=x.split(50), refinement=Refinement(sweeps=1, prior=0))
    for name in ("0", "2", "4"):
        y, handle = outputs_of(model, name, x), []
        hook = small.get_submodule(name).register_forward_pre_hook(
            lambda m, i, seen=handle: seen.append(i[0])
        )
        given = outputs_of(small, name, x)
        hook.remove()
        inputs = handle[0].detach()
        inputs, wanted = inputs - inputs.mean(0), y - y.mean(0)
        S, C = inputs.T @ inputs, wanted.T @ inputs
        values, vectors = torch.linalg.eigh(S)
        gained = torch.linalg.svdvals(C @ (vectors * values.rsqrt())).square()[:2].sum()
        least = float(wanted.square().sum() - gained)
        assert float((y - given).square().sum()) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("name", ["stem", "inner", "fc"])
def test_mean_outputs_are_exact_by_bias_or_by_the_batch_norm_behind(case, name):
    """The stem has no bias: its mean is right behind the batch norm, whose running mean has moved."""
    model, batches, _ = case
    small = lrc.apply(model, halved(model), batches=batches)
    x, where = torch.cat(batches), {"stem": "norm"}.get(name, name)
    mean, wanted = (means(outputs_of(m, where, x)) for m in (small, model))
    torch.testing.assert_close(mean, wanted, atol=1e-9, rtol=1e-9)
    assert not torch.equal(small.norm.running_mean, model.norm.running_mean)
    assert torch.equal(small.norm.running_var, model.norm.running_var)


def test_layers_with_neither_are_fitted_uncentred(case):
    """The residual of an uncentred regression on codes is orthogonal to the codes, not of mean zero."""
    model, batches, _ = case
    plan, x = halved(model), torch.cat(batches)
    seen = []
    small = lrc.apply(model, plan, batches=batches, refinement=Refinement(prior=0))
    assert small.outer.bias is None
    handle = small.outer.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    left = outputs_of(model, "outer", x) - outputs_of(small, "outer", x)
    handle.remove()
    codes = nn.functional.conv2d(seen[0], small.outer.V).detach()
    crossed = torch.einsum("nohw,nchw->oc", left, codes)
    scale = left.square().sum().sqrt() * codes.square().sum().sqrt()
    assert float(crossed.abs().max() / scale) < 1e-5
    assert float(means(left).abs().max()) > 1e-6


def test_without_bias_correction_biases_and_norms_stay(case):
    model, batches, statistics = case
    for data in ({"batches": batches}, {"statistics": statistics}):
        small = lrc.apply(model, halved(model), **data, refinement=Refinement(bias=False))
        assert torch.equal(small.norm.running_mean, model.norm.running_mean)
        assert torch.equal(small.inner.bias, model.inner.bias)
        assert torch.equal(small.fc.bias, model.fc.bias)


def test_the_model_is_untouched_and_what_is_dense_is_copied(case):
    model, batches, _ = case
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plan = halved(model).keep_dense("inner")
    small = lrc.apply(model, plan, batches=iter(batches))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(small.inner.weight, model.inner.weight)
    assert sum(p.numel() for p in small.parameters()) == plan.params_after


def test_full_rank_keeps_the_outputs(case):
    model, batches, statistics = case
    plan = halved(model)
    for entry in plan:
        layer = entry.layer
        plan = plan.edit(layer.name, rank=layer.full_rank(0, 1), groups=1, scheme=0)
    for data in ({"batches": batches}, {"statistics": statistics}):
        assert error(model, lrc.apply(model, plan, **data), torch.cat(batches)) < 1e-4


def test_layers_that_data_does_not_reach_are_factored_without_it(case):
    model, batches, statistics = case
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.svd())
    assert plan["idle"].choice.config is not None
    free = lrc.apply(model, plan).idle
    for data in ({"batches": batches}, {"statistics": statistics}):
        torch.testing.assert_close(lrc.apply(model, plan, **data).idle.U, free.U)


RECIPES = {
    "alds": lrc.alds("relative"),
    "activation_aware": lrc.activation_aware(),
    "schemes": lrc.activation_aware(schemes=(0, 1, 2, 3)),
    "fisher": lrc.activation_aware("fisher"),
    "pca": lrc.pca(),
    "svd_llm": lrc.svd_llm(),
    "kfac_svd": lrc.kfac_svd(),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("sequential", [True, False])
def test_presets_go_from_data_to_an_artefact_and_back(case, tmp_path, name, sequential):
    model, batches, statistics = case
    plan = lrc.plan(model, lrc.Budget(params=0.7), RECIPES[name], statistics=statistics)
    small = lrc.apply(model, plan, statistics=statistics, batches=batches if sequential else None)
    assert sum(p.numel() for p in small.parameters()) == plan.params_after <= 0.7 * plan.params
    left = {item.name: item.reason for item in plan.left_alone}
    assert "no calibration batch reached it" in left["idle"]
    x = batches[0]
    assert error(model, small, x) < 0.9
    lrc.save(small, plan, tmp_path / "out")
    again = lrc.load(tmp_path / "out", Net().double().eval())
    state = small.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    torch.testing.assert_close(again(x), small(x))
    assert lrc.Plan.from_json(plan.to_json()).layers == plan.layers


@pytest.mark.parametrize("name", RECIPES)
def test_presets_compress_in_one_call(case, name):
    """What the recipe looks at is collected, gradients too."""
    model, batches, _ = case
    small, plan = lrc.compress(model, lrc.Budget(params=0.7), RECIPES[name], batches=iter(batches))
    assert sum(p.numel() for p in small.parameters()) == plan.params_after <= 0.7 * plan.params
    assert error(model, small, torch.cat(batches)) < 0.9


def test_layers_without_statistics_stay_dense_or_are_planned_by_their_weights(case):
    model, batches, statistics = case
    budget, aware = lrc.Budget(params=0.6), lrc.activation_aware()
    some = lrc.collect(model, batches, ignore="fc")
    left = {item.name: item.reason for item in lrc.plan(model, budget, aware, statistics=some).left_alone}
    assert "the statistics were collected without it" in left["fc"]
    assert "no calibration batch reached it" in left["idle"]
    every = lrc.plan(model, budget, aware, statistics=some, unreached="data-free")
    assert {entry.layer.name for entry in every} == {"stem", "inner", "outer", "fc", "idle"}
    tails = torch.linalg.svdvals(model.fc.weight.detach()).square()
    for option in every["fc"].curve:
        if option.config is not None and option.config.groups == 1:
            kept = tails[: option.config.rank].sum() / tails.sum()
            assert option.error == pytest.approx(float(1 - kept), rel=1e-4)
    with pytest.raises(lrc.PlanError, match="'fc' has no statistics: error 'absolute'"):
        lrc.plan(model, budget, lrc.activation_aware("absolute"), statistics=some, unreached="data-free")
    with pytest.raises(lrc.PlanError, match="'dense' or 'data-free', got 'guess'"):
        lrc.plan(model, budget, aware, statistics=statistics, unreached="guess")


def test_one_dimensional_convolutions_are_refined():
    model, batches = Net1d().double(), pixels(80, (4, 20)).split(40)
    small, plan = lrc.compress(model, lrc.Budget(params=0.6), lrc.activation_aware(), batches=iter(batches))
    x = torch.cat(batches)
    assert error(model, small, x) < error(model, lrc.apply(model, plan), x)
    torch.testing.assert_close(means(small(x)), means(model(x)))


def test_single_precision_is_refined_as_double_is(case):
    model, batches, _ = case
    plan = halved(model)
    wide = lrc.apply(model, plan, batches=batches)
    single = Net().eval()
    single.load_state_dict(model.state_dict())
    small = lrc.apply(single, plan, batches=[b.float() for b in batches])
    assert small.stem.U.dtype == torch.float32
    x = torch.cat(batches)
    assert error(single, small, x.float()) == pytest.approx(error(model, wide, x), rel=0.02)


def test_what_neuron_removal_leaves_is_refined_too():
    model = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    ).double()
    x = pixels(300, (2, 6)).flatten(1)
    plan = lrc.plan(model, lrc.Budget(params=0.7), lrc.lnr(), example_inputs=x)
    assert plan.removals
    small = lrc.apply(model, plan, batches=iter(x.split(100)))
    assert sum(p.numel() for p in small.parameters()) == plan.params_after
    assert error(model, small, x) < 0.5
    with pytest.raises(lrc.PlanError, match="needs batches"):
        lrc.apply(model, plan)


def test_recipes_that_look_at_data_need_statistics(case):
    model, _, statistics = case
    for recipe in RECIPES.values():
        with pytest.raises(lrc.PlanError, match=r"lrc\.collect"):
            lrc.plan(model, lrc.Budget(params=0.5), recipe)
    plain = lrc.collect(model, [pixels(96)])
    with pytest.raises(lrc.PlanError, match=r"gradients=True"):
        lrc.plan(model, lrc.Budget(params=0.5), lrc.kfac_svd(), statistics=plain)
    chosen = lrc.plan(model, lrc.Budget(params=0.5), statistics=statistics).recipe
    assert chosen == str(lrc.activation_aware())  # the default where there is data


def test_statistics_of_another_model_are_refused(case):
    model, _, statistics = case
    torch.manual_seed(9)
    other, plan = Net().double(), halved(model)
    with pytest.raises(lrc.PlanError, match=rf"this model, .*{statistics.fingerprint}"):
        lrc.plan(other, lrc.Budget(params=0.5), lrc.pca(), statistics=statistics)
    with pytest.raises(lrc.PlanError, match=rf"this model, .*{statistics.fingerprint}"):
        lrc.apply(other, plan, statistics=statistics)
    with pytest.raises(lrc.PlanError, match=r"layer 'stem', the model has none"):
        lrc.plan(Net1d().double(), lrc.Budget(params=0.5), lrc.pca(), statistics=statistics)


def test_plans_of_another_model_are_refused_before_anything_is_fitted(case):
    model, batches, statistics = case
    plan = halved(model)
    narrow = Net().double()
    narrow.inner = nn.Conv2d(12, 12, 5, padding=2, stride=2, groups=2).double()
    for other in (Net1d().double(), narrow, lrc.apply(model, plan)):
        for data in ({}, {"batches": batches}, {"statistics": statistics}):
            with pytest.raises(lrc.PlanError):
                lrc.apply(other, plan, **data)


def test_empty_batches_are_refused(case):
    model, _, statistics = case
    for empty in ([], iter(())):
        with pytest.raises(lrc.CompressionError, match="at least one batch, got none"):
            lrc.apply(model, halved(model), statistics=statistics, batches=empty)


def test_weights_and_activations_that_are_not_finite_are_refused(case):
    model, batches, _ = case
    plan = halved(model)
    broken = [b.clone() for b in batches]
    broken[1][3, 1, 2, 2] = torch.nan
    with pytest.raises(lrc.CompressionError, match="'stem'"):
        lrc.apply(model, plan, batches=broken)
    torch.manual_seed(1)
    other = Net().double().eval()
    other.inner.weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(lrc.WeightError, match="'inner'"):
        lrc.apply(other, plan, batches=batches)


def test_too_few_samples_warn_with_both_numbers(case):
    model, batches, statistics = case
    few = lrc.collect(model, [batches[0][:2]])
    with pytest.warns(UserWarning, match="cannot span") as caught:
        plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.activation_aware(), statistics=few)
    texts = [str(warning.message) for warning in caught]
    assert any("layer 'fc': 2 samples cannot span its 16 input dimensions" in text for text in texts)
    assert lrc.apply(model, plan, statistics=few)(batches[0]).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrc.plan(model, lrc.Budget(params=0.6), lrc.activation_aware(), statistics=statistics)


def test_the_default_prior_is_that_of_the_data():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(40, 8)
    known = lrc.collect(model, [x])
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.activation_aware(), statistics=known)
    for data, prior, other in (({"statistics": known}, 0.01, 0.2), ({"batches": [x]}, 0.2, 0.01)):
        given, same, unlike = (
            lrc.apply(model, plan, **data, refinement=Refinement(prior=p))(x) for p in (None, prior, other)
        )
        assert torch.equal(given, same)
        assert not torch.allclose(given, unlike)
