"""Modules with a forward of their own: the layer in them is seen on example inputs, and compressed."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompress as lrc

BUDGET = lrc.Budget(params=0.6)


class Dynamic(nn.Conv2d):
    """Pads as TensorFlow's "same" does, by the size of its input."""

    def forward(self, x):
        sides = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.weight.shape[:1:-1], self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        x = F.pad(x, sides)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Static(nn.Conv2d):
    """Pads by a module of its own."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, groups=self.groups)


class Padding(nn.Conv2d):
    """Hands its padding to torch, and does something after that."""

    def forward(self, x):
        return 2 * F.conv2d(x, weight=self.weight, bias=self.bias, padding=(1, 1))


class Causal(nn.Conv1d):
    """Sees the past alone."""

    def forward(self, x):
        return F.conv1d(F.pad(x, (self.kernel_size[0] - 1, 0)), self.weight, self.bias)


class Scaled(nn.Linear):
    """Scales its inputs."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.full((sizes[0],), 2.0))

    def forward(self, x):
        return F.linear(x * self.scale, self.weight, self.bias)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Dynamic(4, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = Static(8, 8, 2, groups=2)
        self.fc = Scaled(8, 12)

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        return self.fc((x + self.b(x)).mean((2, 3)))


class Plain(nn.Module):
    """The same function of ordinary layers, for images of 9 x 9."""

    def __init__(self, own):
        super().__init__()
        self.pad_a, self.pad_b = nn.ZeroPad2d(1), nn.ZeroPad2d((0, 1, 0, 1))
        self.a = nn.Conv2d(4, 8, 3, stride=2, bias=False)
        self.b, self.fc, self.norm = nn.Conv2d(8, 8, 2, groups=2), nn.Linear(8, 12), own.norm
        self.scale = own.fc.scale
        for name in ("a", "b", "fc"):
            parameters = dict(getattr(own, name).named_parameters())
            getattr(self, name).load_state_dict({k: v for k, v in parameters.items() if k != "scale"})

    def forward(self, x):
        x = self.norm(self.a(self.pad_a(x))).relu()
        return self.fc((x + self.b(self.pad_b(x))).mean((2, 3)) * self.scale)


def settled() -> tuple[nn.Module, torch.Tensor]:
    model = Own().double().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.weight.uniform_(0.5, 2)
    return model, torch.randn(40, 4, 9, 9, dtype=torch.float64)


def names(plan: lrc.Plan) -> list[str]:
    return [entry.layer.name.removesuffix(".inner") for entry in plan]


def half(plan: lrc.Plan) -> lrc.Plan:
    """Factor every layer."""
    for entry in plan:
        plan = plan.edit(entry.layer.name, scheme=0, groups=1, rank=2)
    return plan


@pytest.mark.parametrize("data", ["none", "statistics", "batches"])
def test_all_is_as_with_ordinary_layers(data):
    own, x = settled()
    found = []
    for model in (own, Plain(own).double().eval()):
        statistics = lrc.collect(model, [x[:20], x[20:]])
        plan = lrc.plan(model, BUDGET, lrc.activation_aware(), example_inputs=x, statistics=statistics)
        fit = {"none": {}, "statistics": {"statistics": statistics}, "batches": {"batches": [x]}}[data]
        found.append((model, statistics, plan, lrc.apply(model, half(plan), **fit)))
    (own, mine, plan, small), (plain, theirs, expected, reference) = found
    assert names(plan) == names(expected) == ["a", "b", "fc"]
    assert [e.choice.config for e in plan] == [e.choice.config for e in expected]
    assert [e.layer.calls for e in plan] == [e.layer.calls for e in expected]
    assert (plan.params, plan.macs) == (expected.params, expected.macs)
    for name, known in theirs.layers.items():
        same = mine.layers[name + ".inner"]
        torch.testing.assert_close(same.autocorrelation, known.autocorrelation)
        assert same.share == pytest.approx(known.share)
    assert theirs.layers["b"].share != 1
    torch.testing.assert_close(small(x), reference(x))
    checks = [lrc.verify(before, after, x) for before, after in ((own, small), (plain, reference))]
    assert checks[0].macs_after == checks[1].macs_after < checks[0].macs_before
    assert checks[0].output_error == pytest.approx(checks[1].output_error)
    for a, b in zip(checks[0].layers, checks[1].layers, strict=True):
        assert a.output_error == pytest.approx(b.output_error)


def compressed() -> tuple[nn.Module, nn.Module, lrc.Plan, torch.Tensor]:
    model, x = settled()
    plan = half(lrc.plan(model, BUDGET, lrc.svd(), example_inputs=x))
    return model, lrc.apply(model, plan), plan, x


def test_the_module_stays_what_it_was():
    model, small, _, x = compressed()
    assert isinstance(small.b, Static)
    assert isinstance(small.b.inner, lrc.nn.LowRankConv2d)
    assert small.b.weight.shape == model.b.weight.shape
    assert isinstance(small.b.pad, nn.ZeroPad2d)
    assert small.a(x[:, :, :8, :5]).shape == (40, 8, 4, 3)  # other sizes are padded otherwise
    assert set(model.state_dict()) == set(Own().state_dict())
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert isinstance(again.b, Static)
        torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


def test_saved_merged_unfused_folded_and_tuned_it_is_the_same_function(tmp_path):
    model, small, plan, x = compressed()
    lrc.save(small, plan, tmp_path, folding=lrc.foldable(small, x))
    forms = [lrc.load(tmp_path, model), lrc.load(tmp_path, model, folded=False), lrc.fold(small, x)]
    forms += [lrc.merge(small), lrc.unfuse(small), lrc.tune(small, x, seconds=0.1)[0]]
    forms += [lrc.merge(forms[2]), lrc.unfuse(forms[2])]
    for form in forms:
        torch.testing.assert_close(form(x), small(x), rtol=1e-10, atol=1e-10)
    assert isinstance(forms[2].norm, nn.Identity)  # into a layer that had no bias
    assert type(forms[3].a.inner) is nn.Conv2d


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["factored", "folded", "unfused"])
def test_graphs_run_the_factors(form):
    _, small, _, x = compressed()
    small = {"factored": lambda m: m, "folded": lambda m: lrc.fold(m, x), "unfused": lrc.unfuse}[form](small)
    exported = torch.export.export(small, (x,))
    assert exported.graph_module.code.count("conv2d.default") == 4
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    traced = torch.jit.trace(small, (x,))
    assert str(traced.inlined_graph).count("aten::_convolution") == 4
    for made in (exported.module(), compiled, traced):
        torch.testing.assert_close(made(x), small(x))


