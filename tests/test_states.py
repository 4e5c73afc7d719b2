"""What modules hold beside parameters and buffers of the constructor: extra state, buffers made later, code
of torch.jit."""

import copy
import io
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompress as lrc
from lrcompress.codec.states import State

BUDGET = lrc.Budget(params=0.6)


class Stateful(nn.Module):
    """Scales by what its extra state says."""

    def __init__(self, state: Any = None) -> None:
        super().__init__()
        self.a, self.state = nn.Linear(16, 16), state

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def round_trip(model: nn.Module, fresh: nn.Module, folder: Path, inputs: Tensor | None = None) -> nn.Module:
    """Compress and save a model, load it into another instance; return that."""
    plan = lrc.plan(model, BUDGET)
    small = lrc.apply(model, plan)
    if inputs is not None:
        small(inputs)
    lrc.save(small, plan, folder)
    loaded = lrc.load(folder, fresh)
    assert loaded.state_dict().keys() == small.state_dict().keys()
    return loaded


@pytest.mark.parametrize(
    "state",
    [
        None,
        3.0,
        "text ü",
        -(2**80),
        [1, [True, None]],
        (1, (2.5, "a"), []),
        {"scale": 3.0, 4: {"x": (1,)}, None: float("-inf")},
        OrderedDict(a=1, b=[2]),
        {"dict": [["a", 1]], "tensor": "a.U"},
        {},
        {float("inf"): 1},
    ],
    ids=str,
)
def test_plain_extra_state_comes_back(tmp_path, state):
    loaded = round_trip(nn.Sequential(Stateful(state)), nn.Sequential(Stateful()), tmp_path)
    assert loaded[0].state == state
    assert type(loaded[0].state) in (type(state), dict)


def test_tensors_in_extra_state_come_back(tmp_path):
    model = Stateful()
    own, shared = torch.randn(3, 2, dtype=torch.float64), model.a.bias
    model.state = {"moments": [own, (torch.arange(2), 0.5)], "bias": shared, "all": own}
    state = round_trip(model, Stateful(torch.zeros(7)), tmp_path).state
    assert torch.equal(state["moments"][0], own)
    assert torch.equal(state["moments"][1][0], torch.arange(2))
    assert state["moments"][1][1] == 0.5
    assert torch.equal(state["bias"], shared)
    assert torch.equal(state["all"], own)


def test_a_tensor_may_be_the_extra_state(tmp_path):
    assert torch.equal(round_trip(Stateful(torch.ones(5)), Stateful(), tmp_path).state, torch.ones(5))


@pytest.mark.parametrize("state", [object(), {"a": [io.BytesIO()]}, {(1, 2): 3}, "\ud800", {1, 2}], ids=repr)
def test_other_extra_state_is_refused_by_the_modules_name(tmp_path, state):
    model = nn.Sequential(nn.Identity(), Stateful(state))
    plan = lrc.plan(model, BUDGET)
    with pytest.raises(lrc.PlanError, match="module '1': its extra state"):
        lrc.save(lrc.apply(model, plan), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extra_state_that_holds_itself_is_refused(tmp_path):
    model = Stateful([])
    model.state.append(model.state)
    plan = lrc.plan(model, BUDGET)
    with pytest.raises(lrc.PlanError, match=r"module ''.*at most 16 deep"):
        lrc.save(lrc.apply(model, plan), plan, tmp_path)


def test_extra_state_that_nobody_takes_is_refused(tmp_path):
    round_trip(nn.Sequential(Stateful(1)), nn.Sequential(Stateful()), tmp_path)
    plain = nn.Sequential(nn.Sequential(OrderedDict(a=nn.Linear(16, 16))))
    with pytest.raises(lrc.FormatError, match="module '0' has an extra state on one side only"):
        lrc.load(tmp_path, plain)


def test_a_module_that_refuses_its_state_is_named(tmp_path):
    class Picky(Stateful):
        def set_extra_state(self, state: Any) -> None:
            self.state = state["scale"]

    with pytest.raises(lrc.FormatError, match=r"module '0' does not take its stored extra state: .TypeError"):
        round_trip(nn.Sequential(Stateful(1)), nn.Sequential(Picky()), tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        *({}, {"a": 1}, {"tensor": 1}, {"tuple": 1}, {"dict": [[1]]}, {"dict": [[[], 1]]}, {"float": "1"}),
        *(
            {"tensor": "x", "tuple": []},
            [{"float": [1]}],
            {"dict": [["a", {}]]},
            {"dict": [[{"float": 1}, 1]]},
        ),
    ],
    ids=json.dumps,
)
def test_a_state_that_was_never_written_is_refused(value):
    with pytest.raises(lrc.PlanError, match="extra state"):
        State.from_plain({"module": "a", "value": value})


