"""Linear Neural Reconstruction: budgets met, weights optimal, artefacts whole, strategies as defined."""

import copy
import dataclasses
import itertools
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompress as lrc
from lrcompress import allocate, calibrate, reconstruct, removal, rewrite
from lrcompress.factorize import columns
from lrcompress.subject import surveyed
from lrcompress.types import Chaining, Removal

CHAININGS = typing.get_args(Chaining)


def convolutional():
    """Convolutions without bias, batch norm, depthwise, a residual sum, flatten: float64."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.inner = nn.Conv2d(8, 6, 3, padding=1, stride=1, bias=False)
            self.outer = nn.Conv2d(6, 8, 1)
            self.depth = nn.Conv2d(8, 8, 3, groups=8)
            self.fc = nn.Linear(8 * 4, 7)
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            x = torch.relu(self.norm(self.stem(x)))
            x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
            return self.head(torch.relu(self.fc(torch.flatten(self.depth(x), 1))))

    model = Net().double()
    model(torch.randn(20, 2, 4, 4, dtype=torch.float64))
    return model.eval(), torch.randn(60, 2, 4, 4, dtype=torch.float64)


def perceptron():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    return model.double().eval(), torch.randn(200, 20, dtype=torch.float64)


def subject(model, x):
    return surveyed(model, (), x)


def counted(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("chaining", CHAININGS)
@pytest.mark.parametrize("make", [convolutional, perceptron])
@pytest.mark.parametrize("debias", [True, False])
def test_budget_is_met_and_predicted_to_the_parameter(make, chaining, debias):
    model, x = make()
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.lnr(chaining, debias), example_inputs=x)
    small = lrc.apply(model, plan, batches=x.split(25))
    assert counted(small) == plan.params_after <= 0.6 * plan.params == 0.6 * counted(model)
    assert small(x).shape == model(x).shape
    assert plan.sequential == chaining.endswith("top-down")
    assert plan.removals


@pytest.mark.parametrize("share", [0.95, 0.9, 0.85, 0.8, 0.7, 0.5, 0.3])
def test_budget_is_met_where_refits_make_biases(share):
    model, x = convolutional()
    plan = lrc.plan(model, lrc.Budget(params=share), lrc.lnr("parallel"), example_inputs=x)
    small = lrc.apply(model, plan, batches=[x])
    assert counted(small) == plan.params_after <= share * plan.params
    removed_from = {slot.name for item in plan.removals for slot in item.coupling.consumers}
    assert (small.inner.bias is not None) == ("inner" in removed_from)


def test_budget_in_macs_is_met_and_predicted():
    model, x = convolutional()
    plan = lrc.plan(model, lrc.Budget(macs=0.5), lrc.lnr(), example_inputs=x)
    small = lrc.apply(model, plan, batches=[x])
    check = lrc.verify(model, small, x)
    assert check.macs_after == plan.macs_after <= 0.5 * plan.macs == 0.5 * check.macs_before


@pytest.mark.parametrize("make", [convolutional, perceptron])
def test_artefact_and_plan_survive(make, tmp_path):
    model, x = make()
    plan = lrc.plan(model, lrc.Budget(params=0.5), lrc.lnr(), example_inputs=x)
    assert lrc.Plan.from_json(plan.to_json()) == plan
    small = lrc.apply(model, plan, batches=[x])
    lrc.save(small, plan, tmp_path / "out")
    assert lrc.load_plan(tmp_path / "out") == plan
    again = lrc.load(tmp_path / "out", make()[0])
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
    with torch.device("meta"):
        torch.manual_seed(0)
    hollow = make()[0].to("meta")
    torch.testing.assert_close(lrc.load(tmp_path / "out", hollow)(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize("chaining", CHAININGS)
def test_neurons_that_others_can_replace_go_without_a_trace(chaining):
    """Hidden activations of rank 5 in 16 dimensions and no nonlinearity: 5 neurons say all."""
    model = nn.Sequential(nn.Linear(9, 16), nn.Linear(16, 6)).double()
    model[0].weight.data = torch.randn(16, 5, dtype=torch.float64) @ torch.randn(5, 9, dtype=torch.float64)
    x = torch.randn(300, 9, dtype=torch.float64)
    wiring = removal.trace(model, x)
    hidden = next(c for c in wiring.couplings if c.name == "0")
    paths = reconstruct.Paths.of(subject(model, x), wiring.couplings, lrc.lnr(chaining), [x], "params")
    found = paths.chosen(int(0.6 * counted(model)))
    assert max(item.error for item in found) < 1e-6
    small = removal.removed(
        wide := reconstruct.reconstructed(model, [Removal(hidden, (1, 4, 6, 9, 11))], [x], False),
        [Removal(hidden, (1, 4, 6, 9, 11))],
    )
    assert counted(small) < counted(model)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide(x), small(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sequential", [False, True])
def test_what_is_left_is_the_least_squares_fit(sequential):
    """No weight on the kept inputs comes nearer to the original outputs than the one that is set."""
    model, x = perceptron()
    couplings = {c.name: c for c in removal.trace(model, x).couplings}
    removals = [Removal(couplings["1"], tuple(range(0, 16, 2))), Removal(couplings["3"], tuple(range(8)))]
    wide = reconstruct.reconstructed(model, removals, x.split(50), sequential)
    small = removal.removed(wide, removals)
    with torch.no_grad():
        given = (small if sequential else removal.removed(model, removals))[:5](x)
        if not sequential:
            given = model[:5](x)[:, :8]
        wanted = model(x)
        ones = torch.cat((given, torch.ones(len(x), 1, dtype=torch.float64)), 1)
        best = torch.linalg.lstsq(ones, wanted).solution
        torch.testing.assert_close(small[5].weight, best[:-1].T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small[5].bias, best[-1], rtol=1e-4, atol=1e-5)


def test_sequential_fit_and_debiasing_lose_less():
    model, x = perceptron()
    errors = {}
    for chaining, debias in (("bottom-up+top-down", True), ("bottom-up", True), ("bottom-up", False)):
        plan = lrc.plan(model, lrc.Budget(params=0.3), lrc.lnr(chaining, debias), example_inputs=x)
        small = lrc.apply(model, plan, batches=[x])
        errors[chaining, debias] = lrc.verify(model, small, x).output_error
    assert errors["bottom-up+top-down", True] < errors["bottom-up", True] < errors["bottom-up", False]


def test_bottom_up_gives_only_what_the_next_layer_keeps():
    """Of two halves of a network one barely reaches the output: bottom-up drops the inputs of that half."""
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    first, last = model[0].weight.data, model[2].weight.data
    first[:4, 6:] = first[4:, :6] = 0
    first[4:] *= 3  # the useless half is the louder one
    last[:, 4:] *= 1e-3
    x = torch.randn(400, 12, dtype=torch.float64)
    kept = {}
    for chaining in ("parallel", "bottom-up"):
        couplings = removal.trace(model, x).couplings
        paths = reconstruct.Paths.of(subject(model, x), couplings, lrc.lnr(chaining), [x], "params")
        found = paths.chosen(counted(model) // 2)
        kept[chaining] = {item.coupling.name: item.kept for item in found}
    assert set(kept["bottom-up"]["0"]) <= {0, 1, 2, 3}
    assert set(kept["bottom-up"]["inputs of 0"]) <= set(range(6))
    assert set(kept["parallel"]["inputs of 0"]) & set(range(6, 12))


LAYERS = [
    nn.Linear(5, 3),
    nn.Conv1d(4, 3, 3, stride=2, padding=1, dilation=2),
    nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 1), padding_mode="reflect"),
    nn.Conv2d(4, 3, 3, padding="same", dilation=(1, 2)),
    nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1), padding_mode="circular", bias=False),
]


def patches(layer, x):
    """What the layer multiplies its weight with, one patch a row."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    dims = layer.weight.ndim - 2
    x = x if x.ndim == dims + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis in range(dims):
        size, dilation = layer.kernel_size[axis], layer.dilation[axis]
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, layer.stride[axis])[..., ::dilation]
    return x.movedim(1, 1 + dims).reshape(-1, layer.weight[0].numel())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_moments_are_those_of_the_patches_that_a_layer_multiplies(layer):
    layer = layer.double()
    size = (5,) if isinstance(layer, nn.Linear) else (layer.in_channels, *range(5, 4 + layer.weight.ndim - 1))
    x = torch.randn(7, *size, dtype=torch.float64)
    rows = patches(layer, x)
    y = (rows @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)).detach()
    expected = layer(x).detach()
    expected = expected if isinstance(layer, nn.Linear) else expected.movedim(1, -1)
    torch.testing.assert_close(y, expected.reshape(y.shape))
    given = copy.deepcopy(layer)
    given.weight.data += torch.randn_like(given.weight)
    e = rows @ (layer.weight - given.weight).detach().flatten(1).T
    models = nn.Sequential(layer), nn.Sequential(given)
    moments = calibrate.cross_moments(*models, ["0"], [x[:3], x[3:]])["0"]
    torch.testing.assert_close(moments.xx, rows.T @ rows / len(rows))
    torch.testing.assert_close(moments.x, rows.mean(0))
    torch.testing.assert_close(moments.ex, e.T @ rows / len(rows))
    torch.testing.assert_close(moments.e, e.mean(0))
    torch.testing.assert_close(moments.ee, e.square().mean(0))
    _, yx, yy = moments.centred
    centred = y - y.mean(0)
    torch.testing.assert_close(yx, centred.T @ (rows - rows.mean(0)) / len(rows))
    torch.testing.assert_close(yy, centred.square().mean(0))
    torch.testing.assert_close(moments.bias_of(layer.weight.detach().flatten(1)), moments.bias)


