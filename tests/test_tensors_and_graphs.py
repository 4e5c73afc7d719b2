"""Unusual tensors, forward-mode derivatives, other defaults, and graphs of which no size is known."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.export import Dim, export

import lrcompress as lrc
from lrcompress import ops

DTYPES = (torch.float32, torch.bfloat16)
LINEAR = (lambda **k: lrc.nn.LowRankLinear(64, 48, 8, 2, **k)), (3, 64)
CONV = (lambda **k: lrc.nn.LowRankConv2d(8, 16, 3, 4, 2, padding=1, **k)), (3, 8, 6, 5)
every_layer = pytest.mark.parametrize(("make", "shape"), [LINEAR, CONV], ids=["linear", "conv"])
every_kernel = pytest.mark.parametrize("kernel", ["auto", "fused"])


def negated(tensor):
    """Return an equal tensor whose memory holds the opposite signs."""
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    assert torch.equal(view, tensor)
    return view


def frozen(make, **choices):
    return make(**choices).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@every_layer
def test_negative_bits_change_no_sign(make, shape, dtype):
    layer, x = frozen(make, kernel="fused", dtype=dtype), torch.randn(shape, dtype=dtype)
    call = ops.lowrank_linear if x.ndim == 2 else ops.lowrank_conv2d
    rest = (2,) if x.ndim == 2 else ((1, 1), (1, 1), (1, 1), 2)
    given = [x, layer.U, layer.V, layer.bias]
    expected = call(*given, *rest)
    for i in range(len(given)):
        hostile = [negated(each) if i == j else each for j, each in enumerate(given)]
        assert torch.equal(call(*hostile, *rest), expected)
    plain = copy.deepcopy(layer)
    plain.kernel = "composed"
    torch.testing.assert_close(layer(negated(x)), plain(x))


def test_negative_bits_change_no_sign_of_moments_and_products():
    x = torch.fft.fft(torch.randn(64, 8)).conj().imag
    assert x.is_neg()
    assert torch.equal(ops.autocorrelation(x).sums, ops.autocorrelation(x.clone()).sums)
    exact = x.double()
    R, W = exact.T @ exact, torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(ops.gram([negated(R)[None]])[0].tril(), ops.gram([R[None]])[0].tril())
    problems = torch.tensor([[0, 8, 8]])
    solved = ops.symmetric_eigenvalues(R.flatten(), problems)
    assert torch.equal(ops.symmetric_eigenvalues(negated(R.flatten()), negated(problems)), solved)
    assert torch.equal(ops.singular_values([negated(W)], [1])[0][1], ops.singular_values([W], [1])[0][1])
    expected = ops.group_lasso(R, W, 0.5, initial=W)
    found = ops.group_lasso(negated(R), negated(W), 0.5, initial=negated(W))
    assert torch.equal(found.solution, expected.solution)
    assert found.converged
    for place in (negated(torch.zeros(64, dtype=torch.float64)), torch.zeros(64, device="meta")):
        with pytest.raises(ValueError, match="out must be"):
            ops.gram([R[None]], out=place)
    into = ops.Autocorrelation(negated(torch.zeros(1, 8, 8).double()), torch.zeros(1, 8).double(), 0)
    with pytest.raises(ValueError, match=r"into\.products must be dense .* negated view"):
        ops.autocorrelation(x, into=into)


HOSTILE = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_holds_no_dense_values_is_refused(kind):
    x = HOSTILE[kind](torch.randn(4, 4))
    calls = [
        lambda: ops.autocorrelation(x),
        lambda: ops.singular_values([x], [1]),
        lambda: ops.truncated_svd([x], [1]),
        lambda: ops.nuclear_norm(x, torch.eye(4), 0.1) if kind != "meta" else ops.autocorrelation(x),
    ]
    if kind != "meta":  # of which torch's operators have shapes
        calls.append(lambda: ops.lowrank_linear(x, torch.randn(3, 2), torch.randn(2, 4)))
        calls.append(lambda: ops.lowrank_linear(torch.randn(4, 4), torch.randn(3, 4), x))
    for call in calls:
        with pytest.raises(ValueError, match="must be dense"):
            call()


def test_transforms_do_not_hand_their_wrappers_to_kernels():
    with pytest.raises(ValueError, match=r"transform of torch\.func"):
        torch.func.vmap(lambda x: ops.autocorrelation(x).sums)(torch.randn(3, 4, 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in what torch loads for them
@every_kernel
@every_layer
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_forward_mode_derivatives(make, shape, kernel, activation):
    layer = frozen(make, kernel=kernel, activation=activation, dtype=torch.float32)
    plain = copy.deepcopy(layer)
    plain.kernel = "composed"
    x, t = torch.randn(shape), torch.randn(shape)
    expected, wanted = torch.func.jvp(plain, (x,), (t,))
    value, tangent = torch.func.jvp(layer, (x,), (t,))
    assert wanted.norm() > 0
    torch.testing.assert_close((value, tangent), (expected, wanted))
    with torch.no_grad(), forward_ad.dual_level():
        unpacked = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t)))
        torch.testing.assert_close(unpacked.tangent, wanted)
    reverse = torch.func.jacrev(lambda z: layer(z).sin().sum())
    forward = torch.func.jacfwd(lambda z: layer(z).sin().sum())
    torch.testing.assert_close(forward(x), reverse(x))
    product = torch.func.jvp(reverse, (x,), (t,))[1]
    vector = torch.autograd.functional.vhp(lambda z: plain(z).sin().sum(), x, t)[1]
    torch.testing.assert_close(product, vector)
    batched = torch.func.vmap(layer)(torch.stack([x, t]))
    torch.testing.assert_close(batched, torch.stack([plain(x), plain(t)]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in what torch loads for them
def test_forward_mode_derivatives_of_the_operators():
    x, U, V, bias = torch.randn(3, 8), torch.randn(6, 4), torch.randn(4, 8), torch.randn(6)
    given = x, U, V, bias
    tangents = tuple(map(torch.randn_like, given))
    found = torch.func.jvp(ops.lowrank_linear, given, tangents)
    expected = torch.func.jvp(lambda x, U, V, b: x @ V.T @ U.T + b, given, tangents)
    torch.testing.assert_close(found, expected)
    given = torch.randn(2, 3, 5, 5), torch.randn(6, 4, 1, 1), torch.randn(4, 3, 3, 3), bias
    tangents = tuple(map(torch.randn_like, given))
    found = torch.func.jvp(ops.lowrank_conv2d, given, tangents)
    convolve = nn.functional.conv2d
    expected = torch.func.jvp(lambda x, U, V, b: convolve(convolve(x, V), U, b), given, tangents)
    torch.testing.assert_close(found, expected)


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@every_kernel
@every_layer
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_default_dtype(make, shape, dtype, kernel, default_dtype):
    layer, x = frozen(make, kernel=kernel, dtype=dtype), torch.randn(shape, dtype=dtype)
    found = layer(x)
    torch.set_default_dtype(torch.float32)
    assert found.dtype == dtype
    assert torch.equal(found, layer(x))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device(device):
    x = torch.randn(3, 64)
    layers = [frozen(LINEAR[0], kernel="fused"), frozen(CONV[0], kernel="fused")]
    given = [torch.randn(shape) for _, shape in (LINEAR, CONV)]
    expected = [layer(each) for layer, each in zip(layers, given, strict=True)]
    values, moments = ops.singular_values([x], [1, 2])[0], ops.autocorrelation(x)
    torch.set_default_device(device)
    try:
        found = [layer(each) for layer, each in zip(layers, given, strict=True)]
        same, again = ops.singular_values([x], [1, 2])[0], ops.autocorrelation(x)
    finally:
        torch.set_default_device(None)
    for mine, other in zip(
        [*found, *same.values(), *again[:2]], [*expected, *values.values(), *moments[:2]], strict=True
    ):
        assert torch.equal(mine, other)


def test_autocast_leaves_the_operators_dtype():
    x, U, V = torch.randn(500, 64), torch.randn(48, 8), torch.randn(8, 64)
    expected = ops.lowrank_linear(x, U, V)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.lowrank_linear(x, U, V), expected)


def sizes_of(layer, shape, dtype):
    for batch in (1, 2, 5, 64, 300):
        x = torch.randn(batch, *shape[1:], dtype=dtype)
        yield x, layer(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [Dim.AUTO, Dim.DYNAMIC, Dim("batch", min=1, max=512)], ids=str)
@every_kernel
@every_layer
def test_exported_programs_take_every_batch(make, shape, kernel, dim, dtype):
    layer = frozen(make, kernel=kernel, dtype=dtype)
    for batch in (4, 200):
        x = torch.randn(batch, *shape[1:], dtype=dtype)
        program = export(layer, (x,), dynamic_shapes=({0: dim},)).module()
        for other, expected in sizes_of(layer, shape, dtype):
            torch.testing.assert_close(program(other), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [None, True])
@every_kernel
@every_layer
def test_compiled_models_have_two_graphs_at_most(make, shape, kernel, dynamic, dtype):
    layers = [frozen(make, kernel=kernel, dtype=dtype) for _ in range(3)]
    model = lambda x: [layer(x) for layer in layers]  # noqa: E731
    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(model, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3, 5, 8, 9, 16, 64, 129, 300):
        x = torch.randn(batch, *shape[1:], dtype=dtype)
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    assert counters["stats"]["unique_graphs"] <= 2
