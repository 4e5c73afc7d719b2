"""Verification against the same numbers worked out by hand."""

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

import lrcompress as lrc
from lrcompress import calibrate

FIELDS = ["samples", "output_error", "max_difference", "agreement", "params_before", "params_after"]
FIELDS += ["macs_before", "macs_after", "layers"]


class Net(nn.Module):
    """Dropout and batch norm tell the modes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


class Wrapped(nn.Module):
    """A network with other inputs and outputs."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.net = Net()
        self.wrap = wrap

    def forward(self, x: Tensor, scale: Tensor) -> object:
        return self.wrap(self.net(x) * scale)


def inputs() -> Tensor:
    return torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(3))


def pair() -> tuple[Net, nn.Module]:
    model = Net()
    return model, lrc.compress(model, lrc.Budget(params=0.4), example_inputs=inputs())[0]


def relative(new: Tensor, old: Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


def run(model: nn.Module, *args: Tensor) -> object:
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        return twin(*args)


def test_identical_models_differ_by_nothing():
    model = Net()
    found = lrc.verify(model, copy.deepcopy(model), inputs())
    assert (found.output_error, found.max_difference, found.agreement) == (0.0, 0.0, 1.0)
    assert found.params_before == found.params_after == sum(p.numel() for p in model.parameters())
    assert found.macs_before == found.macs_after == calibrate.count_macs(model, inputs())
    assert found.layers == ()
    _, small = pair()
    again = lrc.verify(small, small, inputs())
    assert (again.output_error, again.layers) == (0.0, ())


def test_errors_are_those_worked_out_by_hand():
    model, small = pair()
    x = inputs()
    before, after = run(model, x), run(small, x)
    found = lrc.verify(model, small, x)
    assert found.samples == 5
    assert found.output_error == pytest.approx(relative(after, before), rel=1e-12)
    assert found.max_difference == float((after.double() - before.double()).abs().max())
    assert found.agreement == float((after.argmax(1) == before.argmax(1)).double().mean())
    assert found.params_after == sum(p.numel() for p in small.parameters()) < found.params_before
    assert found.macs_after == calibrate.count_macs(small, x) < found.macs_before
    assert found.output_error > 0


def test_each_layer_runs_on_the_inputs_of_the_original():
    model, small = pair()
    x, twin = inputs(), copy.deepcopy(model).eval()
    with torch.no_grad():
        features = twin.norm(twin.conv(x)).relu().flatten(1)
        expected = {
            "conv": relative(small.conv(x), twin.conv(x)),
            "head": relative(small.head(features), twin.head(features)),
        }
    checks = lrc.verify(model, small, x).layers
    assert {check.name: check.output_error for check in checks} == pytest.approx(expected, rel=1e-9)
    for check in checks:
        old, new = model.get_submodule(check.name), small.get_submodule(check.name)
        assert check.kind == type(old).__name__
        assert (check.params_before, check.params_after) == tuple(
            sum(p.numel() for p in each.parameters()) for each in (old, new)
        )


def test_calls_of_one_layer_are_taken_together():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(100 * self.layer(x))

    model, x = Twice(), torch.randn(3, 8)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=1.0)).edit("layer", rank=3))
    (check,) = lrc.verify(model, small, x).layers
    with torch.no_grad():
        first = model.layer(x)
        both = torch.cat([x, 100 * first])
        assert check.output_error == pytest.approx(relative(small.layer(both), model.layer(both)), rel=1e-9)


def test_a_layer_that_did_not_run_has_no_error():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.forward = model["used"].forward
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=1.0)).edit("idle", rank=1))
    small.forward = small["used"].forward
    (check,) = lrc.verify(model, small, torch.randn(2, 8)).layers
    assert math.isnan(check.output_error)


@pytest.mark.parametrize("training", [True, False])
def test_modes_gradients_and_hooks_are_put_back(training):
    model, small = pair()
    for net in (model, small):
        net.train(training)
        net.norm.train(not training)
    states = [copy.deepcopy(net.state_dict()) for net in (model, small)]
    modes = [[m.training for m in net.modules()] for net in (model, small)]
    first = lrc.verify(model, small, inputs())
    assert lrc.verify(model.eval(), small.eval(), inputs()) == first
    for net, mode in zip((model, small), modes, strict=True):
        for module, flag in zip(net.modules(), mode, strict=True):
            module.training = flag
    lrc.verify(model, small, inputs())
    assert [[m.training for m in net.modules()] for net in (model, small)] == modes
    for net, state in zip((model, small), states, strict=True):
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
        assert not any(m._forward_hooks for m in net.modules())
        assert all(p.grad is None for p in net.parameters())
    assert torch.is_grad_enabled()


