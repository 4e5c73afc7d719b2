"""What planning finds in a model, and what applying a plan leaves as it was."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lrcompress as lrc
from lrcompress import calibrate, rewrite

WHOLE = lrc.Budget(params=1.0)


def with_hook(register: str) -> nn.Linear:
    layer = nn.Linear(8, 8)
    getattr(layer, register)(lambda *_: None)
    return layer


def replaced_forward() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def pruned() -> nn.Linear:
    with torch.no_grad():  # else deepcopy refuses the masked weight
        return prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


class Doubling(nn.Linear):
    """A Linear that is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def of_type(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
    return layer


# (module, what the reason says)
LEFT_ALONE = [
    (nn.ConvTranspose1d(8, 8, 3), "no factorisation of ConvTranspose1d"),
    (nn.ConvTranspose2d(8, 8, 3), "no factorisation of ConvTranspose2d"),
    (nn.Embedding(8, 8), "no factorisation of Embedding"),
    (nn.EmbeddingBag(8, 8), "no factorisation of EmbeddingBag"),
    (nn.MultiheadAttention(8, 2), "no factorisation of MultiheadAttention"),
    (nn.MultiheadAttention(8, 2, kdim=4, vdim=2), "no factorisation of MultiheadAttention"),
    (nn.LSTM(8, 8, num_layers=2), "no factorisation of LSTM"),
    (nn.GRU(8, 8), "no factorisation of GRU"),
    (nn.Bilinear(8, 8, 8), "no factorisation of Bilinear"),
    (Doubling(8, 8), "subclass of Linear"),
    (parametrizations.weight_norm(nn.Linear(8, 8)), "no factorisation of ParametrizationList"),
    (parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), "no factorisation of ParametrizationList"),
    (pruned(), "computed from other parameters"),
    (with_hook("register_forward_hook"), "hooks"),
    (with_hook("register_forward_pre_hook"), "hooks"),
    (with_hook("register_full_backward_hook"), "hooks"),
    (with_hook("register_full_backward_pre_hook"), "hooks"),
    (replaced_forward(), "forward was replaced"),
    (of_type(torch.float8_e4m3fn), "float8_e4m3fn"),
    (of_type(torch.complex64), "complex64"),
    (of_type(torch.int8), "int8"),
    (lrc.nn.LowRankLinear(8, 8, 2), "already factored"),
    (lrc.nn.LowRankConv2d(8, 8, 3, 2, scheme=1), "already factored"),
]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_same_tensors(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        other = two[name]
        assert (tensor.dtype, tensor.shape, tensor.requires_grad) == (
            other.dtype,
            other.shape,
            other.requires_grad,
        )
        assert (
            torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)) if tensor.ndim else tensor == other
        )


def addresses(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors(model).values()}


@pytest.mark.parametrize(("module", "reason"), LEFT_ALONE, ids=lambda v: str(v).split("(")[0][:40])
def test_every_other_weight_is_listed_with_the_reason_and_kept(module, reason):
    model = nn.ModuleDict({"kept": copy.deepcopy(module), "layer": nn.Linear(8, 8)})
    plan = lrc.plan(model, WHOLE)
    listed = [item for item in plan.left_alone if item.name.split(".")[0] == "kept"]
    assert listed
    assert all(reason in item.reason for item in listed)
    assert sum(item.params for item in listed) <= sum(p.numel() for p in module.parameters())
    assert [entry.layer.name for entry in plan] == ["layer"]
    small = lrc.apply(model, plan.edit("layer", rank=1))
    assert isinstance(small["layer"], lrc.nn.LowRankLinear)
    assert type(small["kept"]).__name__ == type(module).__name__
    assert_same_tensors(tensors(module), tensors(small["kept"]))
    assert addresses(model).isdisjoint(addresses(small))


def test_left_alone_counts_only_what_is_its_own():
    model = nn.Sequential(nn.Linear(8, 8))
    model.positions = nn.Parameter(torch.zeros(3, 4))
    (item,) = lrc.plan(model, WHOLE).left_alone
    assert (item.name, item.kind, item.params) == ("", "Sequential", 12)


