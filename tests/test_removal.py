"""Removing channels: exact for every pattern that the trace follows, and refused for what it does not."""

import copy
import functools
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lrcompress import removal
from lrcompress.nn import SelectInputs
from lrcompress.types import Coupling, PlanError, Removal, Slot, Wiring


class Net(nn.Module):
    """Modules by name and a forward given as a function of them."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def conv(channels, out, size=3, **kwargs):
    return nn.Conv2d(channels, out, size, padding=size // 2, **kwargs)


def lenet():
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 2 * 2, 11), nn.ReLU(), nn.Linear(11, 4),
    )  # fmt: skip


def batchnorm(x_dim=2):
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
    layer, norm = kinds[x_dim]
    return nn.Sequential(
        layer(3, 7, 3, padding=1, bias=False), norm(7), nn.ReLU(), nn.Dropout(), layer(7, 5, 1), nn.Flatten(),
        nn.LazyLinear(2),
    )  # fmt: skip


def residual():
    return Net(
        lambda m, x: m.head(torch.relu(m.stem(x) + m.second(m.mid(F.relu(m.first(m.stem(x)))))).mean((2, 3))),
        stem=conv(3, 6), first=conv(6, 6), mid=nn.BatchNorm2d(6), second=conv(6, 6), head=nn.Linear(6, 4),
    )  # fmt: skip


def concatenation():
    def forward(m, x):
        a, b = m.a(x), m.b(x)
        return m.head(torch.flatten(F.avg_pool2d(m.norm(torch.cat((a, b, a), 1)), 2), 1))

    return Net(forward, a=conv(3, 4), b=conv(3, 5), norm=nn.BatchNorm2d(13), head=nn.Linear(13 * 16, 3))


def depthwise():
    return nn.Sequential(
        conv(3, 6), nn.PReLU(6), conv(6, 12, groups=6), nn.BatchNorm2d(12), nn.SiLU(), conv(12, 5, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def gated():
    def forward(m, x):
        y = m.stem(x)
        gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1)))))
        return m.head((y * gate).mean([2, 3]))

    return Net(forward, stem=conv(3, 6), down=conv(6, 3, 1), up=conv(3, 6, 1), head=nn.Linear(6, 4))


def permuted():
    def forward(m, x):
        y = m.stem(x).permute(0, 2, 3, 1)
        y = m.second(F.gelu(m.first(y)))
        return m.head(y.transpose(1, 3).mean((2, 3)))

    return Net(forward, stem=conv(3, 6), first=nn.Linear(6, 9), second=nn.Linear(9, 5), head=nn.Linear(5, 2))


def viewed():
    def forward(m, x):
        y = F.pad(m.stem(x)[:, :, ::2, 1:], (1, 1))
        n, c, h, w = y.shape
        y = y.view(n, c * h, w).reshape(n, -1)
        return m.head(F.relu(m.mid(y)))

    return Net(forward, stem=conv(3, 5), mid=nn.Linear(5 * 4 * 9, 6), head=nn.Linear(6, 3))


def called_twice():
    def forward(m, x):
        return m.head(m.shared(F.relu(m.shared(m.stem(x)))).flatten(2).mean(-1))

    return Net(forward, stem=conv(3, 6), shared=conv(6, 6), head=nn.Linear(6, 4))


PATTERNS = {
    "lenet": (lenet, (16, 16), {"0": 6, "2": 8, "5": 11, "inputs of 0": 3}),
    "batch norm 1d": (lambda: batchnorm(1), (8,), {"0": 7, "4": 5, "inputs of 0": 3}),
    "batch norm 2d": (lambda: batchnorm(2), (8, 8), {"0": 7, "4": 5, "inputs of 0": 3}),
    "batch norm 3d": (lambda: batchnorm(3), (4, 4, 4), {"0": 7, "4": 5, "inputs of 0": 3}),
    "residual": (residual, (8, 8), {"stem": 6, "first": 6, "inputs of stem": 3}),
    "concatenation": (concatenation, (8, 8), {"a": 4, "b": 5, "inputs of a": 3, "inputs of b": 3}),
    "depthwise": (depthwise, (8, 8), {"0": 6, "5": 5, "inputs of 0": 3}),
    "gated": (gated, (8, 8), {"stem": 6, "down": 3, "inputs of stem": 3}),
    "permuted": (permuted, (8, 8), {"stem": 6, "first": 9, "second": 5, "inputs of stem": 3}),
    "viewed": (viewed, (8, 8), {"stem": 5, "mid": 6, "inputs of stem": 3}),
    "called twice": (called_twice, (8, 8), {"stem": 6, "inputs of stem": 3}),
}


def built(pattern):
    make, size, expected = PATTERNS[pattern]
    x = torch.randn(5, 3, *size, dtype=torch.float64)
    model = make().double()
    model(x)  # lazy layers; statistics of batch norms
    return model.eval(), x, expected


def some(wiring: Wiring) -> list[Removal]:
    """Keep a random part of every coupling, at least one channel and never all."""
    chosen = []
    for coupling in wiring.couplings:
        count = max(1, coupling.channels // 2)
        chosen.append(Removal(coupling, tuple(sorted(torch.randperm(coupling.channels)[:count].tolist()))))
    return chosen


def with_zero_columns(model, removals):
    """Copy the model with zeros in every column that the removals drop."""
    model = copy.deepcopy(model)
    for removal_ in removals:
        for slot in removal_.coupling.consumers:
            model.get_submodule(slot.name).weight.data[:, removal_.gone(slot)] = 0
    return model


def assert_equal_outputs(small, model, x):
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(small(x), wanted, rtol=0, atol=1e-13 * float(wanted.abs().max()))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_coupling_of_a_pattern_is_found(pattern):
    model, x, expected = built(pattern)
    assert {c.name: c.channels for c in removal.trace(model, x).couplings} == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_columns_of_zeros_go_without_a_trace(pattern):
    model, x, _ = built(pattern)
    removals = some(removal.trace(model, x))
    model = with_zero_columns(model, removals)
    small = removal.removed(model, removals)
    assert_equal_outputs(small, model, x)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for removal_ in removals:
        for slot in removal_.coupling.consumers:
            layer = small.get_submodule(slot.name)
            layer = layer.layer if isinstance(layer, SelectInputs) else layer
            assert isinstance(layer, type(model.get_submodule(slot.name)))
            assert layer.weight.shape[1] < model.get_submodule(slot.name).weight.shape[1]


def test_the_reduced_network_copies_trains_and_saves(tmp_path):
    model, x, _ = built("depthwise")
    model.train()
    model[0].weight.requires_grad_(False)
    small = removal.removed(model, some(removal.trace(model, x)))
    assert model.training
    assert all(module.training for module in small.modules())
    assert not small[0].layer.weight.requires_grad
    small(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)
    torch.save(small.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(small)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_equal_outputs(again.eval(), small.eval(), x)


def test_constant_channels_fold_into_the_bias_that_is_made():
    model, x, _ = built("batch norm 2d")
    model[0].weight.data[2:] = 0  # dead producers: what batch norm makes of zero, cut by the ReLU
    model[1].bias.data.uniform_(0.5, 1.0)
    model[4].register_parameter("bias", None)
    coupling = next(c for c in removal.trace(model, x).couplings if c.name == "0")
    mean = model[:4](x).mean((0, 2, 3))
    small = removal.removed(model, [Removal(coupling, (0, 1))], {"4": mean})
    assert small[4].bias is not None
    assert_equal_outputs(small, model, x)


def test_means_of_the_unfolded_input_keep_the_mean_of_a_padded_convolution():
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4), nn.Flatten()).double().eval()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    hidden = model[:2](x)
    mean = F.unfold(hidden, 3, padding=1).mean((0, 2))
    coupling = next(c for c in removal.trace(model, x).couplings if c.name == "0")
    small = removal.removed(model, [Removal(coupling, (1, 4))], {"2": mean})
    found, wanted = (m(x).unflatten(1, (4, 25)).mean((0, 2)) for m in (small, model))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_inputs_keep_their_shape_behind_a_selector():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    x = torch.randn(4, 3, 2, 2)
    inputs, _ = removal.trace(model, x).couplings
    assert (inputs.channels, inputs.producers) == (12, ())
    small = removal.removed(model, [Removal(inputs, (0, 3, 7))])
    assert small[1].kept.tolist() == [0, 3, 7]
    torch.testing.assert_close(small[1].layer.weight, model[1].weight[:, [0, 3, 7]])
    assert small(x).shape == (4, 2)


HELD = {
    "an output of the network": (lambda m, x: m.a(x), "output of the network"),
    "softmax": (lambda m, x: m.b(torch.softmax(m.a(x), 1)), "'softmax'"),
    "a fixed view": (lambda m, x: m.b(m.a(x).view(-1, 6, 8, 8)), "'view'"),
    "a slice of channels": (lambda m, x: m.b(torch.cat((m.a(x)[:, :3], m.a(x)[:, 3:]), 1)), "'getitem'"),
    "padded channels": (lambda m, x: m.b(F.pad(m.a(x)[:, :3], (0, 0, 0, 0, 0, 3))), "'getitem'"),
    "a chunk": (lambda m, x: m.b(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), "'chunk'"),
    "grouped convolution": (lambda m, x: m.b(m.grouped(m.a(x))), "'grouped'"),
    "its own input": (lambda m, x: m.b(m.a(x) + x.repeat(1, 2, 1, 1)), "'add'"),
    "the inputs themselves": (lambda m, x: m.b(m.a(x) + m.c(x) * m.scale), "'mul'"),
}


@pytest.mark.parametrize("pattern", HELD)
def test_what_cannot_be_followed_is_named_and_left_whole(pattern):
    forward, node = HELD[pattern]
    model = Net(forward, a=conv(3, 6), b=conv(6, 2), c=conv(3, 6), grouped=conv(6, 6, groups=3))
    model.scale = nn.Parameter(torch.rand(6, 1, 1))
    x = torch.randn(2, 3, 8, 8)
    wiring = removal.trace(model, x)
    assert [c.name for c in wiring.couplings if c.producers] == []
    held = next(item for item in wiring.held if "a" in item.producers)
    assert node in held.reason
    assert held.channels == 6


def test_hooked_ignored_tied_and_subclassed_layers_stay_whole():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    def chain(**modules):
        layers = {"a": conv(3, 6), "b": conv(6, 6), "c": conv(6, 2)} | modules
        return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), **layers)

    x = torch.randn(2, 3, 8, 8)

    def names(model, **kwargs):
        return [c.name for c in removal.trace(model, x, **kwargs).couplings if c.producers]

    assert names(chain()) == ["a", "b"]
    assert names(chain(), ignore="b") == []
    assert names(chain(b=Doubled(6, 6, 3, padding=1))) == []
    hooked = chain()
    hooked.b.register_forward_hook(lambda *_: None)
    assert names(hooked) == []
    tied = chain(d=conv(6, 6))
    tied.d.weight = tied.b.weight
    assert names(tied) == []


def test_branches_on_values_are_followed_where_the_inputs_lead():
    """What decides stays whole, and so does what another branch may read."""

    def branch(m, x):
        y = F.relu(m.b(F.relu(m.a(x))))
        return m.c(y) if m.gate(x).sum() > 0 else m.d(y)

    modules = {"a": conv(3, 5), "b": conv(5, 6), "c": conv(6, 2), "gate": conv(3, 4)}
    wiring = removal.trace(Net(branch, **modules, d=conv(6, 2)), torch.randn(1, 3, 8, 8))
    assert [c.name for c in wiring.couplings if c.producers] == ["a"]
    held = {item.producers[0]: item.reason for item in wiring.held}
    assert "'sum' in the network itself" in held["gate"]
    assert "did not run and may read it where 'bool' in the network itself" in held["b"]


def test_loops_over_samples_are_followed():
    model = Net(
        lambda m, x: torch.stack([m.b(F.relu(m.a(row[None])))[0] for row in x]), a=conv(3, 6), b=conv(6, 2)
    )
    check_exact(model.double().eval(), {"a": 6})


@dataclass
class Outputs:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


@decorated
def with_options(m, x, *, skip=None, scale: float = 1.0, dim=1, **kwargs):
    if x.shape[-1] % 4 != 0:
        raise ValueError("the width must be a multiple of 4")
    y = F.relu(m.a(x)) * scale
    if skip is not None:
        y = y + skip
    for layer in (m.b, m.c):
        y = F.relu(layer(y))
    return Outputs(torch.softmax(m.d(y), dim))


ARGUMENTS = {
    "left out": {},
    "by keyword": {"scale": torch.tensor(2.0)},
    "the last alone": {"dim": -1},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_optional_and_keyword_arguments_are_those_of_the_example_inputs(arguments):
    model = Net(None, a=conv(3, 6), b=conv(6, 5), c=conv(5, 6), d=conv(6, 2))
    model.forward = functools.partial(with_options, model)
    inputs = {"x": torch.randn(2, 3, 8, 8), **ARGUMENTS[arguments]}
    wiring = removal.trace(model, inputs)
    assert [c.name for c in wiring.couplings] == ["inputs of a", "a", "b", "c"]
    inputs["skip"] = torch.randn(2, 6, 8, 8)
    assert [c.name for c in removal.trace(model, inputs).couplings if c.producers] == ["b", "c"]


def check_exact(model, expected, x=None):
    """Compare the couplings with those expected, and the network without half of them with zeros in it."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64) if x is None else x
    wiring = removal.trace(model, x)
    assert {c.name: c.channels for c in wiring.couplings if c.producers} == expected
    removals = some(wiring)
    model = with_zero_columns(model, removals)
    assert_equal_outputs(removal.removed(model, removals), model, x)


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation, and a forward of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(x)


