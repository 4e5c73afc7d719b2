"""Fits on moments that say little: few samples, flat, dead, huge or shifted inputs, 16 bits, routers."""

import warnings

import pytest
import torch
from torch import nn

import lrcompress as lrc
from lrcompress import calibrate, ops, refine
from lrcompress.types import Refinement


def linears():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


def convolutions():
    """Dense, depthwise with and without bias, grouped and pointwise, with batch norms that have run."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    model(torch.randn(64, 4, 8, 8))
    return model.eval()


def depthwise():
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)).eval()


def rows(count=400, width=24):
    return torch.randn(count, width)


def scaled(factor, first=1):
    """Some features a factor larger than the others."""
    x = rows()
    x[:, :first] *= factor
    return x


def images(count=48):
    return torch.randn(count, 4, 8, 8)


def spoiled(**channels):
    """Images whose channels are dead, or nearly constant."""
    x = images()
    if channels.get("dead"):
        x[:, 0] = 0
    if channels.get("flat"):
        x[:, 1] = 1 + channels["flat"] * torch.randn(len(x), 8, 8)
    return x


DATA = {
    "plain": (linears, rows),
    "one sample": (linears, lambda: rows(1)),
    "fewer samples than inputs": (linears, lambda: rows(7)),
    "three dimensions": (linears, lambda: rows(400, 3) @ torch.randn(3, 24)),
    "one feature 1e4 times the others": (linears, lambda: scaled(1e4)),
    "one feature 1e6 times the others": (linears, lambda: scaled(1e6)),
    "all features but one small": (linears, lambda: scaled(1e-6, 23)),
    "dead features": (linears, lambda: scaled(0.0, 9)),
    "features that hardly vary": (linears, lambda: 1 + 1e-5 * rows()),
    "a mean of 1e3": (linears, lambda: 1e3 + rows()),
    "a mean of 1e6": (linears, lambda: 1e6 + rows()),
    "constants": (linears, lambda: torch.ones(400, 24) * 3),
    "nothing but zeros": (linears, lambda: torch.zeros(400, 24)),
    "tiny": (linears, lambda: 1e-25 * rows()),
    "images": (convolutions, images),
    "one image": (convolutions, lambda: images(1)),
    "images with dead channels": (convolutions, lambda: spoiled(dead=True)),
    "images with flat channels": (convolutions, lambda: spoiled(dead=True, flat=1e-5)),
    "flat channels, depthwise": (depthwise, lambda: spoiled(flat=1e-5)),
    "flatter channels, depthwise": (depthwise, lambda: spoiled(flat=1e-7)),
    "dead channels, depthwise": (depthwise, lambda: spoiled(dead=True)),
}
# No input varies by more than the rounding of what statistics are added up in.
SAYS_NOTHING = {
    "one sample",
    "features that hardly vary",
    "a mean of 1e6",
}
# Of outputs: what factors of the type cost, the weights being the same.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def made(name, dtype):
    """Return the model and its inputs."""
    torch.manual_seed(0)
    model, inputs = DATA[name]
    return model().to(dtype), inputs().to(dtype)


def full_rank(model, x, scheme=0):
    plan = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd(), example_inputs=x)
    for entry in plan:
        layer = entry.layer
        plan = plan.edit(layer.name, rank=layer.full_rank(scheme, 1), groups=1, scheme=scheme)
    return plan


def difference(model, small, x):
    with torch.no_grad():
        y, z = model(x).double(), small(x).double()
    return float((y - z).norm() / y.norm().clamp(min=1e-30))


def others(x):
    """Inputs that calibration never saw: moved, larger, and of another distribution."""
    return [x, x + 0.1, x * 1.5 - 1, torch.randn_like(x)]


def collected(model, x):
    return lrc.collect(model, x.split(len(x) // 2 + 1))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", DATA)
def test_full_rank_is_the_same_network_after_every_fit_on_other_inputs_too(name, dtype):
    model, x = made(name, dtype)
    if not x.isfinite().all():
        pytest.skip("float16 does not hold these inputs")
    plan = full_rank(model, x)
    for data in ({"statistics": collected(model, x)}, {"batches": x.split(16)}):
        for how in (None, Refinement(prior=0, bias=dtype == torch.float64)):
            small = lrc.apply(model, plan, **data, refinement=how)
            assert max(difference(model, small, other) for other in others(x)) < ROUNDING[dtype]


@pytest.mark.parametrize("recipe", [lrc.activation_aware(), lrc.pca(), lrc.svd_llm()], ids=lambda r: r.name)
@pytest.mark.parametrize("name", [name for name in DATA if DATA[name][0] is not depthwise])
def test_presets_plan_and_fit_on_any_moments(name, recipe):
    """The fits lose little more of calibration's outputs than factors without data do."""
    model, x = made(name, torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot span")
        statistics = collected(model, x)
        plan = lrc.plan(model, lrc.Budget(params=0.7), recipe, statistics=statistics)
    assert plan.params_after <= 0.7 * plan.params
    free = difference(model, lrc.apply(model, plan), x)
    for data in ({"statistics": statistics}, {"batches": x.split(16)}):
        small = lrc.apply(model, plan, **data)
        assert difference(model, small, x) < 1.1 * free + 1e-3
        for before, after in zip(model.parameters(), small.parameters(), strict=False):
            assert after.isfinite().all(), before.shape


@pytest.mark.parametrize("kind", ["dead", "flat", "shifted"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("by", ["statistics", "batches"])
def test_where_the_data_is_silent_the_weight_is_kept_as_well_as_the_rank_allows(kind, groups, by):
    """One rank below full: some of the columns that the data does not see is lost, not most of them."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12)).eval(), rows(300, 16)
    silent = slice(0, 8)
    x[:, silent] = {"dead": 0.0 * x, "flat": 2 + 1e-6 * x, "shifted": 1e3 + 1e-3 * x}[kind][:, silent]
    plan = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd())
    rank = plan["0"].layer.full_rank(0, groups) - 1
    plan = plan.edit("0", rank=rank, groups=groups)
    data = {"statistics": collected(model, x)} if by == "statistics" else {"batches": [x]}
    small = lrc.apply(model, plan, **data)
    with torch.no_grad():
        W = model[0].weight.detach()[:, silent]
        M = (small(torch.eye(16)) - small(torch.zeros(1, 16))).T[:, silent]
    assert float((M - W).norm() / W.norm()) < 0.4


class Router(nn.Module):
    """Each row goes through the expert that the gate chooses; experts without rows are passed over."""

    def __init__(self, experts=4, skip=True):
        super().__init__()
        self.pre, self.gate = nn.Linear(16, 16), nn.Linear(16, experts)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(experts))
        self.skip = skip

    def forward(self, x):
        x = torch.relu(self.pre(x))
        choice, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            picked = (choice == i).nonzero()[:, 0]
            if len(picked) or not self.skip:
                y = y.index_add(0, picked, expert(x[picked]))
        return y


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("recipe", [lrc.svd(), lrc.activation_aware()], ids=lambda r: r.name)
def test_experts_are_fitted_on_the_rows_that_they_get(skip, recipe):
    torch.manual_seed(0)
    model, batches = Router(skip=skip).eval(), [rows(60, 16) for _ in range(4)]
    statistics = lrc.collect(model, batches)
    plan = lrc.plan(model, lrc.Budget(params=0.6), recipe, example_inputs=batches[0], statistics=statistics)
    small = lrc.apply(model, plan, batches=batches)
    assert difference(model, small, torch.cat(batches)) < 1
    same = lrc.apply(model, full_rank(model, batches[0]), batches=batches)
    assert max(difference(model, same, x) for x in others(batches[0])) < 1e-5


class Choosers(nn.Module):
    """Each expert takes the eight rows that it scores highest, so the number of rows tells nothing."""

    def __init__(self):
        super().__init__()
        self.pre, self.gate, self.post = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = torch.relu(self.pre(x))
        score, y = self.gate(x), x
        for i, expert in enumerate(self.experts):
            picked = score[:, i].topk(8).indices
            y = y.index_add(0, picked, expert(x[picked]))
        return self.post(y)


def test_experts_that_choose_their_rows_are_not_held_to_the_outputs_of_others():
    torch.manual_seed(0)
    model, batches = Choosers().eval(), [rows(32, 16) for _ in range(8)]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = calibrate.what_follows(model, layers, lambda: model(batches[0]))
    chosen = {name for name, behind in found.items() if behind.chosen}
    assert chosen == {f"experts.{i}" for i in range(4)}
    plan = full_rank(model, batches[0]).edit("pre", rank=4)
    small = lrc.apply(model, plan, batches=batches)
    for name in chosen:
        expert = small.get_submodule(name)
        torch.testing.assert_close(expert.U @ expert.V, model.get_submodule(name).weight)
    assert not torch.allclose(small.post.U @ small.post.V, model.post.weight)


def test_experts_that_only_a_later_batch_reaches_are_fitted_and_others_keep_their_weights():
    torch.manual_seed(0)
    model = Router(3).eval()
    model.gate.weight.data.zero_()
    model.gate.weight.data[:, 0] = torch.tensor([1.0, -1.0, 0.0])
    model.gate.bias.data = torch.tensor([-1.0, 1.0, -9.0])
    model.pre.weight.data, model.pre.bias.data = torch.eye(16), torch.zeros(16)
    low, high = rows(80, 16) - 9, rows(80, 16) + 9
    plan = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd())
    for i in range(3):
        plan = plan.edit(f"experts.{i}", rank=4)
    plan = plan.keep_dense("pre").keep_dense("gate")
    free, small = lrc.apply(model, plan), lrc.apply(model, plan, batches=[low, high])
    changed = [not torch.equal(free.experts[i].U, small.experts[i].U) for i in range(3)]
    assert changed == [True, True, False]


def test_layers_called_several_times_are_fitted_on_all_their_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.b(self.a(self.b(x).tanh()).tanh()) + self.a(x)

    torch.manual_seed(0)
    model, x = Twice().eval(), rows(200, 12)
    same = lrc.apply(model, full_rank(model, x), batches=x.split(50))
    assert max(difference(model, same, other) for other in others(x)) < 1e-5
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.svd())
    fitted, free = lrc.apply(model, plan, batches=x.split(50)), lrc.apply(model, plan)
    assert difference(model, fitted, x) < difference(model, free, x)


def test_layers_of_several_types_in_one_model():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(20, 20).half(), nn.Linear(20, 20), nn.Linear(20, 8).bfloat16()

        def forward(self, x):
            return self.c(self.b(self.a(x.half()).relu().float()).relu().bfloat16())

    torch.manual_seed(0)
    model, x = Mixed().eval(), rows(300, 20)
    statistics = lrc.collect(model, [x])
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.activation_aware(), statistics=statistics)
    free = difference(model, lrc.apply(model, plan), x)
    for data in ({"statistics": statistics}, {"batches": x.split(100)}):
        assert difference(model, lrc.apply(model, plan, **data), x) < free
        assert (
            max(difference(model, lrc.apply(model, full_rank(model, x), **data), o) for o in others(x)) < 4e-2
        )


def test_sums_of_products_beyond_float16_are_fitted():
    torch.manual_seed(0)
    model = linears().half()
    x = (5 * rows(40000) + 2).half()
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.svd())
    free, small = lrc.apply(model, plan), lrc.apply(model, plan, batches=[x])
    assert difference(model, small, x) < difference(model, free, x)


def test_fits_that_a_type_does_not_hold_name_the_layer():
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))
    with pytest.raises(lrc.CompressionError, match=r"layer 'a\.b': torch\.float16 does not.*1e\+06"):
        refine._set("a.b", weight, torch.full((2, 2), 1e6, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in DATA if DATA[name][0] is linears])
def test_neurons_removed_on_any_moments(name):
    """With nothing to remove the network is the same; with a part gone nothing explodes."""
    model, x = made(name, torch.float32)
    statistics = collected(model, x)
    whole = lrc.plan(model, lrc.Budget(params=1.0), lrc.lnr(), example_inputs=x, statistics=statistics)
    for data in ({"statistics": statistics}, {"batches": x.split(16)}):
        small = lrc.apply(model, whole, **data)
        assert max(difference(model, small, other) for other in others(x)) < ROUNDING[torch.float32]
    if name in SAYS_NOTHING:
        with pytest.raises(lrc.BudgetError, match="least possible"):
            lrc.plan(model, lrc.Budget(params=0.6), lrc.lnr(), example_inputs=x, statistics=statistics)
        return
    half = lrc.plan(model, lrc.Budget(params=0.6), lrc.lnr(), example_inputs=x, statistics=statistics)
    for data in ({"statistics": statistics}, {"batches": x.split(16)}):
        assert difference(model, lrc.apply(model, half, **data), x) < 1


@pytest.mark.parametrize("scale", [1e-170, 1e170])
@pytest.mark.parametrize(
    "recipe", [lrc.svd_energy(), lrc.alds(), lrc.activation_aware()], ids=lambda r: r.name
)
def test_weights_whose_squares_are_no_numbers_are_refused(scale, recipe):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double().eval(), rows(50, 8).double()
    model[1].weight.data *= scale
    statistics = lrc.collect(model, [x])
    with pytest.raises(lrc.WeightError, match=r"layer '1': the largest entry"):
        lrc.plan(model, lrc.Budget(params=0.6), recipe, statistics=statistics)
    model[1].weight.data.zero_()
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.svd_energy())
    assert difference(model, lrc.apply(model, plan), x) < 1e-12


@pytest.mark.parametrize("spectrum", ["flat", "falling", "singular", "zero", "scales"])
def test_least_squares_of_singular_moments(spectrum):
    """The regression explains what it can, whatever the moment lacks, and never more."""
    torch.manual_seed(0)
    x = torch.randn(500, 12, dtype=torch.float64)
    falls = {"flat": 0.0, "falling": 0.25, "scales": 0.5}  # powers of ten from one input to the next
    if spectrum in falls:
        x = x * 10.0 ** -(falls[spectrum] * torch.arange(12, dtype=torch.float64))
    elif spectrum == "singular":
        x[:, 6:] = x[:, :6] @ torch.randn(6, 6, dtype=torch.float64)
    else:
        x = 0 * x
    W = torch.randn(5, 12, dtype=torch.float64)
    y = x @ W.T
    xx, yx = x.T @ x / 500, y.T @ x / 500
    fitted = ops.least_squares(xx, yx)
    assert float((y - x @ fitted.T).norm()) <= 1e-5 * float(y.norm())
    power = float(y.square().sum()) / 500
    assert ops.explained(xx, yx) == pytest.approx(power, rel=1e-6)
    if spectrum in falls:
        torch.testing.assert_close(fitted, W, rtol=1e-6, atol=1e-6)


def test_moments_that_rounding_left_indefinite_become_definite():
    torch.manual_seed(0)
    x = torch.randn(500, 4) @ torch.randn(4, 30)
    xx = (x.T @ x / 500).double()  # of rank 4, in float32
    assert float(torch.linalg.eigvalsh(xx)[0]) < -1e-9
    moment, factor, root = ops.definite(xx)
    assert float(torch.linalg.eigvalsh(moment)[0]) > 0
    torch.testing.assert_close(factor @ factor.T * root * root[:, None], moment)
    assert float((moment - xx).norm() / xx.norm()) < 1e-5
    with pytest.raises(ValueError, match="must be finite"):
        ops.definite(xx * torch.nan)