def test_an_attention_is_one_entry_with_all_its_parameters():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    plan = lrc.plan(model, WHOLE)
    assert [(item.name, item.params) for item in plan.left_alone] == [("0", plan.params)]


class Tied(nn.Module):
    """A head that shares its weight with the embedding, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 9)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)))


def test_tied_weights_are_left_alone_and_stay_tied():
    model = Tied()
    plan = lrc.plan(model, lrc.Budget(params=0.8), example_inputs=torch.tensor([[1, 2]]))
    assert {item.name for item in plan.left_alone if "tied" in item.reason} == {"embedding", "head"}
    small = lrc.apply(model, plan)
    assert small.head.weight is small.embedding.weight
    assert torch.equal(small.head.weight, model.head.weight)
    assert plan.params == sum(p.numel() for p in model.parameters())


class Reads(nn.Module):
    """A parent that uses one layer's weight itself, and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.read.weight)


def test_a_layer_whose_forward_never_ran_is_left_alone():
    model, x = Reads(), torch.randn(2, 8)
    small, plan = lrc.compress(model, lrc.Budget(params=0.9), example_inputs=x)
    (item,) = plan.left_alone
    assert (item.name, item.kind, item.params) == ("read", "Linear", 72)
    assert "did not run" in item.reason
    assert torch.equal(small.read.weight, model.read.weight)
    assert small(x).shape == (2, 8)


def test_a_transformer_still_runs():
    """Its layers' fused path reads the weights of their Linear children."""
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 3, 16)
    small, plan = lrc.compress(model, lrc.Budget(params=0.95), example_inputs=x)
    assert any(entry.choice.config for entry in plan) or plan.left_alone
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert small(x).shape == x.shape
    assert lrc.verify(model, small, x).output_error < 1


