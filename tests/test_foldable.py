"""What stays a module when a model is folded, and the reason that is given."""

import pytest
import torch
import torch.nn.functional as F
from test_fold import settled
from torch import nn
from torch.nn.utils import parametrizations

import lrcompress as lrc
from lrcompress import calibrate


class Net(nn.Module):
    """A layer, a batch norm and an activation; ``how`` says what is done with them."""

    def __init__(self, how, factored=False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        if factored:
            self.conv = lrc.nn.LowRankConv2d(3, 4, 3, 2, padding=1)
        self.norm, self.act, self.other = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.how, self.kept = how, None

    def forward(self, x):
        return self.how(self, x)


def keeping(model, x):
    model.kept = model.conv(x)
    return model.act(model.norm(model.kept))


def keeping_later(model, x):
    model.kept = model.norm(model.conv(x))
    return model.act(model.kept)


def in_place(model, x):
    y = model.conv(x)
    y += 1
    return model.act(model.norm(y))


def before_in_place(model, x):
    y = model.conv(x)
    z = F.relu(y, inplace=True)
    return model.act(model.norm(y)) + z


def detached(model, x):
    y = model.conv(x)
    model.kept = y.detach().numpy()
    return model.act(model.norm(y))


# name: (forward, what stays, what its reason says); the layer is factored
LEFT_ALONE = {
    "output used twice": (
        lambda m, x: m.act(m.norm(y := m.conv(x))) + y,
        "norm",
        "'conv' is also read by add",
    ),
    "norm's output used twice": (
        lambda m, x: m.act(y := m.norm(m.conv(x))) + y,
        "act",
        "'norm' is also read by add",
    ),
    "read by another layer": (
        lambda m, x: m.act(m.norm(y := m.conv(x))) + m.other(y),
        "norm",
        "'conv' is also read by 'other'",
    ),
    "returned": (
        lambda m, x: (m.act(m.norm(y := m.conv(x))), y),
        "norm",
        "whatever keeps it after the forward",
    ),
    "returned in a mapping": (lambda m, x: {"a": m.act(y := m.norm(m.conv(x))), "b": [y]}, "act", "keeps it"),
    "kept": (keeping, "norm", "whatever keeps it after the forward"),
    "norm's output kept": (keeping_later, "act", "whatever keeps it after the forward"),
    "changed in place": (in_place, "norm", "not the output of a layer|also read by"),
    "changed in place and used": (before_in_place, "norm", "also read by relu"),
    "kept as an array": (detached, "norm", "also read by detach"),
    "layer runs twice": (
        lambda m, x: m.act(m.norm(m.conv(x))) + m.conv(x + 1).mean(),
        "norm",
        "'conv', which it reads: it runs 2 times",
    ),
    "norm runs twice": (
        lambda m, x: m.act(m.norm(m.norm(m.conv(x)))),
        "norm",
        "it runs 2 times in one forward",
    ),
    "activation runs twice": (
        lambda m, x: m.act(m.other(m.act(m.norm(m.conv(x))))),
        "act",
        "it runs 2 times in one forward",
    ),
    "norm behind the activation": (
        lambda m, x: m.norm(m.act(m.conv(x))),
        "norm",
        "the output of 'act', a ReLU",
    ),
    "norm behind a sum": (lambda m, x: m.act(m.norm(m.conv(x) + 1)), "norm", "not the output of a layer|add"),
    "norm that does not run": (lambda m, x: m.act(m.conv(x)), "norm", "did not run on the example inputs"),
    "activation behind a function": (
        lambda m, x: m.act(m.norm(m.conv(x)).mean(1)),
        "act",
        "not the output of a layer",
    ),
    "weight read elsewhere": (
        lambda m, x: m.act(m.norm(m.conv(x))) + m.conv.U.sum(),
        "norm",
        "'conv', which it reads: its parameters are also read by sum",
    ),
    "norm's type asked for": (
        lambda m, x: m.act(m.norm(m.conv(x.to(m.norm.weight.dtype)))),
        "norm",
        "its parameters are also read by dtype",
    ),
    "flattened": (
        lambda m, x: m.act(m.norm(m.conv(x).flatten(2).unsqueeze(2))),
        "norm",
        "not the output of a layer",
    ),
}


@pytest.mark.parametrize("how", LEFT_ALONE)
def test_what_is_used_otherwise_stays(how):
    forward, name, reason = LEFT_ALONE[how]
    x = torch.randn(2, 3, 6, 6)
    model = settled(Net(forward, factored=True))
    left = {item.name: item.reason for item in lrc.foldable(model, x).left_alone}
    folded = lrc.fold(model, x)
    assert type(folded.get_submodule(name)) is type(model.get_submodule(name))
    assert any(part in left[name] for part in reason.split("|")), left[name]
    with torch.no_grad():
        expected, found = (torch.utils._pytree.tree_leaves(each(x)) for each in (model, folded))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def plain(model, x):
    return model.act(model.norm(model.conv(x)))


def changed(change):
    """Return a network of a factored layer, a batch norm and a ReLU after ``change(model)``."""
    model = settled(Net(plain, factored=True))
    change(model)
    return model.eval()


def with_act(act):
    return lambda m: setattr(m, "act", act)


def with_norm(norm):
    return lambda m: setattr(m, "norm", norm)


def with_conv(conv):
    return lambda m: setattr(m, "conv", conv)


class Doubling(lrc.nn.LowRankConv2d):
    """A factored layer that is not one."""

    def forward(self, x):
        return 2 * super().forward(x)


class Rectified(nn.BatchNorm2d):
    """A batch norm with an activation."""

    def __init__(self, channels) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x)) * self.weight[0]


