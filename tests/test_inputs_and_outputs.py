"""Inputs and outputs of every form that models take and give."""

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompress as lrc
from lrcompress import calibrate

Pair = namedtuple("Pair", ["logits", "label"])


@dataclass
class Output:
    logits: Tensor
    note: str = "text"


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Net(nn.Module):
    def __init__(self, wrap=lambda y: y) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.wrap = wrap

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> object:
        y = self.b(torch.relu(self.a(x)))
        y = y if mask is None else y.masked_fill(mask[:, None], -torch.inf)
        return self.wrap(y if scale is None else y * scale)


X = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
BUDGET = lrc.Budget(params=0.5)
PROTOTYPE = "ignore:The PyTorch API of nested tensors is in prototype stage"


def relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).detach().double().norm() / old.detach().double().norm())


@pytest.mark.parametrize(
    "wrap",
    [
        Output,
        Slotted,
        lambda y: SimpleNamespace(inner=SimpleNamespace(logits=y)),
        lambda y: UserDict(logits=y),
        lambda y: MappingProxyType({"logits": [y, None, "text", 3]}),
        lambda y: Pair(y, y.argmax(1)),
        lambda y: [{"deep": (Output(y),)}],
        lambda y: y.detach().numpy(),
        lambda y: torch.view_as_complex(y.unflatten(1, (2, 2)).contiguous()),
        lambda y: torch.nested.as_nested_tensor([y[:4], y[4:]]),
        lambda y: y.to_sparse(),
    ],
)
@pytest.mark.filterwarnings(PROTOTYPE)
def test_outputs_of_any_form_are_compared(wrap):
    model = Net(wrap).eval()
    small = lrc.apply(model, lrc.plan(model, BUDGET, example_inputs=X))
    bare, other = copy.copy(model), copy.copy(small)
    bare.wrap = other.wrap = lambda y: y
    expected = relative(other(X), bare(X))
    assert expected > 0.01
    assert lrc.verify(model, small, X).output_error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y.argmax(1), lambda y: None, lambda y: "text", lambda y: y * torch.nan, lambda y: y[:0]],
)
def test_a_comparison_that_compared_nothing_is_an_error(wrap):
    model = Net(wrap).eval()
    small = lrc.apply(model, lrc.plan(model, BUDGET))
    with pytest.raises(lrc.PlanError, match="no finite floating number to compare"):
        lrc.verify(model, small, X)


def test_what_is_infinite_in_both_makes_no_difference():
    model, mask = Net().eval(), torch.arange(20) > 17
    small = lrc.apply(model, lrc.plan(model, BUDGET))
    found = lrc.verify(model, small, (X, mask))
    assert found.output_error == pytest.approx(relative(small(X[:18]), model(X[:18])), rel=1e-5)


def test_an_infinity_that_is_new_is_no_small_error():
    model = Net().eval()
    small = lrc.apply(model, lrc.plan(model, BUDGET))
    with torch.no_grad():
        small.b.bias[0] = torch.inf
    assert lrc.verify(model, small, X).output_error == torch.inf


def test_outputs_that_go_missing_are_named():
    model, other = Net(Output).eval(), Net(lambda y: Output(y[:, :2])).eval()
    with pytest.raises(
        lrc.PlanError, match=r"output '\.logits' must keep its shape \(20, 4\), got \(20, 2\)"
    ):
        lrc.verify(model, other, X)


@pytest.mark.parametrize(
    "inputs",
    [
        X,
        (X,),
        [X],
        {"x": X},
        UserDict(x=X),
        MappingProxyType({"x": X, "scale": torch.tensor(2.0)}),
        Pair(X, torch.zeros(20, dtype=torch.bool)),
        {"x": X, "mask": torch.arange(20) > 17},
    ],
)
def test_inputs_of_any_form_serve_every_step(inputs):
    model = Net().eval()
    statistics = lrc.collect(model, [inputs])
    plan = lrc.plan(model, BUDGET, lrc.activation_aware(), example_inputs=inputs, statistics=statistics)
    small = lrc.apply(model, plan, batches=[inputs])
    found = lrc.verify(model, small, inputs)
    assert found.samples == 20
    assert 0 < found.output_error < 1
    assert plan.macs == 8 * 16 + 16 * 4


@pytest.mark.filterwarnings(PROTOTYPE)
@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_masks_of_transformers_serve_every_step(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    inputs = {"src": torch.randn(3, 5, 16), "src_key_padding_mask": mask}
    statistics = lrc.collect(model, [inputs])
    assert statistics.unreached == ()
    plan = lrc.plan(model, lrc.Budget(params=0.8), lrc.svd(), example_inputs=inputs)
    small = lrc.apply(model, plan, batches=[inputs])
    found = lrc.verify(model, small, inputs)
    assert 0 < found.output_error < 1
    assert not any(np.isnan(check.output_error) for check in found.layers)
    lrc.tune(small, inputs, seconds=0.1)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings(PROTOTYPE)
def test_nested_tensors_count_as_their_rows():
    parts = [torch.randn(2, 8), torch.randn(5, 8)]
    model = nn.Sequential(nn.Linear(8, 4))
    whole = lrc.collect(model, [torch.cat(parts)]).layers["0"]
    nested = lrc.collect(model, [torch.nested.as_nested_tensor(parts)]).layers["0"]
    assert nested.samples == whole.samples == 7
    assert torch.equal(nested.autocorrelation, whole.autocorrelation)


class Positions(nn.Module):
    """Passes a view of a parameter to a layer, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Parameter(torch.randn(9, 16)), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(x + self.a(self.table[: x.shape[1]])))


def test_views_of_parameters_may_be_inputs_of_layers():
    model, x = Positions(), torch.randn(3, 5, 16)
    macs = 5 * 16 * 16 + 3 * 5 * 16 * 4
    assert calibrate.count_macs(model, x) == round(macs / 3)
    assert lrc.plan(model, lrc.Budget(params=0.8), example_inputs=x).macs == round(macs / 3)
