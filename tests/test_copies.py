"""Copies of models run none of the original's modules, whatever keeps them: closures, methods, hooks."""

import copy
import functools
import weakref
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompress as lrc

BUDGET = lrc.Budget(params=0.5)


class Base(nn.Module):
    """Two layers, the second of which is reached through what `keep` leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 12)
        self.keep()

    def keep(self) -> None:
        raise NotImplementedError

    def head(self, h: Tensor) -> Tensor:
        return self.call(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(x)))


class LambdaOfSelf(Base):
    def keep(self) -> None:
        self.call = lambda h: self.b(h)


class LambdaOfLayer(Base):
    def keep(self) -> None:
        layer = self.b
        self.call = lambda h: layer(h)


class Nested(Base):
    def keep(self) -> None:
        def outer(h: Tensor) -> Tensor:
            def inner(times: int) -> Tensor:
                return self.b(h) if times == 0 else inner(times - 1)

            return inner(2)

        def around(h: Tensor) -> Tensor:
            return outer(h)

        self.call = around


class Recursive(Base):
    def keep(self) -> None:
        layers = [self.b, nn.Identity()]

        def run(h: Tensor, i: int = 0) -> Tensor:
            return h if i == len(layers) else run(layers[i](h), i + 1)

        self.call = run


class Defaults(Base):
    def keep(self) -> None:
        def run(h: Tensor, layer: nn.Module = self.b, *, after: Any = (self.b.forward,)) -> Tensor:
            return layer(h) + 0 * after[0](h)

        self.call = run


class Partial(Base):
    def keep(self) -> None:
        self.call = functools.partial(lambda layer, h, scale: layer(h) * scale, self.b, scale=2.0)


class PartialOfClosure(Base):
    def keep(self) -> None:
        self.call = functools.partial(functools.partial(lambda h, k: self.b(h) * k), k=2)


class MethodInList(Base):
    def keep(self) -> None:
        self.kept = [self.a.forward, (self.b.forward,)]

    def head(self, h: Tensor) -> Tensor:
        return self.kept[1][0](h)


class MethodInDict(Base):
    def keep(self) -> None:
        self.kept = {"heads": {"b": self.b.__call__}}

    def head(self, h: Tensor) -> Tensor:
        return self.kept["heads"]["b"](h)


class ClosureInTuple(Base):
    def keep(self) -> None:
        self.kept = (1, (lambda h: self.b(h),))

    def head(self, h: Tensor) -> Tensor:
        return self.kept[1][0](h)


class Wrapped(Base):
    def keep(self) -> None:
        forward = self.forward

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        self.forward = wrapped

    def head(self, h: Tensor) -> Tensor:
        return self.b(h)


class Autocast(Base):
    def keep(self) -> None:
        self.forward = torch.autocast("cpu", enabled=False)(self.forward)

    def head(self, h: Tensor) -> Tensor:
        return self.b(h)


class NoGrad(Base):
    def keep(self) -> None:
        self.forward = torch.no_grad()(self.forward)

    def head(self, h: Tensor) -> Tensor:
        return self.b(h)


class Compiled(Base):
    def keep(self) -> None:
        self.forward = torch.compile(self.forward, backend="eager")

    def head(self, h: Tensor) -> Tensor:
        return self.b(h)


class CompiledLayer(Base):
    def keep(self) -> None:
        self.call = torch.compile(self.b, backend="eager").forward


class WrappedLayer(Base):
    def keep(self) -> None:
        layer = self.b

        @functools.wraps(functools.wraps(layer)(lambda h: layer(h)))
        def wrapped(h: Tensor) -> Tensor:
            return layer(h)

        self.call = wrapped


class ContainersForward(Base):
    def keep(self) -> None:
        self.box = nn.Sequential(self.b)
        del self.b
        run = self.box.forward
        self.box.forward = lambda h: run(h) * 2

    def head(self, h: Tensor) -> Tensor:
        return self.box(h)


class Helper:
    def __init__(self, layer: nn.Module) -> None:
        self.run, self.layer = lambda h: layer(h), layer

    def __call__(self, h: Tensor) -> Tensor:
        return self.run(h) + self.layer(h)


class InAnObject(Base):
    def keep(self) -> None:
        self.call = Helper(self.b)


class ObjectInClosure(Base):
    def keep(self) -> None:
        helper = Helper(self.b)
        self.call = lambda h: helper(h)


class BoundLambda(Base):
    def keep(self) -> None:
        self.call = MethodType(lambda layer, h: nn.functional.linear(h, layer.weight, layer.bias), self.b)


class Weak(Base):
    def keep(self) -> None:
        self.kept = [weakref.ref(self.b)]

    def head(self, h: Tensor) -> Tensor:
        return self.kept[0]()(h)


class TwoNames(Base):
    def keep(self) -> None:
        self.again = nn.ModuleDict({"b": self.b})
        self.call = lambda h: self.again["b"](h) + self.b(h)


class PreHook(Base):
    """A hook that is a method of the original, on a container."""

    def keep(self) -> None:
        self.box = nn.Sequential(nn.Identity())
        self.box.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.b(output)

    def head(self, h: Tensor) -> Tensor:
        return self.box(h)


class HookClosure(PreHook):
    def keep(self) -> None:
        self.box = nn.Sequential(nn.Identity())
        self.box.register_forward_hook(lambda module, args, output: self.b(output))


KINDS = [LambdaOfSelf, LambdaOfLayer, Nested, Recursive, Defaults, Partial, PartialOfClosure, MethodInList]
KINDS += [MethodInDict, ClosureInTuple, Wrapped, Autocast, NoGrad, Compiled, CompiledLayer, WrappedLayer]
KINDS += [ContainersForward, InAnObject, ObjectInClosure, BoundLambda, Weak, TwoNames, PreHook, HookClosure]


def factored_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "U")}


@torch.no_grad()
@pytest.mark.parametrize("data", ["none", "batches", "statistics"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_keeps_the_original_is_made_again(tmp_path: Path, kind: type[Base], data: str) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(64, 16)
    expected = model(x)
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.svd())
    given = {"none": {}, "batches": {"batches": [x]}}
    if data == "statistics":
        given[data] = {data: lrc.collect(model, [x])}
    small = lrc.apply(model, plan, **given[data])
    assert len(factored_of(small)) == 2
    found = small(x)
    assert not torch.equal(found, expected)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing of the original is left in the copy
            parameter.fill_(torch.nan)
    assert torch.equal(small(x), found)
    with torch.no_grad():
        for module in factored_of(small).values():
            module.U.mul_(2)
    assert not torch.allclose(small(x), found)
    with torch.no_grad():
        for module in factored_of(small).values():
            module.U.div_(2)
    lrc.save(small, plan, tmp_path)
    assert torch.equal(lrc.load(tmp_path, kind().eval())(x), found)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_plan_of_full_rank_gives_the_same_network(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model, x = kind().double().eval(), torch.randn(64, 16).double()
    plan = lrc.plan(model, lrc.Budget(params=1.0))
    for name in [entry.layer.name for entry in plan]:
        plan = plan.edit(name, rank=min(plan[name].layer.weight_shape), groups=1)
    small = lrc.apply(model, plan, batches=[x])
    assert len(factored_of(small)) == 2
    torch.testing.assert_close(small(x), model(x))
    torch.testing.assert_close(lrc.merge(small)(x), model(x))
    if kind is not BoundLambda:  # it reads a weight, which the two layers that take its place do not have
        torch.testing.assert_close(lrc.unfuse(small)(x), model(x))


def test_functions_that_share_a_variable_still_do():
    class Counting(Base):
        def keep(self) -> None:
            calls = 0

            def run(h: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return self.b(h)

            self.call, self.count = run, lambda: (calls, self.a)[0]

    model, x = Counting().eval(), torch.randn(4, 16)
    small = lrc.apply(model, lrc.plan(model, BUDGET))
    small(x)
    small(x)
    assert (model.count(), small.count()) == (0, 2)


def test_functions_that_lead_to_nothing_are_shared():
    class Pure(Base):
        def keep(self) -> None:
            table = torch.arange(12.0)
            self.scale = lambda h: h * table
            self.call = lambda h: self.scale(self.b(h))

    model = Pure().eval()
    small = lrc.apply(model, lrc.plan(model, BUDGET))
    assert small.scale is model.scale
    assert small.call is not model.call


@pytest.mark.parametrize("place", ["list", "closure", "object"])
def test_a_weight_that_something_else_keeps_is_refused(tmp_path, place):
    class Keeps(Base):
        def keep(self) -> None:
            weight = self.b.weight
            self.kept = [weight] if place == "list" else Helper(weight) if place == "object" else None
            self.call = lambda h: h @ (weight if place == "closure" else self.b.weight).T

    model = Keeps().eval()
    plan = lrc.plan(model, BUDGET)
    with pytest.raises(lrc.PlanError, match=r"layer 'b': .* keeps its parameters too"):
        lrc.apply(model, plan)
    plan = lrc.plan(model, lrc.Budget(params=0.9), ignore="b")
    assert len(factored_of(lrc.apply(model, plan))) == 1


def test_a_bias_that_something_else_keeps_is_that_of_the_new_layer():
    model = nn.Sequential(nn.Linear(16, 16))
    model.kept = [model[0].bias]
    small = lrc.apply(model, lrc.plan(model, BUDGET))
    assert small.kept[0] is small[0].bias
    assert small[0].bias is not model[0].bias


def test_what_cannot_be_made_again_is_refused_by_name():
    class Cached(Base):
        def keep(self) -> None:
            self.call = functools.lru_cache(lambda h: self.b(h))

    model = Cached().eval()
    with pytest.raises(lrc.PlanError, match=r"module '' is kept by a functools\._lru_cache_wrapper"):
        lrc.apply(model, lrc.plan(model, BUDGET))


def test_a_method_that_factored_layers_lack_is_refused_by_name():
    class Kept(Base):
        def keep(self) -> None:
            self.conv = nn.Conv1d(12, 12, 3)
            self.kept = self.conv._conv_forward

    model = Kept().eval()
    with pytest.raises(lrc.PlanError, match="layer 'conv': its method '_conv_forward' is kept"):
        lrc.apply(model, lrc.plan(model, BUDGET))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("data", ["none", "batches", "statistics"])
def test_tensors_with_a_history_are_copied_without_it(data):
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), nn.Conv1d(8, 8, 3)).eval()
    x = torch.randn(8, 4, 20)
    plan, statistics = lrc.plan(model, lrc.Budget(params=0.8)), lrc.collect(model, [x])
    expected = lrc.apply(model, plan)(x)
    model.kept = {"all": [model(x)]}  # the weight, too, has a history now
    assert not model[0].weight.is_leaf
    given = {"none": {}, "batches": {"batches": [x]}, "statistics": {"statistics": statistics}}[data]
    small = lrc.apply(model, plan, **given)
    assert small.kept["all"][0].is_leaf
    assert small[0].weight_v.requires_grad
    if data == "none":
        assert torch.equal(small(x), expected)
    assert not torch.equal(small(x), model(x))
    assert model[0].weight.grad_fn is not None


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Linear(16, 16))
    model.lines = (line for line in "ab")
    with pytest.raises(lrc.PlanError, match=r"the model cannot be copied: .*generator"):
        lrc.apply(model, lrc.plan(model, BUDGET))
    with pytest.raises(TypeError):
        copy.deepcopy(model)


class Branching(nn.Module):
    """Runs one of two layers, or none, by the values of the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.limit = 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.last = h.sum()
        return self.b(h) if h.sum() > self.limit else self.c(h)


