"""Tuning keeps what measures fastest and the function; the artefact carries it to the same device."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lrcompress as lrc
from lrcompress import measure
from lrcompress.codec import artefact as codec
from lrcompress.measure import clock, tuning
from lrcompress.types import LayerTuning, Tuning

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two 2-D convolutions, one of them called twice, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.hidden = nn.Linear(16, 32)
        self.unused = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        x = torch.relu(self.twice(torch.relu(self.twice(self.conv(x)))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture
def small() -> tuple[nn.Module, lrc.Plan, nn.Module]:
    """Return a factored model, its plan and the original."""
    model = Net().eval()
    plan = lrc.plan(model, lrc.Budget(params=1.0))
    for name in ("conv", "twice", "hidden", "unused", "head"):
        plan = plan.edit(name, rank=2)
    return lrc.apply(model, plan), plan, model


def clocked(monkeypatch, layers, models):
    """Let the clock show these seconds: of the three ways, and of the whole models in their order."""

    def fake_layers(model, variants, inputs, device, seconds, progress):
        for done in range(4):
            progress(done + 1, 4)
        return {way: {key: [layers[way]] for key in modules} for way, modules in variants.items()}

    monkeypatch.setattr(tuning, "seconds_of_layers", fake_layers)
    monkeypatch.setattr(tuning, "seconds_of_models", lambda found, *_: dict(zip(found, models, strict=True)))


X = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
# As given, then contiguous: chosen ways, all composed, all merged; then the same in channels_last.
GIVEN_BEST, CHOSEN_BEST, COMPOSED_BEST, MERGED_BEST, LAST_BEST = (
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    [4.0, 1.0, 3.0, 6.0, 2.0, 5.0, 7.0],
    [4.0, 2.0, 1.0, 6.0, 5.0, 3.0, 7.0],
    [4.0, 2.0, 3.0, 1.0, 5.0, 6.0, 7.0],
    [4.0, 3.0, 2.0, 6.0, 1.0, 5.0, 7.0],
)

MIXED = {"conv": "fused", "twice": "fused", "hidden": "merged", "head": "merged"}


@pytest.mark.parametrize(
    ("models", "form", "expected"),
    [
        (GIVEN_BEST, "as given", {"conv": "auto", "twice": "auto", "hidden": "auto", "head": "auto"}),
        (
            CHOSEN_BEST,
            "contiguous",
            {"conv": "fused", "twice": "fused", "hidden": "merged", "head": "merged"},
        ),
        (COMPOSED_BEST, "contiguous", dict.fromkeys(("conv", "twice", "hidden", "head"), "composed")),
        (MERGED_BEST, "contiguous", dict.fromkeys(("conv", "twice", "hidden", "head"), "merged")),
        (
            LAST_BEST,
            "channels_last",
            {"conv": "fused", "twice": "fused", "hidden": "merged", "head": "merged"},
        ),
    ],
)
def test_the_fastest_is_kept(monkeypatch, small, models, form, expected):
    model, _, _ = small
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(lrc.nn.LowRankLinear, "runs_fused", lambda self, x: False)
    clocked(monkeypatch, {"fused": 1.0, "composed": 3.0, "merged": 2.0}, models)
    steps = []
    fast, found = lrc.tune(model, X, progress=lambda done, of: steps.append((done, of)))
    assert found.choices == expected
    assert (found.memory_format, found.before, found.after) == (form, models[0], min(models))
    assert found.device == measure.device_name(CPU)
    assert found.inputs == "float32[2, 4, 8, 8]"
    for name, way in expected.items():
        layer = fast.get_submodule(name)
        assert (type(layer) in (nn.Conv2d, nn.Linear)) if way == "merged" else layer.kernel == way
    last = fast.conv.V if hasattr(fast.conv, "V") else fast.conv.weight
    assert last.is_contiguous(memory_format=torch.channels_last) == (form == "channels_last")
    assert steps == [(i, 8) for i in range(1, 9)]
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.conv.kernel == "auto"


def test_a_measured_tuning_is_consistent(small):
    model, _, _ = small
    fast, found = lrc.tune(model, X, seconds=0.0)
    assert found.after <= found.before
    assert [layer.name for layer in found.layers] == ["conv", "twice", "hidden", "head"]  # those that ran
    for layer in found.layers:
        assert min(layer.composed, layer.merged) > 0
    assert found.layers[0].fused > 0
    assert str(found).splitlines()[0] == f"{found.device}, {found.threads} threads, float32[2, 4, 8, 8]"
    assert str(found).splitlines()[2].startswith("conv ")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fast.modules())


def test_a_bare_layer_is_tuned():
    layer, x = lrc.nn.LowRankLinear(16, 8, 2), torch.randn(3, 16)
    fast, found = lrc.tune(layer, x)
    assert [each.name for each in found.layers] == [""]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x))


class Busy(nn.Module):
    """Work for some seconds."""

    def __init__(self, seconds: float, called: Callable[[float], None] = lambda _: None) -> None:
        super().__init__()
        self.seconds, self.called = seconds, called

    def forward(self, x):
        self.called(self.seconds)
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return x


def test_the_clock_sees_what_each_model_and_layer_takes():
    calls = Counter()
    models = {
        "long": Busy(4e-3, lambda s: calls.update([s])),
        "short": Busy(1e-3, lambda s: calls.update([s])),
    }
    found = clock.seconds_of_models(models, X, CPU, 0)
    assert found["short"] < found["long"]
    assert found["long"] >= 4e-3
    assert calls[4e-3] == calls[1e-3] == 6  # one warms up

    shared = Busy(0)
    model = nn.Sequential(shared, nn.ReLU(), shared, Busy(0)).train()
    variants = {
        "slow": {"0": Busy(2e-3), "3": Busy(1e-3)},
        "fast": {"0": Busy(5e-4)},
    }
    steps = []
    seen = clock.seconds_of_layers(model, variants, X, CPU, 0, lambda done, of: steps.append((done, of)))
    assert min(seen["slow"]["0"]) >= 4e-3  # called twice
    assert 1e-3 <= min(seen["slow"]["3"]) < min(seen["slow"]["0"])
    assert 1e-3 <= min(seen["fast"]["0"]) < min(seen["slow"]["0"])
    assert min(seen["slow"][""]) >= 5e-3
    assert steps == [(i, 5) for i in range(1, 6)]
    assert model[0] is model[2] is shared
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for v in variants.values() for m in v.values())


def test_the_clock_puts_the_model_back_after_an_error():
    own = nn.Linear(4, 4)
    model = nn.Sequential(own)
    with pytest.raises(RuntimeError, match="shape"):
        clock.seconds_of_layers(model, {"wrong": {"0": nn.Linear(5, 5)}}, torch.randn(2, 4), CPU, 0)
    assert model[0] is own


def test_a_layer_that_is_no_submodule_cannot_be_timed():
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = lrc.nn.LowRankLinear(4, 4, 1)
            self.same = [self.layer]

        def forward(self, x):
            return self.same[0](x)

    with pytest.raises(lrc.PlanError, match="'layer' cannot be timed"):
        lrc.tune(Hiding(), torch.randn(2, 4))


def test_layers_alike_share_their_times(monkeypatch):
    model = nn.Sequential(*(lrc.nn.LowRankLinear(8, 8, 2) for _ in range(3)), lrc.nn.LowRankLinear(8, 8, 3))
    seconds = {"0": 1.0, "1": 3.0, "2": 2.0, "3": 9.0}

    def fake(model, variants, *_):
        return {way: {name: [seconds[name]] for name in modules} for way, modules in variants.items()}

    monkeypatch.setattr(tuning, "seconds_of_layers", fake)
    _, found = lrc.tune(model, torch.randn(4, 8), seconds=0.0)
    assert [layer.composed for layer in found.layers] == [2.0, 2.0, 2.0, 9.0]


def test_nothing_factored_is_said():
    with pytest.raises(lrc.PlanError, match="no factored layer"):
        lrc.tune(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))


def chosen(model: nn.Module, device: str) -> Tuning:
    names = ("conv", "twice", "hidden", "head")
    ways = ("fused", "composed", "merged", "auto")
    layers = [LayerTuning(n, w, float("nan"), 2e-5, 1e-5) for n, w in zip(names, ways, strict=True)]
    return Tuning(device, 2, "float32[1]", "channels_last", 2.0, 1.0, tuple(layers))


def test_the_artefact_carries_the_choice_to_the_same_device(small, tmp_path):
    model, plan, original = small
    mine, other = chosen(model, measure.device_name(CPU)), chosen(model, "another device")
    lrc.save(model, plan, tmp_path / "a", tunings=[other, mine])
    again = lrc.load(tmp_path / "a", original)
    assert (again.conv.kernel, again.twice.kernel, again.head.kernel) == ("fused", "composed", "auto")
    assert type(again.hidden) is nn.Linear
    assert again.conv.V.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(again(X), model(X))
    plain = lrc.load(tmp_path / "a", original, tuned=False)
    assert plain.conv.kernel == "auto"
    assert isinstance(plain.hidden, lrc.nn.LowRankLinear)
    lrc.save(model, plan, tmp_path / "b", tunings=[other])
    assert isinstance(lrc.load(tmp_path / "b", original).hidden, lrc.nn.LowRankLinear)
    with pytest.raises(lrc.PlanError, match=r"'hidden' must be .* as planned, got Linear"):
        lrc.save(again, plan, tmp_path / "c")


def test_a_tuning_of_another_model_is_refused(small, tmp_path):
    model, plan, original = small
    good = chosen(model, measure.device_name(CPU))
    strange = dataclasses.replace(good, layers=(dataclasses.replace(good.layers[0], name="nothing"),))
    with pytest.raises(lrc.PlanError, match="'nothing' must be a factored layer"):
        lrc.save(model, plan, tmp_path, tunings=[strange])
    lrc.save(model, plan, tmp_path, tunings=[good])

    def write(change):
        config = json.loads((tmp_path / "config.json").read_text())
        change(config)
        del config["checksum"]
        config["checksum"] = codec._checksum(config)
        (tmp_path / "config.json").write_text(json.dumps(config))

    for change, message in [
        (lambda c: c["tunings"][0]["layers"][0].update(name="nothing"), "'nothing' must be a factored layer"),
        (lambda c: c["tunings"][0]["layers"][0].update(choice="magic"), "must be one of .* got 'magic'"),
        (lambda c: c["tunings"][0].update(memory_format="odd"), "got 'odd'"),
        (lambda c: c["tunings"][0].update(threads="two"), "tuning.threads"),
        (lambda c: c.update(tunings={}), "tunings must be a list"),
    ]:
        lrc.save(model, plan, tmp_path, tunings=[good])
        write(change)
        with pytest.raises(lrc.FormatError, match=message):
            lrc.load(tmp_path, original)
    lrc.save(model, plan, tmp_path, tunings=[good])
    write(lambda c: c.pop("tunings"))  # as artefacts were before
    assert isinstance(lrc.load(tmp_path, original).hidden, lrc.nn.LowRankLinear)


def test_a_tuning_survives_json():
    found = chosen(nn.Identity(), "x")
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert str(Tuning.from_dict(json.loads(text))) == str(found)
