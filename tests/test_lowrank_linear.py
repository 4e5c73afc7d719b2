"""The factored linear layer: as accurate as torch's two products, differentiable, traceable, strict."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import lrcompress as lrc
from lrcompress import _C, ops
from lrcompress.ops import _processor, reference
from lrcompress.ops._activations import ACTIVATIONS
from lrcompress.ops.lowrank_linear import kernel_pays

TORCHS = {"none": torch.clone, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
# rows, features, filters, groups, rank: 1, primes, and sizes around the lines of a task (24), the floats of a
# vector (8) and the rows of a block (4); the last is no kernel's in float32.
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 37, 24, 1, 25),
    (2, 32, 23, 4, 7),
    (3, 30, 25, 3, 8),
    (4, 64, 49, 1, 24),
    (5, 17, 8, 1, 23),
    (7, 18, 7, 2, 300),
    (130, 24, 9, 3, 2),
]


def make(size, dtype=torch.float32):
    rows, features, filters, groups, rank = size
    x, U = torch.randn(rows, features, dtype=dtype), torch.randn(filters, groups * rank, dtype=dtype)
    return (
        x,
        U,
        torch.randn(groups * rank, features // groups, dtype=dtype),
        torch.randn(filters, dtype=dtype),
    )


def compose(x, U, V, bias, groups, activation="none"):
    z = torch.cat([F.linear(a, v) for a, v in zip(x.chunk(groups, -1), V.chunk(groups), strict=True)], -1)
    return TORCHS[activation](F.linear(z, U, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_accurate_as_two_products(size, dtype, activation, assert_as_accurate_as_torch):
    x, U, V, bias = make(size, dtype)
    for b in (bias, None):
        exact = reference.lowrank_linear(x, U, V, b, size[3], activation)
        same = compose(x, U, V, b, size[3], activation)
        found = ops.lowrank_linear(x, U, V, b, size[3], activation)
        assert found.dtype == dtype
        assert_as_accurate_as_torch(found, same, exact)


def on_a_processor(monkeypatch, avx512, bfloat16):
    monkeypatch.setattr(sys.modules["lrcompress.ops.lowrank_linear"], "_HAS_AVX512", avx512)
    monkeypatch.setattr(_processor, "NATIVE_BFLOAT16", bfloat16)


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_few_rows_run_in_the_kernel_and_many_do_not(monkeypatch, avx512, bfloat16):
    on_a_processor(monkeypatch, avx512, bfloat16)
    x = torch.empty(1)
    assert not kernel_pays(x.to("meta"), 64, 1)
    assert not kernel_pays(x.double(), 64, 1)
    for inner, rows in ((511, 8), (512, 16), (1023, 16), (1024, 32)):
        for dtype, most in ((torch.float32, 8 if avx512 else rows), (torch.bfloat16, 4 if bfloat16 else 128)):
            assert kernel_pays(x.to(dtype), inner, most)
            assert not kernel_pays(x.to(dtype), inner, most + 1)


def test_many_rows_take_the_kernel_for_amx_where_it_is_asked_for(monkeypatch, assert_as_accurate_as_torch):
    def runs(rows, dtype, kernel):
        layer = lrc.nn.LowRankLinear(64, 32, 16, dtype=dtype, kernel=kernel).requires_grad_(False)
        return layer.runs_fused(torch.empty(rows, 64, dtype=dtype))

    given = make((130, 64, 33, 2, 16), torch.bfloat16)
    for amx in (False, True):
        monkeypatch.setattr(_C, "linear_takes_many_rows", lambda rows, *_, amx=amx: amx and rows >= 64)
        assert runs(130, torch.bfloat16, "fused") == amx
        assert not runs(130, torch.float32, "fused")
        assert not runs(130, torch.bfloat16, "auto")
        x, U, V, bias = given
        exact = reference.lowrank_linear(x, U, V, bias, 2)
        same = compose(x, U, V, bias, 2)
        assert_as_accurate_as_torch(ops.lowrank_linear(x, U, V, bias, 2), same, exact)


def test_few_features_take_no_kernel_for_amx():
    # One term of 32 and one rank of 16 leave tiles empty, on any processor.
    assert not _C.linear_takes_many_rows(1 << 20, 1, 1)
    assert not _C.linear_takes_many_rows(8, 64, 1024)


def test_the_smallest_products_run_as_two_calls_unless_asked_for(monkeypatch):
    on_a_processor(monkeypatch, avx512=False, bfloat16=False)
    for dtype, rank, rows in ((torch.float32, 128, 9), (torch.float32, 256, 2), (torch.bfloat16, 128, 2)):
        for kernel, least in (("auto", rows), ("fused", 1), ("composed", 9)):
            layer = lrc.nn.LowRankLinear(1024, 1024, rank, dtype=dtype, kernel=kernel).requires_grad_(False)
            ran = [n for n in range(1, 9) if layer.runs_fused(torch.empty(n, 1024, dtype=dtype))]
            assert ran == list(range(least, 9))


def test_empty_sizes_and_leading_axes():
    x, U, V, bias = make((6, 12, 5, 3, 2))
    expected = ops.lowrank_linear(x, U, V, bias, 3)
    assert torch.equal(ops.lowrank_linear(x.view(2, 1, 3, 12), U, V, bias, 3), expected.view(2, 1, 3, 5))
    assert torch.equal(ops.lowrank_linear(x[0], U, V, bias, 3), ops.lowrank_linear(x[:1], U, V, bias, 3)[0])
    assert torch.equal(ops.lowrank_linear(x.T.contiguous().T, U, V, bias, 3), expected)
    assert ops.lowrank_linear(x[:0], U, V, bias, 3).shape == (0, 5)
    assert ops.lowrank_linear(x, U[:0], V, None, 3).shape == (6, 0)
    for features, groups, rank in ((0, 1, 2), (12, 3, 0)):
        x, U, V, _ = make((2, features, 5, groups, rank))
        assert torch.equal(ops.lowrank_linear(x, U, V, bias, groups), bias.expand(2, 5))


def test_bits_do_not_depend_on_the_threads():
    x, U, V, bias = make((5, 64, 130, 2, 60))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.lowrank_linear(x, U, V, bias, 2, "silu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    tensors = [t.requires_grad_() for t in make((3, 6, 4, 2, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *leaves: ops.lowrank_linear(*leaves, 2, activation), tensors)


def test_torch_accepts_the_registration():
    leaves = [t.requires_grad_() for t in make((3, 6, 4, 2, 2))]
    for with_bias, grads in itertools.product((True, False), (True, False)):
        tensors = [t if grads else t.detach() for t in leaves]
        args = (*tensors[:3], tensors[3] if with_bias else None, 2, "gelu")
        torch.library.opcheck(torch.ops.lrcompress.lowrank_linear.default, args)


def test_flops_and_vmap_are_those_of_the_composition():
    x, U, V, bias = make((3, 6, 4, 2, 2))
    counts = []
    for f in (ops.lowrank_linear, compose):
        with FlopCounterMode(display=False) as counter:
            f(x, U, V, bias, 2)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    expected = compose(x, -U, V, bias, 2)
    found = torch.vmap(lambda u: ops.lowrank_linear(x, u, V, bias, 2))(torch.stack([U, -U]))
    torch.testing.assert_close(found[1], expected)
    found = torch.vmap(lambda a: ops.lowrank_linear(a, -U, V, bias, 2), in_dims=1, out_dims=1)(x[:, None])
    torch.testing.assert_close(found[:, 0], expected)


def test_bad_arguments_say_what_was_given():
    x, U, V, bias = make((3, 6, 4, 2, 2))
    good = {"x": x, "U": U, "V": V, "bias": bias, "groups": 2}
    for bad, message in [
        ({"x": x.long()}, r"x must be \[..., in\] of a floating type, got torch.int64"),
        ({"x": x.double()}, "U must be torch.float64 on cpu, as x is, got torch.float32 on cpu"),
        ({"V": V.to("meta")}, "V must be torch.float32 on cpu, .* on meta"),
        ({"V": V[0]}, r"V must have 2 dimensions, got shape \(3,\)"),
        ({"x": x[:, :5]}, r"V must be \[2 rank, features 5 / 2\] .* got \(4, 3\)"),
        ({"groups": 0}, "groups=0"),
        ({"U": U[:, :3]}, r"U must be \[out, 4\] .* got \(4, 3\)"),
        ({"bias": bias[:3]}, r"bias must be \[4\], as U has rows, got \(3,\)"),
        ({"activation": "tanh"}, "one of none, relu, gelu, silu, got 'tanh'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.lowrank_linear(**{**good, **bad})