class Shifted(nn.BatchNorm2d):
    """A batch norm that is not one."""

    def forward(self, x):
        return super().forward(x) + 1


def tie(m):
    m.other = lrc.nn.LowRankConv2d(3, 4, 3, 2)
    m.other.V = m.conv.V


def overflowing(m):
    m.norm.weight.data.fill_(1e38)
    m.conv.U.data.fill_(1e10)


def plain_weight(m):
    weight = m.conv.weight.detach()
    m.conv = nn.Conv2d(3, 4, 3, padding=1)
    del m.conv.weight
    m.conv.weight = weight


MODULES = {
    "no statistics": (
        with_norm(nn.BatchNorm2d(4, track_running_stats=False)),
        "norm",
        "no running statistics",
    ),
    "tanh": (with_act(nn.GELU("tanh")), "act", "its approximation must be 'none', got 'tanh'"),
    "hook on the norm": (lambda m: m.norm.register_forward_hook(lambda *_: None), "norm", "hooks"),
    "pre-hook on the norm": (lambda m: m.norm.register_forward_pre_hook(lambda *_: None), "norm", "hooks"),
    "backward hook": (lambda m: m.norm.register_full_backward_hook(lambda *_: None), "norm", "hooks"),
    "hook on the layer": (
        lambda m: m.conv.register_forward_hook(lambda *_: None),
        "norm",
        "'conv', which it reads: it carries hooks",
    ),
    "hook on the activation": (lambda m: m.act.register_forward_hook(lambda *_: None), "act", "hooks"),
    "tied": (tie, "norm", "'conv', which it reads: its weight is tied"),
    "tied norms": (
        lambda m: [setattr(m, "more", nn.BatchNorm2d(4)), setattr(m.more, "bias", m.norm.bias)],
        "norm",
        "tied",
    ),
    "own forward": (
        lambda m: setattr(m.norm, "forward", lambda x: x + 1),
        "norm",
        "its forward was replaced",
    ),
    "subclass": (with_norm(Shifted(4)), "norm", "a subclass of BatchNorm2d may compute otherwise"),
    "parametrised": (
        lambda m: setattr(m, "conv", parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
        "norm",
        "'conv', which it reads: a subclass of Conv2d may compute otherwise",
    ),
    "subclass of ours": (with_conv(Doubling(3, 4, 3, 2)), "norm", "a subclass of LowRankConv2d"),
    "with a part": (with_norm(Rectified(4)), "norm", "a subclass of BatchNorm2d"),
    "part": (with_norm(Rectified(4)), "norm.act", "not the output of a layer"),
    "no parameter": (plain_weight, "norm", "its weight is computed from other parameters"),
    "own activation": (
        lambda m: setattr(m.conv, "activation", "silu"),
        "norm",
        "ends with an activation, silu",
    ),
    "overflow": (overflowing, "norm", "the weight of 'conv' would not be finite"),
    "dense": (
        lambda m: setattr(m, "conv", nn.Conv2d(3, 4, 3)),
        "act",
        "the output of 'conv', a Conv2d, not of a factored layer",
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("what", MODULES)
def test_what_is_no_ordinary_module_stays(what):
    change, name, reason = MODULES[what]
    model, x = changed(change), torch.randn(2, 3, 6, 6)
    left = {item.name: item.reason for item in lrc.foldable(model, x).left_alone}
    folded = lrc.fold(model, x)
    assert type(folded.get_submodule(name)) is type(model.get_submodule(name))
    assert reason in left[name]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


class Joined(nn.BatchNorm2d):
    """A batch norm with modules inside and a forward of its own."""

    def __init__(self, channels, *parts) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.Sequential(*parts)

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))


@pytest.mark.parametrize("parts", [(), (nn.SiLU(),), (nn.ReLU(inplace=True), nn.Hardswish())])
@pytest.mark.parametrize("factored", [False, True])
def test_a_norm_that_is_joined_with_an_activation_leaves_the_activation(parts, factored):
    model = settled(Net(plain, factored=factored))
    joined = Joined(4, *parts)
    joined.load_state_dict(model.norm.state_dict())
    model.norm, x = joined.eval(), torch.randn(2, 3, 8, 8)
    small = lrc.fold(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    assert [module for module in small.norm.modules() if type(module) in map(type, parts)] or not parts
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))