def test_gradients_reach_the_factors():
    _, small, _, x = compressed()
    small(x).square().sum().backward()
    assert all(part.inner.U.grad.abs().sum() > 0 for part in (small.a, small.b, small.fc))


@pytest.mark.parametrize(
    ("module", "shape"), [(Padding(6, 6, 3, padding=1), (2, 6, 5, 5)), (Causal(6, 6, 3), (2, 6, 7))]
)
def test_other_kinds_and_paddings_of_torch(module, shape):
    model, x = nn.Sequential(module).double(), torch.randn(shape, dtype=torch.float64)
    plan = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd(), example_inputs=x)
    (entry,) = plan
    full = plan.edit("0.inner", scheme=0, groups=1, rank=6)
    torch.testing.assert_close(lrc.apply(model, full)(x), model(x))
    assert entry.layer.kind == type(module).__mro__[1].__name__


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight, self.bias), self.weight, self.bias)


class Also(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.weight.sum()


class Transposing(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.T, self.bias)


class Striding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 2)


class Other(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, 2 * self.bias)


class Cast(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(torch.float64).float(), self.bias)


class Parent(nn.Linear):
    def forward(self, x):
        return x.clone()


LEFT = {
    Standardised(4, 4, 3): "its forward reads its weight in mean",
    Twice(4, 4): "its forward uses its weight 2 times",
    Also(4, 4): "its forward reads its weight in sum",
    Transposing(4, 4): "its forward reads its weight in T",
    Striding(4, 4, 3): "its forward gives conv2d another geometry than it declares",
    Other(4, 4): "its forward gives linear another bias than its own",
    Cast(4, 4): "its forward reads its weight in to",
    Parent(4, 4): "its forward does not call F.linear or a convolution with its weight",
}