def test_modes_are_put_back_after_an_error():
    model, small = pair()
    with pytest.raises(RuntimeError):
        lrc.verify(model, small, torch.randn(2, 3, 6, 6))
    assert all(m.training and not m._forward_hooks for net in (model, small) for m in net.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_inputs_may_be_positional_or_named(kind):
    model = Wrapped(lambda y: y)
    small = lrc.compress(model, lrc.Budget(params=0.4))[0]
    x, scale = inputs(), torch.full((5, 1), 3.0)
    given = {"scale": scale, "x": x} if kind is dict else kind([x, scale])
    found = lrc.verify(model, small, given)
    assert found.output_error == pytest.approx(
        relative(run(small, x, scale), run(model, x, scale)), rel=1e-12
    )
    assert found.samples == 5
    assert lrc.plan(model, lrc.Budget(macs=0.6), example_inputs=given).macs == found.macs_before


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, [{"more": y[:, :2] ** 2, "label": y.argmax(1)}, None, "text"]),
        lambda y: {"b": {"c": (y,)}, "a": y[:, :2] ** 2},
    ],
)
def test_nested_outputs_are_taken_together(wrap):
    model = Wrapped(wrap)
    small = lrc.compress(model, lrc.Budget(params=0.4))[0]
    args = (inputs(), torch.ones(()))
    found = lrc.verify(model, small, args)
    plain = [Wrapped(lambda y: y) for _ in range(2)]
    plain[0].net, plain[1].net = model.net, small.net
    before, after = (
        torch.cat([y.flatten(), (y[:, :2] ** 2).flatten()]) for y in (run(net, *args) for net in plain)
    )
    assert found.output_error == pytest.approx(relative(after, before), rel=1e-9)
    assert found.max_difference == float((after.double() - before.double()).abs().max())
    assert found.agreement is None


@pytest.mark.parametrize(
    ("wrap", "counts"),
    [
        (lambda y: y, True),
        (lambda y: (y,), True),
        (lambda y: {"logits": y, "label": y.argmax(1)}, True),
        (lambda y: y[:, :1], False),
        (lambda y: y[:, 0], False),
        (lambda y: y.unflatten(1, (2, 3)), False),
        (lambda y: (y, y), False),
    ],
)
def test_agreement_is_for_batch_by_classes_only(wrap, counts):
    model = Wrapped(wrap)
    small = lrc.compress(model, lrc.Budget(params=0.4))[0]
    found = lrc.verify(model, small, (inputs(), torch.ones(())))
    assert (found.agreement is not None) == counts
    assert ("same argmax" in str(found)) == counts


@pytest.mark.parametrize("wrap", [lambda y: y[:, :5], lambda y: (y, y), lambda y: None])
def test_outputs_of_other_shapes_are_refused(wrap):
    model, other = Wrapped(lambda y: y), Wrapped(wrap)
    with pytest.raises(lrc.PlanError, match=r"output '.*' must keep its shape (\(5, 6\)|None)"):
        lrc.verify(model, other, (inputs(), torch.ones(())))


def test_half_precision_outputs_are_compared_without_rounding():
    """The difference of two halfs may overflow a half, and their squares do long before."""
    model, other = (nn.Sequential(nn.Linear(1, 1, bias=False)).half() for _ in range(2))
    nn.init.constant_(model[0].weight, 60000.0)
    nn.init.constant_(other[0].weight, -60000.0)
    found = lrc.verify(model, other, torch.ones(2, 1, dtype=torch.half))
    assert found.max_difference == 2 * model[0].weight.item()
    assert found.output_error == 2


def test_zero_outputs_have_no_relative_error():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    nn.init.zeros_(model[0].weight)
    other = nn.Sequential(nn.Linear(8, 8, bias=False))
    assert lrc.verify(model, model, torch.ones(2, 8)).output_error == 0
    assert math.isnan(lrc.verify(model, other, torch.ones(2, 8)).output_error)


def test_the_report_holds_every_number():
    model, small = pair()
    found = lrc.verify(model, small, inputs())
    plain = found.to_dict()
    assert list(plain) == FIELDS
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["layers"][0]["output_error"] == found.layers[0].output_error
    text = str(found)
    assert f"params {found.params_before} -> {found.params_after}" in text
    assert f"macs {found.macs_before} -> {found.macs_after}" in text
    assert all(f"{check.name} ({check.kind})" in text for check in found.layers)