class ByKeyword(nn.Module):
    """A parent that names its layer's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=self.layer(input=x).mT)


def test_a_layer_may_be_called_by_keyword():
    model, x = ByKeyword(), torch.randn(2, 5, 8)
    small, plan = lrc.compress(model, lrc.Budget(params=0.6), example_inputs=x)
    assert plan["layer"].layer.macs == 5 * 64
    assert lrc.verify(model, small, x).params_after == plan.params_after


class Shared(nn.Module):
    """One layer under two names, and one called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.parts = nn.ModuleList([self.first, nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts[0](self.first(x))
        for _ in range(3):
            x = self.parts[1](x)
        return x


def test_a_shared_layer_is_replaced_under_all_its_names():
    model, x = Shared(), torch.randn(2, 8)
    plan = lrc.plan(model, lrc.Budget(params=0.9), example_inputs=x)
    assert [entry.layer.name for entry in plan] == ["first", "parts.1"]
    assert [len(entry.layer.calls) for entry in plan] == [2, 3]
    assert [entry.layer.macs for entry in plan] == [2 * 64, 3 * 64]
    assert plan.macs == calibrate.count_macs(model, x) == 5 * 64
    plan = plan.edit("first", rank=2).edit("parts.1", rank=3)
    small = lrc.apply(model, plan)
    assert isinstance(small.first, lrc.nn.LowRankLinear)
    assert small.first is small.parts[0]
    assert plan.macs_after == calibrate.count_macs(small, x)
    assert plan.params_after == sum(p.numel() for p in small.parameters())


def test_one_layer_is_a_model():
    for model, x in ((nn.Linear(12, 12), (2, 12)), (nn.Conv2d(8, 8, 3), (2, 8, 4, 4))):
        before = copy.deepcopy(model)
        small, plan = lrc.compress(model, lrc.Budget(params=0.7), example_inputs=torch.randn(x))
        assert rewrite.is_factored(small)
        assert [entry.layer.name for entry in plan] == [""]
        assert sum(p.numel() for p in small.parameters()) == plan.params_after
        assert_same_tensors(tensors(before), tensors(model))


CONTAINERS = st.recursive(
    st.sampled_from([(4, 6), (6, 6), (8, 3)]).map(lambda size: nn.Linear(*size)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(nn.ModuleList),
        st.dictionaries(st.text("a[]*? /\"'ü", min_size=1, max_size=3), inner, min_size=1, max_size=3).map(
            nn.ModuleDict
        ),
    ),
    max_leaves=6,
)


@given(CONTAINERS)
@settings(max_examples=30)
def test_containers_and_odd_names_are_rebuilt(model):
    before = copy.deepcopy(model)
    plan = lrc.plan(model, WHOLE)
    for entry in plan:
        plan = plan.edit(entry.layer.name, rank=1)
    small = lrc.apply(model, plan)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [name for name, module in small.named_modules() if rewrite.is_factored(module)] == names
    assert not any(isinstance(module, nn.Linear) for module in small.modules())
    assert_same_tensors(tensors(before), tensors(model))
    assert addresses(model).isdisjoint(addresses(small))


def test_applying_leaves_the_old_model_bit_for_bit():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 6)).eval()
    model[3].weight.requires_grad_(False)
    model.extra = {"list": [1, 2]}
    before, order = copy.deepcopy(model), list(model.modules())
    small, _ = lrc.compress(model, lrc.Budget(params=0.5), example_inputs=torch.randn(2, 4, 6, 6))
    assert list(model.modules()) == order
    assert_same_tensors(tensors(before), tensors(model))
    assert addresses(model).isdisjoint(addresses(small))
    small.extra["list"].append(3)
    assert model.extra == {"list": [1, 2]}
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert_same_tensors(tensors(before), tensors(model))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = lrc.plan(model, lrc.Budget(params=0.9)).edit("1", rank=1)
    model[1].weight.data[3, 4] = bad
    with pytest.raises(lrc.WeightError, match=r"layer '1'.*nan or infinity"):
        lrc.plan(model, WHOLE)
    with pytest.raises(lrc.WeightError, match=r"layer '1'.*nan or infinity"):
        lrc.apply(model, plan)
    small = lrc.apply(model, plan.keep_dense("1"))
    assert_same_tensors(tensors(model[1]), tensors(small[1]))
    assert lrc.plan(model, WHOLE, ignore=["1"]).left_alone[0].name == "1"


def test_a_weight_without_values_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(lrc.WeightError, match=r"layer '1'.*meta"):
        lrc.plan(model, WHOLE)
    plan = lrc.plan(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), WHOLE).edit("1", rank=2)
    with pytest.raises(lrc.WeightError, match=r"layer '1'.*meta"):
        lrc.apply(model, plan)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(8, 9), r"'body' must have weight \[8, 8\] in 1 groups as planned, got \[9, 8\]"),
        (nn.Conv1d(8, 8, 1), "'body' must be Linear as planned, got Conv1d"),
        (nn.ReLU(), "'body' must be Linear as planned, got ReLU"),
        (Doubling(8, 8), "'body' must be Linear as planned, got Doubling"),
        (lrc.nn.LowRankLinear(8, 8, 2), "'body' must be Linear as planned, got LowRankLinear"),
    ],
    ids=lambda v: str(v).split("(")[0],
)
def test_the_plan_of_another_model_is_refused(other, message):
    plan = lrc.plan(nn.ModuleDict({"body": nn.Linear(8, 8)}), WHOLE).edit("body", rank=1)
    for each in (plan, plan.keep_dense("body")):
        with pytest.raises(lrc.PlanError, match=message):
            lrc.apply(nn.ModuleDict({"body": other}), each)
    with pytest.raises(lrc.PlanError, match=r"'body'.*none of that name"):
        lrc.apply(nn.ModuleDict({"tail": nn.Linear(8, 8)}), plan)


def test_other_existing_groups_are_another_model():
    """Half the channels in one group, or all of them in two, give weights of one shape."""
    plan = lrc.plan(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), WHOLE).edit("0", rank=1)
    with pytest.raises(lrc.PlanError, match=r"in 2 groups as planned, got .* in 1 groups"):
        lrc.apply(nn.Sequential(nn.Conv2d(4, 8, 3)), plan)


