"""Layers with transposed weights, as transformers' Conv1D: y = x W + b, W [in, out]."""

import pytest
import torch
from torch import nn

import lrcompress as lrc


class Conv1D(nn.Module):
    """The layer of GPT-2, in its attributes and formula."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


@pytest.fixture
def model():
    return nn.Sequential(Conv1D(24, 8), nn.GELU(), Conv1D(8, 24), nn.Linear(8, 4)).eval()


@pytest.fixture
def batches():
    return [torch.randn(16, 5, 8) for _ in range(4)]


def test_the_whole_way_round(model, batches, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8), nn.Linear(8, 4)).eval()
    plain.load_state_dict({n: v.T if n in ("0.weight", "2.weight") else v for n, v in before.items()})
    made = []
    for network in (model, plain):
        statistics = lrc.collect(network, batches)
        recipe = lrc.activation_aware(groups=(1,))
        plan = lrc.plan(network, lrc.Budget(params=0.7), recipe, statistics=statistics)
        made.append((plan, lrc.apply(network, plan, statistics=statistics, batches=batches)))
    (plan, small), (same, expected) = made
    assert plan.params_after <= 0.7 * plan.params
    assert [entry.choice.config for entry in plan] == [entry.choice.config for entry in same]
    assert any(entry.choice.config for entry in plan)
    torch.testing.assert_close(small(batches[0]), expected(batches[0]))
    assert lrc.verify(model, small, batches[0]).output_error < 0.6
    lrc.save(small, plan, tmp_path / "out")
    torch.testing.assert_close(lrc.load(tmp_path / "out", model)(batches[0]), small(batches[0]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_planned_is_the_same_function(model, batches):
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=1.0)).keep_dense("0").keep_dense("2"))
    assert isinstance(small[0], nn.Linear)
    assert small[0].bias is not model[0].bias
    torch.testing.assert_close(small(batches[0]), model(batches[0]))


def test_what_cannot_be_taken_for_linear_is_left_alone(model):
    model[0].register_forward_hook(lambda *_: None)
    model[2].nf = 9
    plan = lrc.plan(model, lrc.Budget(params=1.0))
    reasons = {left.name: left.reason for left in plan.left_alone}
    assert reasons == dict.fromkeys(("0", "2"), "no factorisation of Conv1D")


def test_tied_weights_stay_tied(model):
    model.append(Conv1D(24, 8))
    model[4].weight = model[0].weight
    plan = lrc.plan(model, lrc.Budget(params=0.9))
    assert {left.name for left in plan.left_alone} == {"0", "4"}
    small = lrc.apply(model, plan)
    assert small[4].weight is small[0].weight
