"""The fused factored convolution: as accurate as torch's two, differentiable, traceable, strict."""

import itertools
import math
import platform
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lrcompress import _C, ops
from lrcompress.ops import reference
from lrcompress.ops._activations import ACTIVATIONS

TORCHS = {"none": torch.clone, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}

# batch, channels, filters, groups, rank, height, width: primes, 1, and sizes around the vectors (8), the
# pixels (16) and filters (6) of a block, and the ranks of one (4);
# the last two go by Winograd's algorithm where the geometry allows it.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 5, 1, 3, 7, 7),
    (3, 4, 6, 4, 1, 8, 8),
    (1, 6, 7, 3, 2, 9, 15),
    (2, 8, 13, 2, 5, 16, 17),
    (1, 16, 12, 8, 4, 5, 31),
    (2, 7, 11, 7, 9, 33, 3),
    (1, 64, 64, 8, 14, 32, 32),
    (5, 2, 1, 2, 13, 1, 40),
    (1, 20, 17, 2, 8, 13, 10),
    (2, 68, 9, 2, 41, 7, 21),
]
# kernel, stride, padding, dilation
GEOMETRIES = [
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 3), (1, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (3, 3), (2, 3), (2, 2)),
    ((3, 3), (1, 2), (3, 2), (1, 2)),
    ((5, 5), (2, 1), (2, 2), (1, 1)),
    ((3, 1), (1, 1), (1, 0), (1, 1)),
    ((2, 4), (4, 5), (1, 3), (1, 1)),
]