@pytest.mark.parametrize(("conv_groups", "outs"), [(1, 8), (2, 8), (4, 16), (8, 8), (8, 32)])
def test_grouped_and_depthwise_convolutions_in_the_default_plan(conv_groups, outs):
    torch.manual_seed(conv_groups)
    model = nn.Sequential(nn.Conv2d(8, outs, 3, padding=1, groups=conv_groups))
    x = torch.randn(2, 8, 6, 6)
    entry = lrc.plan(model, WHOLE, example_inputs=x)["0"]
    for option in entry.curve[:-1]:
        config = option.config
        edited = lrc.plan(model, WHOLE, example_inputs=x).edit("0", groups=config.groups, rank=config.rank)
        small = lrc.apply(model, edited)
        assert calibrate.count_macs(small, x) == option.macs <= entry.layer.macs
        assert small[0].U.numel() + small[0].V.numel() == option.params < entry.layer.params
    assert (len(entry.curve) == 1) == (conv_groups == 8 and outs == 8)


def test_what_is_factored_is_not_factored_again():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    once = lrc.apply(model, lrc.plan(model, WHOLE).edit("0", rank=2))
    plan = lrc.plan(once, WHOLE)
    assert [(item.name, item.kind, item.reason) for item in plan.left_alone] == [
        ("0", "LowRankLinear", "already factored")
    ]
    twice = lrc.apply(once, plan.edit("1", rank=2))
    assert torch.equal(twice[0].U, once[0].U)
    assert isinstance(twice[1], lrc.nn.LowRankLinear)


def test_hidden_sizes_of_zero_are_left_alone():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 4))
    plan = lrc.plan(model, WHOLE)
    assert [(item.name, item.reason) for item in plan.left_alone] == [("0", "its weight is empty")]


@given(st.lists(st.integers(1, 10), min_size=2, max_size=4), st.data())
@settings(max_examples=30)
def test_every_weight_is_planned_or_left_alone(widths, data):
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    ignored = data.draw(st.sets(st.sampled_from([name for name, _ in model.named_children()])))
    plan = lrc.plan(model, WHOLE, ignore=sorted(ignored))
    assert {entry.layer.name for entry in plan} | {item.name for item in plan.left_alone} == {
        name for name, _ in model.named_children()
    }
    assert {item.name for item in plan.left_alone} == ignored
    biases = sum(b for _, b in itertools.pairwise(widths))
    kept = sum(item.params for item in plan.left_alone) - sum(
        model[int(name)].out_features for name in ignored
    )
    assert kept + sum(entry.layer.params for entry in plan) + biases == plan.params


def test_subclasses_that_keep_their_parents_forward_are_the_parent(tmp_path: Path) -> None:
    class Projection(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight, std=0.2)
            nn.init.zeros_(self.bias)

    class Square(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, padding=1)

    class Gained(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 32)
            self.gain = nn.Parameter(torch.ones(32))

    class Doubled(nn.Conv2d):
        def _conv_forward(self, *args: Any) -> torch.Tensor:
            return 2 * super()._conv_forward(*args)

    torch.manual_seed(0)
    model = nn.Sequential(Square(8), Doubled(8, 8, 3), Projection(6, 32), Gained()).eval()
    plan = lrc.plan(model, lrc.Budget(params=0.9), lrc.svd())
    assert [(entry.layer.name, entry.layer.kind) for entry in plan] == [("0", "Conv2d"), ("2", "Linear")]
    assert all("may compute otherwise" in item.reason for item in plan.left_alone)
    plan = lrc.Plan.from_json(plan.edit("2", rank=3).edit("0", rank=5).to_json())
    small = lrc.apply(model, plan)
    lrc.save(small, plan, tmp_path / "small")
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(lrc.load(tmp_path / "small", model)(x), small(x))
    torch.testing.assert_close(lrc.merge(small)(x), small(x))