@pytest.mark.parametrize("module", LEFT, ids=lambda module: type(module).__name__)
def test_what_uses_its_weight_otherwise_is_left_alone_with_the_reason(module):
    x = torch.randn(2, 4, 4, 4)
    model = nn.Sequential(module, nn.Linear(2 if "Conv" in type(module).__mro__[1].__name__ else 4, 4))
    if isinstance(module, Striding):
        model[1] = nn.Linear(1, 4)
    (left,) = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd(), example_inputs=x).left_alone
    assert left.name == "0"
    assert left.reason.startswith(LEFT[module])
    assert list(lrc.collect(model, [x]).layers) == ["1"]


class Gained(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(sizes[1], 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias) * self.gain.mean()


def test_another_weight_is_named():
    model, x = nn.Sequential(Gained(4, 4, 3)), torch.randn(2, 4, 4, 4)
    (left,) = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd(), example_inputs=x).left_alone
    assert left.reason == "it has another weight, gain"


def test_a_model_that_is_such_a_module_itself(tmp_path):
    model, x = Dynamic(4, 8, 3), torch.randn(2, 4, 5, 5)
    plan = half(lrc.plan(model, lrc.Budget(params=1.0), lrc.svd(), example_inputs=x))
    small = lrc.apply(model, plan, batches=[x])
    lrc.save(small, plan, tmp_path)
    torch.testing.assert_close(lrc.load(tmp_path, model)(x), small(x), rtol=0, atol=0)
    assert [check.name for check in lrc.verify(model, small, x).layers] == ["inner"]


class Once:
    """Batches that can be read once, in their order."""

    def __init__(self, batches):
        self.generator = (batch() for batch in batches)

    def __iter__(self):
        return self.generator


def test_the_batch_that_shows_the_forward_counts_too():
    model, x = settled()
    for wanted in (1, 2):
        assert lrc.collect(model, Once([lambda: x] * wanted)).batches == wanted
    batches = [x[:20], x[20:]]
    passes = lrc.collect(model, batches, memory=1)  # a pass a layer
    torch.testing.assert_close(
        passes.layers["fc.inner"].autocorrelation,
        lrc.collect(model, iter(batches)).layers["fc.inner"].autocorrelation,
    )
    with pytest.raises(lrc.CollectionInterrupted, match="batch 0: invalid literal"):
        lrc.collect(model, Once([lambda: int("?")]))
    with pytest.raises(lrc.CollectionInterrupted, match=r"batch 0: .* 3 channels"):
        lrc.collect(model, [x[:, :3]])
    with pytest.raises(lrc.CompressionError, match="at least one batch"):
        lrc.collect(model, [])


def test_without_inputs_the_reason_says_that_they_would_help():
    model, x = settled()
    left = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd()).left_alone
    assert [item.name for item in left] == ["a", "b", "fc"]
    assert all("example_inputs would show" in item.reason for item in left)
    statistics = lrc.collect(model, iter([x]))  # whose batches showed it
    assert names(lrc.plan(model, BUDGET, statistics=statistics)) == ["a", "b", "fc"]
    assert statistics.batches == 1


def test_ignored_by_the_name_of_the_module():
    model, x = settled()
    statistics = lrc.collect(model, [x])
    for known in ({}, {"statistics": statistics}):
        plan = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd(), example_inputs=x, ignore="a", **known)
        assert names(plan) == ["b", "fc"]
        assert "ignored by name" in [item.reason for item in plan.left_alone]


def test_another_way_after_folding_is_refused():
    class Late(Padding):
        def forward(self, x, bias=True):
            return F.conv2d(x, self.weight, self.bias if bias else None, padding=1)

    model, x = nn.Sequential(Late(6, 6, 3, padding=1), nn.ReLU()).eval(), torch.randn(2, 6, 5, 5)
    plan = half(lrc.plan(model, lrc.Budget(params=1.0), lrc.svd(), example_inputs=x))
    small = lrc.apply(model, plan)
    torch.testing.assert_close(small[0](x, False), small[0](x) - small[0].bias.view(-1, 1, 1))
    small[0].inner.activation = "relu"
    with pytest.raises(lrc.WeightError, match="Late runs its weight in another way"):
        small[0](x, False)
