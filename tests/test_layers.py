"""Full rank reproduces the dense layer and each rank is the best, for every way to factor a layer."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lrcompress as lrc
from lrcompress import calibrate, rewrite
from lrcompress.calibrate import cost
from lrcompress.types import LowRank

# What the dense layer says of its own even kernels is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# Strides, paddings, modes, dilations, existing groups, even kernels and no bias among them.
CONV2D = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "dilation": (1, 2), "padding": "valid"},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 12, "out_channels": 24},
    {"kernel_size": 1, "stride": 2},
    *({"kernel_size": 3, "padding": (2, 1), "padding_mode": m} for m in ("circular", "reflect", "replicate")),
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
]
LAYERS = [
    (nn.Linear(12, 10), (5, 12)),
    (nn.Linear(12, 10, bias=False), (2, 3, 12)),
    (nn.Conv1d(12, 8, 3, stride=2, padding=1), (2, 12, 9)),
    (nn.Conv1d(12, 8, 3, groups=4, padding_mode="circular", padding=2), (2, 12, 9)),
    (nn.Conv3d(6, 8, (1, 2, 3), padding=1, dilation=(1, 2, 1)), (2, 6, 4, 5, 6)),
    *((nn.Conv2d(12, kw.pop("out_channels", 8), **kw), (2, 12, 9, 10)) for kw in map(dict, CONV2D)),
]


def ids(case: tuple[nn.Module, tuple[int, ...]]) -> str:
    return str(case[0])


def configs(layer, ranks) -> list[LowRank]:
    divisors = [k for k in range(1, layer.group_channels + 1) if layer.group_channels % k == 0]
    return [LowRank(s, k, r) for s in layer.schemes for k in divisors for r in ranks(layer.full_rank(s, k))]


def factor(module: nn.Module, config: LowRank, x: torch.Tensor) -> nn.Module:
    """Factor a model of one layer through the public calls."""
    model = nn.Sequential(copy.deepcopy(module)).double()
    plan = lrc.plan(model, lrc.Budget(params=1.0), example_inputs=x)
    return lrc.apply(model, plan.edit("0", scheme=config.scheme, groups=config.groups, rank=config.rank))


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_full_rank_reproduces_the_layer(case):
    module, shape = case
    x = torch.randn(shape, dtype=torch.float64)
    expected = copy.deepcopy(module).double()(x)
    for config in configs(rewrite.describe("0", module), lambda full: [full]):
        small = factor(module, config, x)
        torch.testing.assert_close(small(x), expected, rtol=1e-9, atol=1e-9, msg=str(config))
        torch.testing.assert_close(small[0].weight, module.weight.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_factors_multiply_out_to_what_they_compute(case):
    """The merged weight, run as a dense layer, gives the factored layer's outputs at every rank."""
    module, shape = case
    x = torch.randn(shape, dtype=torch.float64)
    for config in configs(rewrite.describe("0", module), lambda full: {1, (full + 1) // 2}):
        small = factor(module, config, x)
        merged = lrc.merge(small)
        assert type(merged[0]) is type(module)
        torch.testing.assert_close(small(x), merged(x), rtol=1e-9, atol=1e-9, msg=str(config))


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_predicted_macs_are_those_that_run(case):
    module, shape = case
    x = torch.randn(shape, dtype=torch.float64)
    plan = lrc.plan(nn.Sequential(module).double(), lrc.Budget(params=1.0), example_inputs=x)
    layer = plan["0"].layer
    for config in configs(layer, lambda full: [1, full]):
        small = factor(module, config, x)
        with FlopCounterMode(display=False) as counter:
            small(x)
        assert layer.option(config).macs == counter.get_total_flops() / 2 / shape[0], config
    assert plan.macs == calibrate.count_macs(module, x)


@pytest.mark.parametrize(
    ("scheme", "groups"), [*itertools.product((0, 1, 2, 3), (1, 2, 3)), (0, 6)], ids=lambda v: str(v)
)
def test_each_group_is_cut_at_its_best_rank(scheme, groups):
    """Eckart and Young hold for each block of input channels, folded by hand."""
    weight = torch.randn(4, 6, 3, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(6, 4, (3, 5), padding=1)).double()
    model[0].weight = nn.Parameter(weight)
    plan = lrc.plan(model, lrc.Budget(params=1.0))
    small = lrc.apply(model, plan.edit("0", scheme=scheme, groups=groups, rank=2))
    error = (small[0].weight - weight).detach()
    for block, missed in zip(weight.chunk(groups, 1), error.chunk(groups, 1), strict=True):
        order = {0: "ocab->o(cab)", 1: "ocab->(oa)(cb)", 2: "ocab->(ob)(ca)", 3: "ocab->(oab)c"}[scheme]
        rows, columns = {
            0: ([0], [1, 2, 3]),
            1: ([0, 2], [1, 3]),
            2: ([0, 3], [1, 2]),
            3: ([0, 2, 3], [1]),
        }[scheme]
        matrix = block.permute(*rows, *columns).reshape(torch.tensor(block.shape)[rows].prod(), -1)
        dropped = torch.linalg.svdvals(matrix)[2:].square().sum()
        torch.testing.assert_close(missed.square().sum(), dropped, msg=order)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2]), st.data())
