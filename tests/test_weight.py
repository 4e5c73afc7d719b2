"""What ``weight`` of a factored layer means to code that reads it, multiplies with it, or writes to it."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import lrcompress as lrc
from lrcompress.nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear

LAYERS = {
    "linear": lambda: LowRankLinear(12, 8, 3),
    "grouped linear": lambda: LowRankLinear(12, 8, 2, groups=3),
    "conv1d": lambda: LowRankConv1d(8, 6, 3, 2, padding=1),
    **{
        f"conv2d of scheme {scheme}": lambda scheme=scheme: LowRankConv2d(
            16, 6, (3, 5), 2, groups=2, scheme=scheme, conv_groups=2, stride=(2, 1), padding=(1, 2)
        )
        for scheme in range(4)
    },
    "conv3d": lambda: LowRankConv3d(4, 6, 3, 2, padding="same"),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[request.param]().eval()


def functional(layer: nn.Module) -> Callable[..., torch.Tensor]:
    """Return what the layer computes, of inputs, weight and bias."""
    if isinstance(layer, LowRankLinear):
        return F.linear
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[layer.weight.ndim]
    geometry = (layer.stride, layer.padding, layer.dilation, layer.conv_groups)
    return lambda x, weight, bias=None: convolve(x, weight, bias, *geometry)


def inputs(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, LowRankLinear):
        return torch.randn(5, layer.in_features)
    return torch.randn(2, layer.in_channels, *[7] * (layer.weight.ndim - 2))


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_metadata_cost_nothing(layer: nn.Module) -> None:
    shape = layer.multiplied_out().shape

    def ask() -> None:
        weight = layer.weight
        assert weight.dtype == torch.float32
        assert weight.device == layer.U.device
        assert weight.shape == weight.size() == shape
        assert (weight.ndim, weight.numel(), len(weight)) == (
            weight.dim(),
            weight.nelement(),
            weight.shape[0],
        )
        assert weight.is_floating_point()
        assert weight.requires_grad
        assert not weight.is_cuda
        assert inputs(layer).double().to(weight).dtype == torch.float32
        assert inputs(layer).double().type_as(weight).dtype == torch.float32
        assert weight.new_zeros(3).dtype == torch.float32

    assert flops(ask) == 0
    assert layer.to(torch.float64).weight.dtype == torch.float64
    assert layer.to("meta").weight.device.type == "meta"


def test_functions_of_the_weight_run_the_factors(layer: nn.Module) -> None:
    x, apply = inputs(layer), functional(layer)
    dense = layer.multiplied_out().detach()
    torch.testing.assert_close(apply(x, layer.weight, layer.bias), apply(x, dense, layer.bias))
    torch.testing.assert_close(apply(x, layer.weight), apply(x, dense))
    composed = copy.deepcopy(layer)
    composed.kernel = "composed"
    assert flops(lambda: apply(x, layer.weight)) == flops(lambda: composed(x))


def test_other_arithmetic_has_the_right_values(layer: nn.Module) -> None:
    dense, weight = layer.multiplied_out().detach(), layer.weight
    torch.testing.assert_close(weight.flatten(1).T @ weight.flatten(1), dense.flatten(1).T @ dense.flatten(1))
    torch.testing.assert_close(torch.cat([weight, weight]), torch.cat([dense, dense]))
    torch.testing.assert_close(weight.norm(), dense.norm())
    torch.testing.assert_close(
        torch.linalg.svdvals(weight.flatten(1)), torch.linalg.svdvals(dense.flatten(1))
    )
    torch.testing.assert_close(weight[1:, 0].clone(), dense[1:, 0])
    assert weight.detach().numpy() == pytest.approx(dense.numpy())
    assert type(2 * weight) is type(weight.clone()) is torch.Tensor
    assert "FactoredWeight" in repr(weight)


def test_gradients_reach_the_factors(layer: nn.Module) -> None:
    x, apply = inputs(layer), functional(layer)
    apply(x, layer.weight).square().sum().backward()
    found = [factor.grad.clone() for factor in layer.factors()]
    layer.zero_grad()
    apply(x, layer.multiplied_out()).square().sum().backward()
    for grad, factor in zip(found, layer.factors(), strict=True):
        torch.testing.assert_close(grad, factor.grad, atol=1e-4, rtol=1e-4)
    layer.zero_grad()
    layer.weight.square().sum().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in layer.factors())
    assert not layer.weight.detach().requires_grad


def test_writes_that_the_factors_can_hold_have_their_effect(layer: nn.Module) -> None:
    x, dense, apply = inputs(layer), layer.multiplied_out().detach(), functional(layer)
    scale = torch.linspace(0.5, 2, len(dense)).reshape(-1, *[1] * (dense.ndim - 1))

    def holds(expected: torch.Tensor) -> None:
        torch.testing.assert_close(layer.multiplied_out(), expected)
        torch.testing.assert_close(layer(x), apply(x, expected, layer.bias))

    with torch.no_grad():
        layer(x)
        layer.weight.mul_(3)
        holds(3 * dense)
        layer.weight *= scale
        holds(3 * dense * scale)
    layer.weight.data /= 3
    holds(dense * scale)
    layer.weight.data = dense
    holds(dense)
    layer.weight = nn.Parameter(dense * scale, requires_grad=False)
    holds(dense * scale)
    assert not any(factor.requires_grad for factor in layer.factors())
    layer.weight.data.copy_(dense)
    holds(dense)
    layer.weight.requires_grad = True
    assert all(factor.requires_grad for factor in layer.factors())
    nn.init.zeros_(layer.weight)
    holds(torch.zeros_like(dense))


WRITES = {
    "added": lambda w: w.data.add_(10.0 * torch.randn(w.shape)),
    "added in place": lambda w: w.data.__iadd__(torch.randn(w.shape)),
    "initialised": lambda w: nn.init.kaiming_uniform_(w),
    "drawn": lambda w: w.data.normal_(),
    "an entry": lambda w: w.data.__setitem__(0, 1.0),
    "a view": lambda w: w.data.view(-1).mul_(2),
    "a row": lambda w: w[0].data.zero_(),
    "its transpose": lambda w: w.detach().flatten(1).T.mul_(2),
    "out": lambda w: torch.add(torch.ones(w.shape), 1, out=w.detach()),
    "many": lambda w: torch._foreach_mul_([w.detach()], 2.0),
    "with gradients": lambda w: w.mul_(2),
    "copied": lambda w: w.detach().copy_(torch.randn(w.shape)),
    "assigned data": lambda w: setattr(w, "data", torch.randn(w.shape)),
    "assigned shape": lambda w: setattr(w, "data", torch.randn(1)),
    "below Python": lambda w: torch.ops.aten.add_(w.detach(), torch.randn(w.shape)),
}


@pytest.mark.parametrize("write", WRITES)
def test_other_writes_are_refused(layer: nn.Module, write: str) -> None:
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(lrc.WeightError, match="weight"):
        WRITES[write](layer.weight)
    with pytest.raises(lrc.WeightError, match=type(layer).__name__):
        layer.weight = nn.Parameter(torch.randn(layer.weight.shape))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_copies_are_dense(layer: nn.Module) -> None:
    dense = layer.multiplied_out().detach()
    for made in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight)), layer.weight.clone()):
        assert type(made) is torch.Tensor
        torch.testing.assert_close(made.detach(), dense)
    other = torch.empty_like(dense)
    other.copy_(layer.weight.detach())
    torch.testing.assert_close(other, dense)
    twin = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(twin.weight.clone(), layer.weight.clone())
    assert list(layer.state_dict()) == ["U", "V", "bias"]
    assert [name for name, _ in layer.named_parameters()] == ["U", "V", "bias"]


def test_functional_call_changes_the_weight(layer: nn.Module) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional(self.layer)(x, self.layer.weight)

    x, model = inputs(layer), Reads()
    y = torch.func.functional_call(model, {"layer.U": 2 * layer.U}, x)
    torch.testing.assert_close(y, 2 * model(x))


class Cast(nn.Module):
    """Asks for the type of the weight, as patch embeddings do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.parametrize("reads", [Cast, None])
