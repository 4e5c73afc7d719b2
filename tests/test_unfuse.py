"""What unfuse returns: ordinary modules, the same function, and exporters that take them."""

import copy
import io

import pytest
import torch
from test_layers import LAYERS, configs, factor, ids
from torch import nn

import lrcompress as lrc
from lrcompress import rewrite

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

ORDINARY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.GELU, nn.SiLU)


class Net(nn.Module):
    """Factored layers of three kinds, an activation in one of them, and a shared one."""

    def __init__(self, **chosen) -> None:
        super().__init__()
        self.conv = lrc.nn.LowRankConv2d(4, 6, 3, 3, groups=2, padding=1, activation="silu", **chosen)
        self.same = lrc.nn.LowRankConv2d(6, 6, 3, 4, scheme=1, padding="same", dilation=2)
        self.again = self.same
        self.fc = lrc.nn.LowRankLinear(6, 24, 2, groups=2, activation="gelu")

    def forward(self, x):
        return self.fc(self.again(self.same(self.conv(x))).mean((2, 3)))


def assert_ordinary(model: nn.Module) -> None:
    for module in model.modules():
        assert not type(module).__module__.startswith("lrcompress") or type(module) is lrc.nn.LayersInRow
        if not list(module.children()):
            assert isinstance(module, ORDINARY)


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_every_factored_layer_is_the_same_function(case):
    module, shape = case
    x = torch.randn(shape, dtype=torch.float64)
    layer = rewrite.describe("", module)
    for config in configs(layer, lambda full: sorted({1, (full + 1) // 2})):
        small = factor(module, config, x)
        plain = lrc.unfuse(small)
        assert_ordinary(plain)
        expected = small(x)
        bound = 1e-13 * float(expected.detach().abs().max() + 1)  # float64, sums in another order
        torch.testing.assert_close(plain(x), expected, rtol=0, atol=bound)


def test_grouped_linear_becomes_the_smaller_of_two_forms():
    wide = lrc.unfuse(nn.Sequential(lrc.nn.LowRankLinear(32, 32, 2, groups=4)))[0]
    assert isinstance(wide, nn.Sequential)
    assert [tuple(part.weight.shape) for part in wide] == [(8, 32), (32, 8)]
    assert int((wide[0].weight != 0).sum()) == 8 * 8  # a block for each group
    full = lrc.unfuse(nn.Sequential(lrc.nn.LowRankLinear(32, 32, 4, groups=4)))[0]
    assert isinstance(full, nn.Linear)


def test_mode_gradients_dtype_and_sharing_stay():
    model = Net().eval().to(torch.bfloat16)
    model.conv.requires_grad_(False)
    model.fc.train()
    plain = lrc.unfuse(model)
    assert plain.same is plain.again
    assert not plain.training
    assert all(part.training for part in plain.fc)
    assert [p.requires_grad for p in plain.conv.parameters()] == [False] * 3
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert plain.conv[0].weight.data_ptr() != model.conv.V.data_ptr()


@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_the_row_has_the_attributes_of_the_layer_that_it_replaces(case):
    module, shape = case
    names = {name for name in type(module).__constants__ if name != "output_padding"}
    names |= {"weight", "bias"} - names if hasattr(module, "bias") else {"weight"}
    layer = rewrite.describe("", module)
    for config in configs(layer, lambda full: [1]):
        small = factor(module, config, torch.randn(shape, dtype=torch.float64))
        plain = lrc.unfuse(small)[0]
        found = {name: getattr(plain, name) for name in names}
        weight, bias = found.pop("weight"), found.pop("bias")
        assert found == {name: getattr(module, name) for name in found}
        torch.testing.assert_close(weight + 0, lrc.merge(small)[0].weight, rtol=1e-12, atol=1e-12)
        assert (bias is None) == (module.bias is None)
        assert weight.dtype == torch.float64


def test_code_around_a_row_reads_and_writes_it():
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()  # looks at linear1.weight
    plan = lrc.plan(encoder, lrc.Budget(params=0.7), lrc.svd())
    plain = lrc.unfuse(lrc.apply(encoder, plan))
    with torch.no_grad():
        assert plain(torch.randn(2, 7, 32)).shape == (2, 7, 32)
    model, x = Net().eval().double(), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    plain, bias = lrc.unfuse(model).same, model.same.bias
    with torch.no_grad():
        plain.weight.mul_(2)
    plain.bias = nn.Parameter(bias.detach() + 1)
    torch.testing.assert_close(plain(x), 2 * model.same(x) - bias.view(-1, 1, 1) + 1)
    assert type(plain[:1]) is nn.Sequential
    assert copy.deepcopy(plain)[1].weight is not plain[1].weight
    assert set(plain.state_dict()) == {"0.weight", "1.weight", "1.bias"}


def test_a_merged_layer_with_its_activation_has_its_attributes():
    merged, fc = lrc.merge(Net()).conv, lrc.merge(Net()).fc
    assert (merged.stride, merged.kernel_size, merged.groups) == ((1, 1), (3, 3), 1)
    assert merged.weight is merged[0].weight
    assert fc.out_features == 24
    fc.weight, fc.bias = nn.Parameter(torch.zeros(24, 6)), None
    assert not fc(torch.ones(6)).any()


class Reads(nn.Module):
    """Asks for attributes of its parts, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x):
        size = [n // s for n, s in zip(x.shape[2:], self.net.conv.stride, strict=True)]
        return self.net(x.to(self.net.fc.weight.dtype)) * self.net.same.weight.sum() + size[0]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_graph_of_code_that_reads_attributes_is_right():
    plain, x = lrc.unfuse(Reads().eval()), torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(torch.export.export(plain, (x,)).module()(x), plain(x))
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    for made in (compiled, torch.jit.trace(plain, (x,))):
        torch.testing.assert_close(made(x), plain(x))


def test_merge_takes_names_and_keeps_activations():
    model, x = Net().double(), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    merged = lrc.merge(model, ["conv"])
    assert [type(part) for part in merged.conv] == [nn.Conv2d, nn.SiLU]
    assert rewrite.is_factored(merged.fc)
    for other in (merged, lrc.merge(model)):
        torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(lrc.PlanError, match="'head' must be a factored layer; the model has"):
        lrc.merge(model, ["head"])


def test_torch_export_and_jit_take_both_forms():
    model, x = Net().eval(), torch.randn(2, 4, 9, 8)
    for form in (model, lrc.unfuse(model)):
        expected = form(x)
        exported = torch.export.export(form, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        assert "lrcompress" not in exported.graph_module.code
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(x[:1]), expected[:1])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_jit_takes_the_plain_form():
    plain, x = lrc.unfuse(Net().eval()), torch.randn(2, 4, 9, 8)
    for made in (torch.jit.trace(plain, (x,)), torch.jit.script(plain.conv)):
        file = io.BytesIO()
        torch.jit.save(made, file)
        file.seek(0)
        again = torch.jit.load(file)
        torch.testing.assert_close(again(x), plain(x) if made.original_name == "Net" else plain.conv(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # in the exporter
@pytest.mark.parametrize("unfused", [True, False])
def test_onnx_runtime_computes_the_same(unfused, tmp_path):
    """Also straight from the factored modules: exported graphs hold library calls only."""
    onnx = pytest.importorskip("onnx", reason="pip install .[export] exports to ONNX")
    pytest.importorskip("onnxscript", reason="pip install .[export] exports to ONNX")
    model, x = Net().eval(), torch.randn(2, 4, 9, 8)
    form = lrc.unfuse(copy.deepcopy(model)) if unfused else model
    program = torch.onnx.export(form, (x,), dynamo=True, verbose=False)
    program.save(str(tmp_path / "net.onnx"))
    onnx.checker.check_model(str(tmp_path / "net.onnx"))
    assert {node.domain for node in onnx.load(tmp_path / "net.onnx").graph.node} == {""}
    runtime = pytest.importorskip("onnxruntime", reason="pip install .[export] runs the exported graph")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