class MakesLater(nn.Module):
    """Registers a buffer in its first forward."""

    def __init__(self, persistent: bool, declared: bool) -> None:
        super().__init__()
        self.a, self.persistent = nn.Linear(16, 16), persistent
        if declared:
            self.register_buffer("positions", None, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "positions", None) is None:
            self.register_buffer("positions", x[0].detach().clone(), persistent=self.persistent)
        return self.a(x + self.positions)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_of_the_first_forward_comes_back(tmp_path, persistent, declared, device):
    model, x = nn.Sequential(MakesLater(persistent, declared)), torch.randn(3, 16)
    plan = lrc.plan(model, BUDGET, example_inputs=x)
    small = lrc.apply(model, plan)
    expected = small(x)
    lrc.save(small, plan, tmp_path)
    loaded = lrc.load(tmp_path, nn.Sequential(MakesLater(persistent, declared)).to(device))
    assert torch.equal(loaded[0].positions, x[0])
    assert ("0.positions" in loaded.state_dict()) == persistent
    assert torch.equal(loaded(x), expected)


def test_a_buffer_that_no_method_makes_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Identity())
    model[1].register_buffer("mask", torch.ones(3), persistent=False)
    plan = lrc.plan(model, BUDGET)
    lrc.save(lrc.apply(model, plan), plan, tmp_path)
    with pytest.raises(lrc.FormatError, match=r"'1\.mask' is on one side only"):
        lrc.load(tmp_path, nn.Sequential(nn.Linear(16, 16), nn.Identity()))


def compiled(how: str) -> nn.Module:
    """Return a network with a part that torch.jit compiled."""
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU()).eval()
    part[1].running_mean.normal_()
    part = torch.jit.script(part) if how == "script" else torch.jit.trace(part, torch.randn(2, 16))
    return nn.Sequential(part, nn.Linear(24, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16))).eval()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("data", ["none", "batches", "statistics"])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_what_torch_jit_compiled_is_left_alone_as_a_whole(tmp_path, how, data):
    model, x = compiled(how), torch.randn(64, 16)
    statistics = lrc.collect(model, [x])
    plan = lrc.plan(model, lrc.Budget(params=0.8), lrc.svd(), example_inputs=x, statistics=statistics)
    (left,) = plan.left_alone
    assert (left.name, left.params) == ("0", 16 * 24 + 24 + 48)
    assert "torch.jit" in left.reason
    given = {"none": {}, "batches": {"batches": [x]}, "statistics": {"statistics": statistics}}[data]
    small = lrc.apply(model, plan, **given)
    assert lrc.verify(model, small, x).params_after <= 0.8 * sum(p.numel() for p in model.parameters())
    lrc.save(small, plan, tmp_path)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.zero_()
    loaded = lrc.load(tmp_path, fresh)
    assert torch.equal(loaded(x), small(x))
    assert all(not tensor.any() for tensor in fresh.parameters())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in small.parameters()]
    assert torch.equal(lrc.fold(small, x)(x), small(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_neurons_go_around_what_torch_jit_compiled():
    model, x = compiled("script"), torch.randn(256, 16)
    small, plan = lrc.compress(model, lrc.Budget(params=0.85), lrc.lnr(), batches=[x])
    assert plan.removals
    assert small(x).shape == model(x).shape
    assert sum(p.numel() for p in small.parameters()) <= 0.85 * sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_network_that_torch_jit_compiled_has_nothing_to_plan():
    model, x = torch.jit.script(nn.Sequential(nn.Linear(16, 16)).eval()), torch.randn(4, 16)
    assert not lrc.plan(model, lrc.Budget(params=1.0), example_inputs=x).layers
    with pytest.raises(lrc.BudgetError):
        lrc.plan(model, BUDGET)
    with pytest.raises(lrc.PlanError, match=r"torch\.jit"):
        lrc.plan(model, BUDGET, lrc.lnr(), example_inputs=x)


class Keeping(nn.Module):
    """Keeps parameters and a buffer where no state dict looks."""

    def __init__(self) -> None:
        super().__init__()
        self.factored, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.register_buffer("shift", torch.randn(16))
        self.kept = [self.norm.weight, self.shift]
        self.scaled = lambda x, weight=self.norm.bias: x + weight

    def forward(self, x):
        return self.scaled(self.norm(self.factored(x)) * self.kept[0] + self.kept[1])


def test_what_is_also_kept_elsewhere_gets_the_stored_values(tmp_path):
    torch.manual_seed(0)
    model, x = Keeping().eval(), torch.randn(4, 16)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    plan = lrc.plan(model, lrc.Budget(params=0.7), example_inputs=x)
    small = lrc.apply(model, plan, example_inputs=x)
    lrc.save(small, plan, tmp_path)
    with torch.device("meta"):
        hollow = Keeping().eval()
    for skeleton in (Keeping().eval(), hollow):
        loaded = lrc.load(tmp_path, skeleton)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), small(x))