@settings(max_examples=40)
def test_error_falls_with_rank(outs, channels, kernel, conv_groups, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    module = nn.Conv2d(channels * conv_groups, outs * conv_groups, kernel, groups=conv_groups)
    model = nn.Sequential(module)
    for error in ("released", "bound", "sum_bound", "exact", "frobenius"):
        step = lrc.alds(error, schemes=module_schemes(kernel)).local_step
        table = step((rewrite.describe("0", module),), (model[0].weight.detach(),), {})[0]
        for scheme, groups in {
            (int(s), int(g)) for s, g in zip(table.scheme, table.groups, strict=True) if g
        }:
            mine = (table.scheme == scheme) & (table.groups == groups)
            assert (table.rank[mine][1:] > table.rank[mine][:-1]).all()
            assert (table.error[mine][1:] <= table.error[mine][:-1] + 1e-7).all()


def module_schemes(kernel: int) -> tuple[int, ...]:
    return (0,) if kernel == 1 else (0, 1, 2, 3)


def test_dtypes_devices_and_flags_are_kept():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)).to(dtype)
        model[0].weight.requires_grad_(False)
        model[3].eval()
        small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.8)).edit("0", groups=2, rank=2))
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert not small[0].U.requires_grad
        assert not small[0].V.requires_grad
        assert small[0].bias.requires_grad
        assert small[0].training
        assert not small[3].training


def test_a_layer_trains_and_survives_what_modules_survive():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
    x = torch.randn(3, 4, 6, 6)
    plan = lrc.plan(model, lrc.Budget(params=0.5), example_inputs=x)
    small = lrc.apply(model, plan)
    small(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    torch.testing.assert_close(twin(x), small(x), rtol=0, atol=0)
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))


def test_new_modules_check_their_sizes():
    with pytest.raises(ValueError, match="groups must divide in_features=12, got 5"):
        lrc.nn.LowRankLinear(12, 4, rank=2, groups=5)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lrc.nn.LowRankConv2d(4, 4, 3, rank=0)
    with pytest.raises(ValueError, match="conv_groups=3"):
        lrc.nn.LowRankConv2d(4, 4, 3, rank=1, conv_groups=3)
    fresh = lrc.nn.LowRankConv2d(8, 8, 3, rank=4, groups=2, padding=1)
    assert 0.05 < fresh(torch.randn(4, 8, 10, 10)).std() < 5


def test_macs_of_recurrent_layers():
    """Whole layers in one call of a library, and steps of products."""
    inputs, hidden, steps = 16, 32, 7
    x = torch.randn(3, steps, inputs)
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        model = kind(inputs, hidden, 2, batch_first=True, bidirectional=True)
        first, second = inputs + hidden, 2 * hidden + hidden
        assert calibrate.count_macs(model, x) == 2 * steps * gates * hidden * (first + second)


def test_macs_of_recurrent_layers_on_cuda():
    """The whole stack in one call, by the shapes of what it is given."""
    stack = [[128, 16], [128, 32], [128], [128], [128, 32], [128, 32], [128], [128]]
    flops = cost._RECURRENT[torch.ops.aten._cudnn_rnn]((7, 3, 16), stack, 4, None)
    assert flops == 2 * 7 * 3 * 128 * (16 + 32 + 32 + 32)