def make(size, kernel, dtype=torch.float32):
    batch, channels, filters, groups, rank, height, width = size
    input = torch.randn(batch, channels, height, width, dtype=dtype)
    U = torch.randn(filters, groups * rank, 1, 1, dtype=dtype)
    V = torch.randn(groups * rank, channels // groups, *kernel, dtype=dtype)
    return input, U, V, torch.randn(filters, dtype=dtype)


def compose(input, U, V, bias, *geometry):
    return F.conv2d(F.conv2d(input, V, None, *geometry), U, bias)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_accurate_as_two_convolutions(size, geometry, assert_as_accurate_as_torch):
    kernel, stride, padding, dilation = geometry
    input, U, V, bias = make(size, kernel)
    given = (stride, padding, dilation, size[3])
    if any(d * (k - 1) >= s + 2 * p for k, p, d, s in zip(kernel, padding, dilation, size[5:], strict=True)):
        with pytest.raises(ValueError, match="the kernel must have a span of"):
            ops.lowrank_conv2d(input, U, V, bias, *given)
        return
    for b in (bias, None):
        exact = reference.lowrank_conv2d(input, U, V, b, *given)
        same = compose(input, U, V, b, *given)
        assert_as_accurate_as_torch(ops.lowrank_conv2d(input, U, V, b, *given), same, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_layout_and_activation(dtype, layout, activation, assert_as_accurate_as_torch):
    for size in ((2, 16, 17, 8, 3, 9, 17), (1, 9, 33, 3, 7, 8, 7), (1, 20, 16, 1, 5, 11, 16)):
        input, U, V, bias = make(size, (3, 3), dtype)
        input = input.contiguous(memory_format=layout)
        for stride in ((1, 1), (2, 3)):
            given = (stride, (1, 2), (1, 1), size[3])
            found = ops.lowrank_conv2d(input, U, V, bias, *given, activation)
            assert found.dtype == dtype
            assert found.is_contiguous(memory_format=layout)
            same = TORCHS[activation](compose(input, U, V, bias, *given))
            exact = reference.lowrank_conv2d(input, U, V, bias, *given, activation)
            assert_as_accurate_as_torch(found, same, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_without_rank_or_channels_only_the_bias_is_left(dtype):
    bias = torch.randn(5, dtype=dtype)
    for channels, groups, rank in ((0, 1, 2), (4, 2, 0), (0, 2, 0)):
        input = torch.randn(2, channels, 6, 7, dtype=dtype)
        U, V = torch.ones(5, groups * rank, 1, 1), torch.ones(groups * rank, channels // groups, 3, 3)
        given = (input, U.to(dtype), V.to(dtype))
        found = ops.lowrank_conv2d(*given, bias, (1, 2), groups=groups, activation="relu")
        assert torch.equal(found, bias.relu()[:, None, None].expand(2, 5, 4, 3))
        assert not ops.lowrank_conv2d(*given, groups=groups).any()


def test_no_filters_give_no_channels():
    input, U, V, bias = make((2, 4, 0, 2, 3, 8, 9), (3, 3))
    assert ops.lowrank_conv2d(input, U, V, bias, groups=2).shape == (2, 0, 6, 7)


# Limits at both infinities; torch's own are not a number on some processors.
LIMITS = {"none": (-math.inf, math.inf), "relu": (0, math.inf), "gelu": (0, math.inf), "silu": (0, math.inf)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("pixels", [1, 8, 37])  # of a row: those of whole vectors, and the rest
def test_activations_of_special_numbers_are_their_limits(name, dtype, pixels):
    special = torch.tensor([math.nan, -math.inf, math.inf, 0.0, -200.0, 200.0, -1e-30, 88.0, -119.0, -121.0])
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    for value in special.to(dtype):
        limit = value if value.isnan() else torch.tensor(LIMITS[name][int(value > 0)], dtype=dtype)
        expected = TORCHS[name](value) if value.isfinite() else limit
        found = ops.lowrank_conv2d(value.repeat(1, 1, 1, pixels), one, one, activation=name)
        torch.testing.assert_close(found, expected.expand(found.shape), equal_nan=True)


@pytest.mark.parametrize(
    "sizes", [(1, 4, 3, 2, 2, 9, 7), (1, 40, 3, 1, 48, 9, 7)], ids=["direct", "winograd"]
)
@pytest.mark.parametrize("row", range(4))
def test_special_numbers_stay_where_two_convolutions_put_them(sizes, row):
    input, U, V, bias = make(sizes, (3, 3))
    input[0, 1, row, 2], input[0, 0, row + 3, 5] = math.inf, math.nan
    expected = F.conv2d(F.conv2d(input, V, padding=1, groups=sizes[3]), U, bias)
    found = ops.lowrank_conv2d(input, U, V, bias, padding=(1, 1), groups=sizes[3])
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert not expected.isfinite().all()


def test_modes_and_transforms_see_the_operator():
    input, U, V, bias = make((2, 4, 6, 2, 3, 8, 9), (3, 3))

    def call(x):
        return ops.lowrank_conv2d(x, U, V, bias, groups=2)

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with torch.no_grad(), Log():
        call(input)
    assert seen == [torch.ops.lrcompress.lowrank_conv2d.default]
    assert "lowrank_conv2d" in str(make_fx(call)(input).code)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(input)).shape == (2, 6, 6, 7)
    assert torch.equal(torch.func.functionalize(call)(input), call(input))


def test_views_and_channels_last_give_the_same_bits():
    input, U, V, bias = make((2, 8, 6, 4, 3, 9, 10), (3, 3))
    rest = (U, V, bias, (1, 1), (1, 1), (1, 1), 4)
    expected = ops.lowrank_conv2d(input, *rest)
    last = input.to(memory_format=torch.channels_last)
    wide = torch.randn(2, 16, 9, 10)
    wide[:, ::2] = input
    for view in (last, wide[:, ::2], input.mT.contiguous().mT):
        torch.testing.assert_close(ops.lowrank_conv2d(view, *rest), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "sizes", [(5, 8, 6, 4, 3, 33, 19), (5, 80, 6, 2, 40, 21, 19)], ids=["direct", "winograd"]
)
def test_bits_depend_neither_on_the_batch_nor_on_the_threads(layout, sizes):
    input, U, V, bias = make(sizes, (3, 3))
    input = input.contiguous(memory_format=layout)
    rest = (U, V, bias, (1, 1), (1, 1), (1, 1), sizes[3])
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(ops.lowrank_conv2d(input, *rest))
            found.append(torch.cat([ops.lowrank_conv2d(one[None], *rest) for one in input]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)], ids=str)
def test_the_result_lies_as_that_of_torchs_convolutions(kernel, dtype):
    layouts = (torch.contiguous_format, torch.channels_last)
    for layout, mine in itertools.product(layouts, layouts):
        input, U, V, _ = make((2, 6, 5, 2, 3, 8, 9), kernel, dtype)
        input, V = input.contiguous(memory_format=layout), V.contiguous(memory_format=mine)
        expected = F.conv2d(F.conv2d(input, V, groups=2), U)
        found = ops.lowrank_conv2d(input, U, V, groups=2)
        assert found.stride() == expected.stride(), (layout, mine)
        torch.testing.assert_close(found, expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = ops.lowrank_conv2d(
                mode.from_tensor(input), mode.from_tensor(U), mode.from_tensor(V), groups=2
            )
        assert fake.stride() == expected.stride(), (layout, mine)


def test_no_image_gives_no_output():
    input, U, V, bias = make((0, 4, 6, 2, 3, 8, 9), (3, 3))
    assert ops.lowrank_conv2d(input, U, V, bias, (2, 1), (1, 1), (1, 1), 2).shape == (0, 6, 4, 9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_the_composition(with_bias, activation, assert_as_accurate_as_torch):
    *factors, bias = make((3, 6, 7, 3, 2, 9, 11), (3, 2))
    given = ((2, 1), (1, 2), (1, 2), 3)
    tensors = [*factors, bias] if with_bias else factors
    upstream = torch.randn_like(compose(*factors, bias, *given))

    def gradients(f, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = f(*leaves, *([] if with_bias else [None]), *given)
        return torch.autograd.grad(out, leaves, upstream.to(dtype))

    ours = gradients(lambda *args: ops.lowrank_conv2d(*args, activation), torch.float32)
    same, exact = (
        gradients(lambda *args: TORCHS[activation](compose(*args)), dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for mine, torchs, truth in zip(ours, same, exact, strict=True):
        assert_as_accurate_as_torch(mine, torchs, truth)


def test_gradcheck_in_float64():
    tensors = [t.requires_grad_() for t in make((1, 4, 3, 2, 2, 4, 5), (3, 2), torch.float64)]
    for activation in ("gelu", "silu"):
        assert torch.autograd.gradcheck(
            lambda *leaves, a=activation: ops.lowrank_conv2d(*leaves, (1, 2), (1, 1), groups=2, activation=a),
            tensors,
        )


def test_torch_accepts_the_registration():
    input, U, V, bias = make((2, 4, 6, 2, 3, 8, 9), (3, 3))
    leaves = [t.requires_grad_() for t in (input, U, V, bias)]
    for b, grads in itertools.product((bias, None), (True, False)):
        tensors = [t if grads else t.detach() for t in (*leaves[:3], *([] if b is None else [b]))]
        args = (*tensors, *([None] if b is None else []), [1, 2], [1, 1], [1, 1], 2, "silu")
        torch.library.opcheck(torch.ops.lrcompress.lowrank_conv2d.default, args)


def test_flops_and_vmap_are_those_of_the_composition():
    input, U, V, bias = make((3, 4, 6, 2, 3, 8, 9), (3, 3))
    given = ((1, 2), (1, 1), (1, 1), 2)
    counts = []
    for f in (ops.lowrank_conv2d, compose):
        with FlopCounterMode(display=False) as counter:
            f(input, U, V, bias, *given)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    several = torch.stack([U, -U])
    found = torch.vmap(lambda u: ops.lowrank_conv2d(input, u, V, bias, *given))(several)
    torch.testing.assert_close(found[1], compose(input, -U, V, bias, *given))


def test_bad_arguments_say_what_was_given():
    input, U, V, bias = make((2, 4, 6, 2, 3, 8, 9), (3, 3))
    good = {"input": input, "U": U, "V": V, "bias": bias, "groups": 2}
    for bad, message in [
        ({"input": input.long()}, "input must be of a floating type, got torch.int64"),
        ({"input": input.double()}, "U must be torch.float64 on cpu, .* got torch.float32 on cpu"),
        ({"input": input[0]}, r"input must have 4 dimensions, got shape \(4, 8, 9\)"),
        ({"V": V.to("meta")}, "V must be torch.float32 on cpu, .* got torch.float32 on meta"),
        ({"groups": 4}, r"input channels 4 / 4, .* for groups=4, got \(6, 2, 3, 3\)"),
        ({"groups": 0}, "groups=0"),
        ({"U": U[:, :5]}, r"U must be \[out, 6, 1, 1\] .* got \(6, 5, 1, 1\)"),
        ({"bias": bias[:5]}, r"bias must be \[6\], as U has rows, got \(5,\)"),
        ({"stride": (1, 0)}, "got 0, 1 and 0"),
        ({"padding": (-1, 0)}, "got 1, 1 and -1"),
        ({"activation": "tanh"}, "one of none, relu, gelu, silu, got 'tanh'"),
        ({"dilation": (1, 5)}, "span of 1 to 9, the padded size, got 11"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.lowrank_conv2d(**{**good, **bad})


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64")
    or not _C.build_info()["compiler"].startswith(("12", "13", "14", "15")),
    reason="needs a build by GCC 12 or later for Linux on x86-64",
)
def test_the_library_has_the_kernel_for_amx():
    tdpbf16ps = bytes.fromhex("c4e24a5cc4")  # %tmm6, %tmm4, %tmm0
    assert tdpbf16ps in Path(_C.__file__).read_bytes()