def test_graphs(layer: nn.Module, reads: type[nn.Module] | None) -> None:
    x, model = inputs(layer), layer if reads is None else reads(layer)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    if reads is None:
        torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), expected)


def test_exported_graphs_do_not_multiply_the_factors_out() -> None:
    model, x = Cast(LowRankLinear(64, 64, 4)).eval(), torch.randn(1, 64)
    exported = torch.export.export(model, (x,)).module()
    assert flops(lambda: exported(x)) == 2 * 64 * 4 * 2


def test_budget_is_kept_by_a_model_that_reads_types() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(Cast(nn.Linear(64, 64)), nn.ReLU(), Cast(nn.Linear(64, 64))).eval(),
        torch.randn(1, 64),
    )
    plan = lrc.plan(model, lrc.Budget(macs=0.5), example_inputs=x)
    assert lrc.verify(model, lrc.apply(model, plan), x).macs_after == plan.macs_after <= plan.macs / 2


def test_verify_counts_what_runs() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + x @ self.a.weight.T

    model, x = Reads().eval(), torch.randn(1, 32)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.5), lrc.svd()))
    assert lrc.verify(model, small, x).macs_after > small.a.U.numel() + small.a.V.numel() + 32 * 32


@pytest.mark.parametrize("norm_first", [True, False])
def test_fast_path_of_encoder_layers_runs_the_factors(norm_first: bool) -> None:
    torch.manual_seed(0)
    part = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    model, x = nn.TransformerEncoder(part, 2, enable_nested_tensor=False).eval(), torch.randn(2, 7, 32)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.8), lrc.svd()))
    calls = []
    for module in small.modules():
        if isinstance(module, LowRankLinear):
            module.register_forward_hook(lambda *_: calls.append(1))
    expected = small(x)
    assert len(calls) == 4
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected)
    assert len(calls) == 8


def test_torch_fuses_batch_norms_into_factors() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.uniform_(0.5, 2)
    for name in LAYERS:
        if "conv2d" in name:
            layer = LAYERS[name]().eval()
            x = inputs(layer)
            torch.testing.assert_close(fuse_conv_bn_eval(layer, norm.eval())(x), norm(layer(x)))
    layer, norm = LowRankLinear(12, 6, 3).eval(), nn.BatchNorm1d(6).eval()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 12)
    torch.testing.assert_close(fuse_linear_bn_eval(layer, norm)(x), norm(layer(x)))


def test_a_selection_of_inputs_has_the_attributes_of_its_layer() -> None:
    layer = lrc.nn.SelectInputs(nn.Conv2d(2, 6, 3, stride=2), [0, 3])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    for each in (layer, twin):
        assert each.weight is each.layer.weight
        assert (each.stride, each.out_channels, each.bias.shape) == ((2, 2), 6, (6,))
        assert Cast(each)(torch.randn(1, 4, 8, 8).double()).dtype == torch.float32
        with pytest.raises(AttributeError, match="nothing"):
            _ = each.nothing