def test_a_layer_that_the_inputs_no_longer_reach_is_no_fault():
    model, x = Branching().eval(), torch.randn(8, 16)
    plan = lrc.plan(model, lrc.Budget(params=0.4), lrc.svd())
    small = lrc.apply(model, plan)
    sums = [float(net.a(x).detach().sum()) for net in (model, small)]
    model.limit = small.limit = sum(sums) / 2  # they go different ways
    assert lrc.verify(model, small, x).output_error > 0
    assert len(factored_of(lrc.apply(model, plan, example_inputs=x))) == 3
    assert not hasattr(small, "last")


@pytest.mark.parametrize("kind", [LambdaOfSelf, MethodInDict], ids=lambda kind: kind.__name__)
def test_a_layer_of_the_original_that_runs_is_named(monkeypatch, kind):
    model, x = kind().eval(), torch.randn(8, 16)
    plan = lrc.plan(model, lrc.Budget(params=0.6), lrc.svd())
    small = lrc.apply(model, plan)
    vars(small).update({name: vars(model)[name] for name in ("call", "kept") if name in vars(model)})
    with pytest.raises(lrc.PlanError, match="layer 'b' of the original runs"):
        lrc.verify(model, small, x)
    monkeypatch.setattr("lrcompress.pipeline._applied", lambda *_: small)
    for given in ({"example_inputs": x}, {"batches": [x]}):
        with pytest.raises(lrc.PlanError, match="layer 'b' of the original runs"):
            lrc.apply(model, plan, **given)


def test_a_factored_layer_that_does_not_run_is_named():
    model, x = Branching().eval(), torch.randn(8, 16)
    model.limit = -1e9
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.4), lrc.svd()))
    dense = copy.deepcopy(model.b)
    small.forward = lambda x: dense(small.a(x))
    with pytest.raises(lrc.PlanError, match="layer 'b' does not run"):
        lrc.verify(model, small, x)


def test_a_model_may_share_tensors_with_its_compressed_copy():
    model, x = Branching().eval(), torch.randn(8, 16)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.9), ignore=["b", "c"]))
    small.b, small.c = model.b, model.c
    assert lrc.verify(model, small, x).output_error > 0
    assert lrc.verify(model, model, x).output_error == 0


def test_a_model_of_the_hub_comes_back_by_load(tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub brings the mixin")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, size: int = 64) -> None:
            super().__init__()
            self.fc = nn.Linear(size, size)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    small, plan = lrc.compress(Net(size=32).eval(), BUDGET, lrc.svd())
    lrc.save(small, plan, tmp_path)
    x = torch.randn(2, 32)
    assert torch.equal(lrc.load(tmp_path, Net(size=32).eval())(x), small(x))