class Frozen(nn.Module):
    """A batch norm of buffers, in plain arithmetic."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "mean", "variance"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.variance.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale)


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, channels, 1, 1))

    def forward(self, x):
        return x * self.gamma


@pytest.mark.parametrize("kind", [NormAct, Frozen, Scale, nn.BatchNorm2d, nn.PReLU])
def test_vectors_with_an_entry_for_each_channel_are_followed(kind):
    model = nn.Sequential(conv(3, 6), kind(6), nn.ReLU(), conv(6, 2))
    check_exact(model.double().eval(), {"0": 6})

    def forward(m, x):
        return m.last(F.relu(m.norm(torch.cat((m.b(x), m.a(x), m.b(x)), 1))))

    model = Net(forward, a=conv(3, 4), b=conv(3, 5), norm=kind(14), last=conv(14, 2))
    check_exact(model.double().eval(), {"a": 4, "b": 5})


def test_vectors_that_are_tied_or_read_elsewhere_hold_their_channels():
    def names(forward=lambda m, x: m.b(m.norm(m.a(x))), **modules):
        layers = {"a": conv(3, 6), "norm": nn.BatchNorm2d(6), "b": conv(6, 2)} | modules
        return [
            c.name for c in removal.trace(Net(forward, **layers).eval(), torch.randn(2, 3, 8, 8)).couplings
        ]

    assert "a" in names()
    assert "a" not in names(lambda m, x: m.b(m.norm(m.a(x))) * m.norm.weight.norm())
    assert "a" not in names(lambda m, x: (m.b(m.norm(m.a(x))), m.norm.running_mean))
    tied = nn.BatchNorm2d(6)
    other = nn.BatchNorm2d(6)
    other.weight = tied.weight
    assert "a" not in names(norm=tied, other=other)


def test_one_norm_on_two_tensors_joins_their_channels():
    model = Net(lambda m, x: m.c(m.norm(m.a(x))) + m.d(m.norm(m.b(x))), a=conv(3, 6), b=conv(3, 6),
                norm=nn.BatchNorm2d(6), c=conv(6, 2), d=conv(6, 2))  # fmt: skip
    check_exact(model.double().eval(), {"a": 6})


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def less_mean(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(1, keepdim=True)


def scripted(m, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return m.b(torch.jit.script(less_mean)(m.a(x)))


def kept(m, x):
    m.features = m.a(x)
    return m.b(m.features)


WHOLE = {  # forwards that a narrower tensor would change, and what the reason must name
    "a scale by the width": (
        lambda m, x: m.b((y := m.a(x)) / y.shape[1] ** 0.5),
        "'pow' in the network itself",
    ),
    "a mean by the count": (lambda m, x: m.b(m.a(x)) * (m.a(x).numel() + 1), "'add' in the network itself"),
    "a check of the width": (
        lambda m, x: m.b(m.a(x)) if m.a(x).shape[1] == 6 else x,
        "'eq' in the network itself",
    ),
    "a mean over channels": (lambda m, x: m.b((y := m.a(x)) - y.mean(1, keepdim=True)), "'mean'"),
    "group norm": (lambda m, x: m.b(F.group_norm(m.a(x), 2)), "'group_norm'"),
    "heads": (lambda m, x: m.b(m.a(x).reshape(2, 2, -1, 8, 8).flatten(1, 2)), "'reshape'"),
    "heads by the width": (
        lambda m, x: m.b((y := m.a(x)).view(2, 2, y.shape[1] // 2, 8, 8).transpose(1, 2).flatten(1, 2)),
        "'floordiv' in the network itself",
    ),
    "the width of another tensor": (lambda m, x: m.b(m.a(x).view(2, m.c(x).shape[1], 8, 8)), "'view'"),
    "a tensor of the width": (lambda m, x: m.b((y := m.a(x)) + torch.ones(y.shape[1], 1, 1)), "'ones'"),
    "scripted code": (scripted, "in the network itself"),
    "a matrix product": (lambda m, x: m.b(torch.einsum("nchw,cd->ndhw", m.a(x), torch.eye(6))), "'einsum'"),
    "an attribute": (kept, "holds on to it"),
    "an array": (lambda m, x: m.b(m.a(x)) * float(m.a(x).numpy().sum()), "'numpy'"),
    "its weight": (lambda m, x: (m.b(m.a(x)), F.conv2d(x, m.a.weight * 2)), "'mul'"),
    "its weight in the same product": (
        lambda m, x: (m.b(m.a(x)), F.conv2d(x[:, :, :3, :3], m.a.weight[:, :, :1, :1])),
        "'getitem'",
    ),
    "the shape of its weight": (
        lambda m, x: m.b(m.a(x)) / len(range(+m.a.weight.shape[0])),
        "'pos' in the network itself",
    ),
}


@pytest.mark.parametrize("pattern", WHOLE)
def test_what_depends_on_the_width_is_named_and_left_whole(pattern):
    forward, node = WHOLE[pattern]
    model = Net(forward, a=conv(3, 6), b=conv(6, 2), c=conv(3, 6)).eval()
    wiring = removal.trace(model, torch.randn(2, 3, 8, 8))
    assert [c.name for c in wiring.couplings if c.producers] == []
    assert node in next(item.reason for item in wiring.held if "a" in item.producers)


def test_functions_with_a_derivative_are_followed_or_held():
    model = Net(lambda m, x: m.b(Doubling.apply(m.a(x))), a=conv(3, 6), b=conv(6, 2)).double().eval()
    wiring = removal.trace(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    check_exact(model, {c.name: c.channels for c in wiring.couplings if c.producers})


def test_sizes_that_code_computes_from_a_width_are_followed():
    def forward(m, x):
        y = m.a(x)
        n, c, h, w = y.shape
        assert y.shape == m.c(y).shape[:1] + y.shape[1:]
        y = y.view(n, c, h * w).transpose(1, 2).reshape(n * h * w, c)
        return m.b(F.gelu(y).view(n, h, w, -1))

    model = Net(forward, a=conv(3, 6), b=nn.Linear(6, 2), c=conv(6, 4))
    check_exact(model.double().eval(), {"a": 6})


def test_gated_layers_share_their_channels():
    model = Net(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(5, 7), up=nn.Linear(5, 7), down=nn.Linear(7, 5),
    )  # fmt: skip
    model, x = model.double().eval(), torch.randn(3, 2, 5, dtype=torch.float64)
    check_exact(model, {"gate": 7}, x)
    (coupling,) = (c for c in removal.trace(model, x).couplings if c.producers)
    assert coupling.producers == ("gate", "up")


def test_widths_do_not_outlive_the_trace():
    """Numbers that a module keeps are gone with it, as whatever a forward leaves behind."""

    def forward(m, x):
        y = m.a(x)
        m.width = y.shape[1]
        return m.b(y)

    model = Net(forward, a=conv(3, 6), b=conv(6, 2))
    removal.trace(model, torch.randn(2, 3, 8, 8))
    assert not hasattr(model, "width")


def test_tracing_leaves_the_model_as_it_was():
    model, x, _ = built("batch norm 2d")
    model.train()
    before = copy.deepcopy(model.state_dict())
    removal.trace(model, x)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_removals_that_do_not_fit_are_refused():
    model, x, _ = built("lenet")
    coupling = next(c for c in removal.trace(model, x).couplings if c.name == "0")
    with pytest.raises(PlanError, match=r"rising channels out of 6, got \[3, 1\]"):
        Removal(coupling, (3, 1))
    with pytest.raises(PlanError, match=r"rising channels out of 6, got \[\]"):
        Removal(coupling, ())
    with pytest.raises(PlanError, match="can be reduced once"):
        removal.removed(model, [Removal(coupling, (1,)), Removal(coupling, (2,))])
    with pytest.raises(PlanError, match="no module of that name"):
        removal.removed(nn.Sequential(), [Removal(coupling, (1,))])
    wider = Coupling(7, ("0",), (), (Slot("2"),))
    with pytest.raises(PlanError, match="'0' must have 7 rows to remove from, got Conv2d with 6"):
        removal.removed(model, [Removal(wider, (1,))])
    with pytest.raises(PlanError, match="means must have it"):
        removal.removed(model, [Removal(coupling, (1,))], {})
    with pytest.raises(PlanError, match=r"must be \[6\] or \[54\], got \[5\]"):
        removal.removed(model, [Removal(coupling, (1,))], {"2": torch.zeros(5)})