def test_moments_are_of_outputs_before_anything_writes_to_them():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    given = copy.deepcopy(model)
    given[0].bias.data += 1.0
    found = calibrate.cross_moments(model, given, ["0", "2"], [x[:10], x[10:]])["0"]
    torch.testing.assert_close(found.e, -torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found.ex, -x.mean(0).expand(5, 6))


def test_path_falls_and_its_errors_are_those_of_the_best_fit():
    x = torch.randn(500, 10, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64)
    weight = torch.randn(4, 10, dtype=torch.float64)
    xx, yx = x.T @ x / 500, weight @ x.T @ x / 500
    variance = float((yx * weight).sum())
    consumer = columns.Consumer(xx, yx, variance, variance, torch.arange(10) // 2)
    path = columns.supports(columns.problem_of([consumer], 5), 40, 1e-3)
    counts, errors = [len(s.kept) for s in path], [s.error for s in path]
    assert counts == sorted(set(counts))
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert (counts[-1], errors[-1]) == (5, 0.0)
    for support in path[:-1]:
        own = [2 * c + i for c in support.kept for i in range(2)]
        lost = x @ weight.T - x[:, own] @ torch.linalg.lstsq(x[:, own], x @ weight.T).solution
        assert support.error == pytest.approx(float(lost.square().sum() / 500) / variance, rel=1e-4)


def test_widths_fit_and_are_near_the_best():
    """Two couplings whose widths multiply, all pairs tried."""
    losses = np.array([[1.0, 0], [0, 1]]), np.array([[0.0, 0], [1, 0]])
    sizes = allocate.Sizes(np.array([9.0, 5.0]), np.array([7.0, 9.0]), *losses, np.ones(2), np.ones(2))
    counts = [np.arange(1, 10), np.arange(1, 6)]
    errors = [0.7 ** np.arange(1, 10) - 0.7**9, 0.5 ** np.arange(1, 6) - 0.5**5]
    for limit in range(20, 120, 7):
        pairs = itertools.product(range(9), range(5))
        cost = {p: float(sizes.cost(np.array([9 - counts[0][p[0]], 5 - counts[1][p[1]]]))) for p in pairs}
        best = min(errors[0][i] + errors[1][j] for (i, j), price in cost.items() if price <= limit)
        i, j = allocate.shrink(sizes, counts, errors, limit)
        assert cost[i, j] <= limit
        assert errors[0][i] + errors[1][j] <= 1.25 * best + 0.02
    with pytest.raises(lrc.BudgetError, match="allows 9, the least possible is 10"):
        allocate.shrink(sizes, counts, errors, 9)


def test_what_cannot_be_done_is_said():
    model, x = perceptron()
    with pytest.raises(lrc.PlanError, match="needs example_inputs"):
        lrc.plan(model, lrc.Budget(params=0.5), lrc.lnr())
    with pytest.raises(lrc.BudgetError, match="allows 10, the least possible is"):
        lrc.plan(model, lrc.Budget(params=10), lrc.lnr(), example_inputs=x)
    with pytest.raises(lrc.BudgetError, match="allows 10, the least possible is 84"):
        lrc.plan(
            nn.Sequential(nn.Linear(20, 4)),
            lrc.Budget(params=10),
            lrc.lnr(),
            example_inputs=x.float(),
            ignore="0",
        )
    plan = lrc.plan(model, lrc.Budget(params=0.5), lrc.lnr(), example_inputs=x)
    with pytest.raises(lrc.PlanError, match="needs batches or statistics"):
        lrc.apply(model, plan)
    with pytest.raises(lrc.CompressionError, match="at least one batch"):
        lrc.apply(model, plan, batches=[])
    with pytest.raises(lrc.PlanError, match=r"chaining must be one of .* got 'sideways'"):
        lrc.lnr("sideways")
    with pytest.raises(lrc.PlanError, match="must have 16 rows"):
        lrc.apply(nn.Sequential(nn.Flatten(), nn.Linear(20, 17)), plan, batches=[x])
    with pytest.raises(lrc.PlanError, match=r"the plan has|must be|must have"):
        lrc.save(model, plan, "nowhere")
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(lrc.WeightError, match="'1'"):
        lrc.plan(model, lrc.Budget(params=0.5), lrc.lnr(), example_inputs=x)


def test_models_stay_as_they_were():
    model, x = convolutional()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = lrc.plan(model, lrc.Budget(params=0.5), lrc.lnr(), example_inputs=x)
    small = lrc.apply(model, plan, batches=[x])
    assert model.training
    assert small.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rewrite.survey(small)[0].keys() >= {"inner", "outer", "fc"}


@pytest.mark.parametrize("make", [convolutional, perceptron])
@pytest.mark.parametrize("chaining", CHAININGS)
def test_statistics_alone_plan_and_fit(make, chaining, tmp_path):
    """The inputs only trace; each layer is fitted by itself, as with batches where nothing is sequential."""
    model, x = make()
    known = lrc.collect(model, x.split(25))
    plan = lrc.plan(model, lrc.Budget(params=0.5), lrc.lnr(chaining), statistics=known, example_inputs=x[:1])
    small = lrc.apply(model, plan, statistics=known)
    assert counted(small) == plan.params_after <= 0.5 * plan.params
    lrc.save(small, plan, tmp_path / "out")
    assert torch.equal(lrc.load(tmp_path / "out", model)(x), small(x))
    alone = dataclasses.replace(plan, sequential=False)
    torch.testing.assert_close(lrc.apply(model, alone, batches=[x])(x), small(x), rtol=1e-5, atol=1e-7)
    if chaining != "top-down":  # which alone chooses on what the reduced layers give
        same = lrc.plan(model, lrc.Budget(params=0.5), lrc.lnr(chaining), example_inputs=x)
        assert [item.kept for item in same.removals] == [item.kept for item in plan.removals]


def test_float32_statistics_of_constant_inputs_say_that_they_are_constant():
    model, x = perceptron()
    x[:, 3], x[:, 7] = 0.1, -0.42421296
    known = lrc.collect(model.float(), x.float().split(7))
    flat = known.layers["1"].covariance[0]
    assert (flat[[3, 7]].abs() <= 1e-15).all()
    assert (flat.diagonal() > 0.1).sum() == 18
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.lnr(), statistics=known, example_inputs=x[:1].float())
    inputs = next(item for item in plan.removals if item.coupling.name == "inputs of 1")
    assert not {3, 7} & set(inputs.kept)