def test_a_norm_in_training_stays_and_a_model_in_training_is_refused():
    x = torch.randn(2, 3, 6, 6)
    model = changed(lambda m: None)
    model.norm.train()
    assert {item.name: item.reason for item in lrc.foldable(model, x).left_alone} == {
        "norm": "it is in training mode",
        "act": "'norm', which it reads: it is in training mode",
    }
    folded = lrc.fold(model, x)
    assert folded.norm.training
    assert model.norm.training
    with pytest.raises(lrc.PlanError, match="must be in evaluation mode, got training mode"):
        lrc.fold(model.train(), x)


@pytest.mark.parametrize(
    "linear", [nn.Linear(6, 5), lrc.nn.LowRankLinear(6, 5, 2)], ids=["dense", "factored"]
)
def test_a_batch_norm_over_another_axis_stays(linear):
    model = settled(nn.Sequential(linear, nn.BatchNorm1d(5)))
    (left,) = lrc.foldable(model, torch.randn(2, 5, 6)).left_alone
    assert left.reason == "the output of '0' must have 2 axes, got 3"
    assert lrc.foldable(model, torch.randn(2, 6)).left_alone == ()
    images = settled(nn.Sequential(nn.Conv2d(5, 6, 1), nn.BatchNorm1d(6)))
    (left,) = lrc.foldable(images, torch.randn(5, 6, 4)).left_alone  # one image without a batch: [6, 6, 4]
    assert left.reason == "the output of '0' must have 4 axes, got 3"


def test_asking_for_shapes_and_types_is_no_use():
    def asking(model, x):
        y = model.conv(x.to(model.conv.U.dtype))
        assert (y.ndim, y.dim(), y.size(1)) == (4, 4, 4)
        z = model.norm(y)
        return model.act(z).reshape(len(x), *z.shape[1:]).to(y.device)

    x = torch.randn(2, 3, 6, 6)
    model = settled(Net(asking, factored=True))
    (fold,) = lrc.foldable(model, x).folds
    assert (fold.layer, fold.gone) == ("conv", ("norm", "act"))
    torch.testing.assert_close(lrc.fold(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_code_below_python_is_seen_too():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

    scripted = torch.jit.script(nn.Sequential(nn.Tanh()))
    for read, name in ((scripted, "tanh"), (Own.apply, "exp")):
        model = changed(lambda m, read=read: setattr(m, "how", lambda m, x: m.norm(y := m.conv(x)) + read(y)))
        left = lrc.foldable(model, torch.randn(2, 3, 6, 6)).left_alone
        assert ("norm", f"the output of 'conv' is also read by {name}") in [(e.name, e.reason) for e in left]


def test_a_hook_around_the_layer_is_a_use():
    model = settled(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)))
    x, seen = torch.randn(2, 3, 6, 6), []
    handle = model[0].register_forward_hook(lambda _, args, y: seen.append(y))
    (left,) = lrc.foldable(model, x).left_alone
    assert left.reason == "the output of '0.0' is also read by whatever keeps it after the forward"
    handle.remove()
    seen.clear()
    assert lrc.foldable(model, x).left_alone == ()


def test_branches_on_data_and_modules_of_two_names_are_no_obstacle():
    def branching(model, x):
        x = x + 1 if x.sum() > 0 else x - 1
        return model.same(model.act(model.conv(x)))

    model = Net(branching, factored=True)
    model.same = model.norm
    model.act = nn.Identity()
    x = torch.randn(2, 3, 6, 6)
    folded = lrc.fold(settled(model), x)
    assert type(folded.same) is nn.Identity
    assert folded.same is folded.norm
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_layers_of_attention_that_torch_runs_at_once_stay():
    model = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True).eval()
    model.linear1 = lrc.nn.LowRankLinear(8, 16, 4)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(lrc.fold(model, x)(x), model(x))


def test_following_leaves_the_model_as_it_was():
    model, x = changed(lambda m: None), torch.randn(2, 3, 6, 6)
    model.norm.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parts = dict(model.named_children())
    found = calibrate.uses(model, parts, lambda: model(x))
    assert found["conv"].readers == ("norm",)
    assert found["norm"].readers == ("act",)
    assert "other" not in found
    assert (found["act"].readers, len(found["act"].others)) == ((), 1)
    with pytest.raises(ValueError, match="input channels 2"):
        calibrate.uses(model, parts, lambda: model(x[:, :2]))
    assert model.norm.training
    assert not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
