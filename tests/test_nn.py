"""Factored modules where users put modules: autograd, autocast, layouts, compilers, copies, DDP."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import lrcompress as lrc
from lrcompress.ops import _cuda

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
# (factory, input shape)
LAYERS = [
    (lambda **kw: lrc.nn.LowRankLinear(8, 6, 3, **kw), (4, 8)),
    (lambda **kw: lrc.nn.LowRankLinear(8, 6, 2, groups=4, bias=False, **kw), (2, 3, 8)),
    (lambda **kw: lrc.nn.LowRankConv1d(8, 6, 3, 2, groups=2, padding=1, **kw), (2, 8, 7)),
    (lambda **kw: lrc.nn.LowRankConv2d(8, 6, 3, 2, groups=4, padding=1, **kw), (2, 8, 5, 6)),
    (lambda **kw: lrc.nn.LowRankConv2d(8, 6, 3, 2, scheme=2, stride=2, conv_groups=2, **kw), (2, 8, 7, 6)),
    (lambda **kw: lrc.nn.LowRankConv3d(4, 6, 2, 3, groups=2, **kw), (1, 4, 3, 4, 3)),
]
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS, ids=[str(make()) for make, _ in LAYERS])


@every_layer
def test_gradients_of_every_tensor(make, shape):
    for activation in ACTIVATIONS:
        layer = make(activation=activation, dtype=torch.float64)
        names, values = zip(*layer.named_parameters(), strict=True)

        def run(x, *values, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(run, (x, *values))


@every_layer
def test_activations_and_kernels_are_the_same_function(make, shape):
    x = torch.randn(shape)
    for (name, apply), kernel in itertools.product(ACTIVATIONS.items(), ("auto", "fused", "composed")):
        layer = make(activation=name, kernel=kernel)
        plain = make()
        plain.load_state_dict(layer.state_dict())
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                torch.testing.assert_close(layer(x), apply(plain(x)))


@every_layer
@pytest.mark.parametrize("kernel", ["fused", "composed"])
def test_compile_without_a_graph_break(make, shape, kernel):
    torch._dynamo.reset()  # all layers of a kind share one code object, which is compiled only so often
    layer, x = make(kernel=kernel, activation="relu"), torch.randn(shape)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))  # recorded for a backward pass
    compiled(x).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@every_layer
@pytest.mark.parametrize("kernel", ["fused", "composed"])
def test_exported_graphs_hold_library_calls_only(make, shape, kernel):
    layer, x = make(kernel=kernel, activation="gelu").eval(), torch.randn(shape)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(exported.module()(x), layer(x))
    assert "lrcompress" not in exported.graph_module.code


@every_layer
def test_copies_and_state_dicts(make, shape):
    layer, x = make(kernel="composed", activation="silu"), torch.randn(shape)
    twin = copy.deepcopy(layer)
    assert (twin.kernel, twin.activation) == ("composed", "silu")
    assert torch.equal(twin(x), layer(x))
    assert twin.U.data_ptr() != layer.U.data_ptr()
    hollow = make(kernel="composed", activation="silu", device="meta")
    hollow.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(hollow(x), layer(x))
    assert sorted(layer.state_dict()) == sorted(["U", "V", *(["bias"] if layer.bias is not None else [])])


@every_layer
def test_autocast_runs_in_the_narrow_type(make, shape, assert_as_accurate_as_torch):
    layer, x = make(kernel="fused"), torch.randn(shape)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        same = copy.deepcopy(layer).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert_as_accurate_as_torch(found, same, exact)


@pytest.mark.parametrize("kernel", ["fused", "composed"])
def test_channels_last_weights_and_inputs(kernel):
    layer = lrc.nn.LowRankConv2d(8, 6, 3, 2, groups=4, padding=1, kernel=kernel)
    last, x = copy.deepcopy(layer).to(memory_format=torch.channels_last), torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        for each, given in itertools.product((layer, last), (x, x.to(memory_format=torch.channels_last))):
            torch.testing.assert_close(each(given), layer(x))


def test_unknown_choices_are_refused():
    for make, _ in LAYERS:
        with pytest.raises(ValueError, match=r"activation must be one of .*'silu'.*, got 'tanh'"):
            make(activation="tanh")
        with pytest.raises(ValueError, match=r"kernel must be one of .*'composed'.*, got 'merged'"):
            make(kernel="merged")


def test_the_choices_are_printed():
    text = str(lrc.nn.LowRankConv2d(8, 6, 3, 2, activation="relu", kernel="fused"))
    assert text.endswith("bias=True, activation=relu, kernel=fused)")
    assert "kernel=" not in str(lrc.nn.LowRankLinear(8, 6, 2))


def _distributed_step(model):
    parallel = DistributedDataParallel(model)
    optimiser = torch.optim.SGD(parallel.parameters(), lr=0.1)
    loss = F.cross_entropy(parallel(torch.randn(5, 3, 4, 4)), torch.arange(5) % 4)
    loss.backward()
    optimiser.step()


def test_distributed_training_moves_the_factors(tmp_path):
    model = nn.Sequential(
        lrc.nn.LowRankConv2d(3, 8, 3, 2, padding=1),
        nn.Flatten(),
        lrc.nn.LowRankLinear(8 * 16, 4, 3, groups=2),
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        # A function of its own, so that the wrapper dies first: as the group's last owner it would join
        # gloo's threads while it holds the interpreter's lock, which they may be waiting for.
        _distributed_step(model)
    finally:
        dist.destroy_process_group()
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.slow  # compiles C++
@pytest.mark.filterwarnings("ignore")  # of the compiler's own modules
def test_inductor_and_its_ahead_of_time_form(tmp_path):
    layer = lrc.nn.LowRankConv2d(8, 6, 3, 2, groups=4, padding=1, activation="relu").eval()
    model, x = (
        nn.Sequential(layer, nn.Flatten(), lrc.nn.LowRankLinear(6 * 30, 4, 3, groups=2)),
        torch.randn(2, 8, 5, 6),
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
        found = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cuda_kernels_run_where_fused_is_asked_for(monkeypatch, dtype):
    """On tensors that only say they are on a GPU: what the layers would call there."""
    monkeypatch.setattr(_cuda, "_HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for layer in (lrc.nn.LowRankConv2d, lrc.nn.LowRankLinear):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with FakeTensorMode(), torch.no_grad():
        made = {"device": "cuda", "dtype": dtype}
        for kernel in ("auto", "fused", "composed"):
            wanted = kernel == "fused" and dtype != torch.float64
            conv = lrc.nn.LowRankConv2d(64, 32, 3, rank=8, groups=2, kernel=kernel, **made)
            assert conv.runs_fused(torch.empty(2, 64, 8, 8, **made)) == wanted
            linear = lrc.nn.LowRankLinear(64, 32, rank=8, kernel=kernel, **made)
            for rows, has_kernel in ((1, True), (16, True), (17, False), (64, True)):
                assert linear.runs_fused(torch.empty(rows, 64, **made)) == (wanted and has_kernel)
            wide = lrc.nn.LowRankLinear(512, 512, rank=257, kernel=kernel, **made)
            assert not wide.runs_fused(torch.empty(64, 512, **made))