def test_statistics_of_the_narrower_network_are_its_own_where_nothing_was_lost():
    """Channels that are always zero: what is left sees the same inputs."""
    model, x = convolutional()
    couplings = {c.name: c for c in removal.trace(model, x).couplings}
    shared = next(c for c in couplings.values() if set(c.producers) == {"stem", "outer"})
    for name in ("norm", "outer"):
        module = model.get_submodule(name)
        module.weight.data[[2, 5]], module.bias.data[[2, 5]] = 0, 0
    model.depth.bias.data[[2, 5]] = 0
    removals = [Removal(shared, (0, 1, 3, 4, 6, 7))]
    small = removal.removed(model, removals)
    found = removal.narrowed(lrc.collect(model, [x]), small, model, removals)
    measured = lrc.collect(small, [x])
    assert found.fingerprint == measured.fingerprint
    assert found.layers.keys() == measured.layers.keys()
    for name, known in measured.layers.items():
        torch.testing.assert_close(found.layers[name].autocorrelation, known.autocorrelation)
        torch.testing.assert_close(found.layers[name].mean, known.mean)
        assert found.layers[name].samples == known.samples


def test_statistics_that_do_not_cover_the_model():
    model, x = perceptron()
    known = lrc.collect(model, [x], ignore="3")
    plan = lrc.plan(model, lrc.Budget(params=0.7), lrc.lnr(), statistics=known, example_inputs=x[:1])
    assert {item.coupling.name for item in plan.removals} <= {"3", "inputs of 1"}
    assert any("no statistics of '3'" in item.reason for item in plan.left_alone)
    full = lrc.collect(model, [x])
    plan = lrc.plan(model, lrc.Budget(params=0.3), lrc.lnr(), statistics=full, example_inputs=x[:1])
    with pytest.raises(lrc.PlanError, match="must hold layer '3'"):
        lrc.apply(model, plan, statistics=known)
    other = perceptron()[0]
    with pytest.raises(lrc.PlanError, match="statistics must be of this model"):
        lrc.plan(other, lrc.Budget(params=0.7), lrc.lnr(), statistics=full, example_inputs=x)
    with pytest.raises(lrc.PlanError, match="statistics must be of this model"):
        lrc.apply(other, plan, statistics=full)


def test_compress_in_one_call():
    model, x = perceptron()
    small, plan = lrc.compress(model, lrc.Budget(params=0.5), lrc.lnr(), batches=x.split(50))
    assert counted(small) == plan.params_after <= 0.5 * plan.params
