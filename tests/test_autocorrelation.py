"""Autocorrelation of patches: against stored patches, for every geometry, dtype and layout."""

import math
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lrcompress import ops
from lrcompress.ops import Autocorrelation, reference
from lrcompress.ops._windows import Axis, rounds, tables

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Products are added in their own precision over runs of at most so many, then in float64.
LONGEST_RUN = 4096


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Entries with a mean, so that sums of patches do not vanish."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5).to(dtype)


def exact(
    x: Tensor,
    kernel: Sequence[int] = (),
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Autocorrelation:
    """The reference in the op's own arguments, for batched x."""

    def each(value: int | Sequence[int]) -> list[int]:
        return [value] * len(kernel) if isinstance(value, int) else list(value)

    pads = [(0, 0)] * len(kernel)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(each(dilation), kernel, strict=True)]
        pads = [(span // 2, span - span // 2) for span in spans]
    elif not isinstance(padding, str):
        pads = [(p, p) for p in each(padding)]
    args = (kernel, each(stride), pads, each(dilation), groups, padding_mode)
    return Autocorrelation(*reference.autocorrelation(x.cpu(), *args))


def assert_exact(ours: Autocorrelation, truth: Autocorrelation, dtype: torch.dtype) -> None:
    """A run's rounding is at most its length times eps times the sum of magnitudes, by Cauchy and Schwarz.

    float16 and bfloat16 have exact products in float32, in which their runs are added.
    """
    assert ours.count == truth.count
    assert ours.products.dtype == ours.sums.dtype == torch.float64
    assert torch.equal(ours.products, ours.products.mT)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    terms = max(1, min(LONGEST_RUN, truth.count) if eps > 1e-10 else truth.count)
    norms = truth.products.diagonal(dim1=1, dim2=2).sqrt()
    bound = terms * eps * norms[:, :, None] * norms[:, None, :] + 1e-300
    assert ((ours.products.cpu() - truth.products).abs() <= bound).all()
    root = math.sqrt(max(1, truth.count))
    assert ((ours.sums.cpu() - truth.sums).abs() <= terms * eps * root * norms + 1e-300).all()


# kernel, size, and what else: small images so that windows miss each other, touch and overlap.
GEOMETRIES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 1), (5, 4), {}),
    ((3, 3), (7, 6), {}),
    ((3, 3), (7, 6), {"padding": 1}),
    ((3, 3), (3, 3), {"padding": 1}),
    ((3, 3), (1, 1), {"padding": 1}),
    ((3, 3), (2, 5), {"padding": 3}),
    ((3, 3), (8, 9), {"padding": 1, "stride": 2}),
    ((3, 3), (9, 8), {"padding": (0, 1), "stride": (3, 2)}),
    ((3, 3), (11, 10), {"stride": 4}),
    ((3, 3), (9, 9), {"padding": 2, "dilation": 2}),
    ((3, 3), (11, 9), {"padding": 3, "dilation": (3, 2), "stride": 2}),
    ((3, 3), (5, 5), {"dilation": 2}),
    ((1, 1), (7, 7), {"stride": 2}),
    ((1, 1), (7, 7), {"stride": 2, "padding": 1}),
    ((5, 5), (9, 8), {"padding": 2}),
    ((7, 7), (12, 13), {"padding": 3, "stride": 2}),
    ((7, 7), (8, 8), {"padding": 3}),
    ((2, 3), (6, 5), {"padding": "same"}),
    ((4, 2), (6, 5), {"padding": "same", "dilation": (1, 3)}),
    ((3, 2), (6, 5), {"padding": "valid"}),
    ((1, 5), (6, 9), {"padding": (0, 2)}),
    ((16, 16), (32, 33), {"stride": 16}),
    ((3, 3), (6, 7), {"padding": 1, "padding_mode": "reflect"}),
    ((3, 3), (6, 7), {"padding": (2, 1), "padding_mode": "replicate", "stride": 2}),
    ((3, 3), (6, 7), {"padding": "same", "padding_mode": "circular", "dilation": 2}),
    ((3,), (10,), {"padding": 1}),
    ((5,), (17,), {"padding": 4, "stride": 2, "dilation": 2}),
    ((4,), (9,), {"padding": "same", "padding_mode": "reflect"}),
    ((3, 3, 3), (5, 4, 6), {"padding": 1}),
    ((2, 3, 1), (5, 6, 4), {"padding": (1, 0, 2), "stride": (1, 2, 1), "dilation": (2, 1, 1)}),
    ((3, 3, 3), (4, 4, 4), {"padding": 1, "padding_mode": "replicate"}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "size", "options"), GEOMETRIES)
def test_every_geometry(kernel: tuple[int, ...], size: tuple[int, ...], options: Any, device: str) -> None:
    for dtype in (torch.float64, torch.float32):
        for channels, groups in ((4, 1), (4, 2), (4, 4), (9, 9), (16, 8)):
            x = random(3, channels, *size, dtype=dtype)
            found = ops.autocorrelation(x.to(device), kernel, groups=groups, **options)
            assert_exact(found, exact(x, kernel, groups=groups, **options), dtype)


@pytest.mark.parametrize(("kernel", "size", "options"), GEOMETRIES)
def test_composition_of_library_calls(
    kernel: tuple[int, ...], size: tuple[int, ...], options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on CUDA tensors."""
    op = import_module("lrcompress.ops.autocorrelation")
    monkeypatch.setattr(op, "_multiply", op._compose)
    x = random(3, 6, *size, dtype=torch.float32)
    found = ops.autocorrelation(x, kernel, groups=2, **options)
    assert_exact(found, exact(x, kernel, groups=2, **options), x.dtype)


# Around the vectors (8) and panels (16) of the kernel.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 13, 16, 17, 31, 33, 64])
def test_every_dtype_and_width(channels: int, dtype: torch.dtype, device: str) -> None:
    x = random(2, channels, 9, 8, dtype=dtype)
    found = ops.autocorrelation(x.to(device), (3, 3), padding=1)
    assert_exact(found, exact(x, (3, 3), padding=1), dtype)
    rows = random(5, channels, dtype=dtype)
    assert_exact(ops.autocorrelation(rows.to(device)), exact(rows), dtype)


# Around the runs of the kernel.
@pytest.mark.parametrize("samples", [0, 1, 2, 191, 192, 193, 1031])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_every_length(samples: int, dtype: torch.dtype) -> None:
    x = random(samples, 21, dtype=dtype)
    assert_exact(ops.autocorrelation(x), exact(x), dtype)


def test_linear_takes_any_leading_axes() -> None:
    x = random(2, 3, 5, 6)
    truth = exact(x.reshape(30, 6))
    assert_exact(ops.autocorrelation(x), truth, x.dtype)
    assert_exact(ops.autocorrelation(x[0, 0, 0]), exact(x[0, 0, :1]), x.dtype)
    grouped = ops.autocorrelation(x, groups=3)
    assert grouped.products.shape == (3, 2, 2)
    for g in range(3):
        assert torch.equal(grouped.products[g], ops.autocorrelation(x[..., 2 * g : 2 * g + 2]).products[0])


def test_the_order_is_that_of_the_weight() -> None:
    """tr(W R W^T) is the energy of the layer's outputs, W the sums' product their sum."""
    layer = torch.nn.Conv2d(6, 4, 3, 2, 1, groups=2, bias=False, dtype=torch.float64)
    x = random(3, 6, 8, 9)
    found = ops.autocorrelation(x, (3, 3), 2, 1, groups=2)
    outputs = layer(x).transpose(0, 1).reshape(2, 2, -1)
    weight = layer.weight.reshape(2, 2, -1)
    torch.testing.assert_close(weight @ found.products @ weight.mT, outputs @ outputs.mT)
    torch.testing.assert_close((weight @ found.sums[..., None])[..., 0], outputs.sum(2))
    assert found.count == outputs.shape[2]


def test_an_image_without_a_batch() -> None:
    x = random(3, 6, 7)
    assert_exact(ops.autocorrelation(x, (3, 3), padding=1), exact(x[None], (3, 3), padding=1), x.dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_and_nothing_outside_a_view(device: str) -> None:
    around = torch.full((4, 10, 12, 13), torch.nan)
    around[1:3, 2:7, 3:9, 4:11] = random(2, 5, 6, 7).float()
    view = around[1:3, 2:7, 3:9, 4:11]
    truth = exact(view, (3, 3), padding=1)
    last = view.contiguous(memory_format=torch.channels_last)
    for x in (view, last, view.mT.contiguous().mT, view.flip(0)):
        assert_exact(ops.autocorrelation(x.to(device), (3, 3), padding=1), truth, x.dtype)
    first = view[:1].expand(3, -1, -1, -1)
    assert_exact(
        ops.autocorrelation(first.to(device), (3, 3), stride=2), exact(first, (3, 3), 2), first.dtype
    )


@pytest.mark.parametrize("device", DEVICES)
def test_batches_add_up_in_place(device: str) -> None:
    x = random(5, 4, 6, 7).to(device)
    whole = ops.autocorrelation(x, (3, 3), padding=1)
    first = ops.autocorrelation(x[:2], (3, 3), padding=1)
    both = ops.autocorrelation(x[2:], (3, 3), padding=1, into=first)
    assert both.products.data_ptr() == first.products.data_ptr()
    assert both.sums.data_ptr() == first.sums.data_ptr()
    assert both.count == whole.count == 5 * 6 * 7
    torch.testing.assert_close(both.products, whole.products)
    torch.testing.assert_close(both.sums, whole.sums)
    same = ops.autocorrelation(x[:0], (3, 3), padding=1, into=both)
    assert (same.products.data_ptr(), same.count) == (both.products.data_ptr(), both.count)


def test_small_terms_survive_large_sums() -> None:
    """Ten thousand batches of 1 behind 2^30: float32 sums would lose them."""
    total = ops.autocorrelation(torch.full((1, 1), 2.0**15))
    for _ in range(10):
        total = ops.autocorrelation(torch.ones(1000, 1), into=total)
    assert total.products.item() == 2.0**30 + 10_000


def test_more_images_than_are_copied_at_once() -> None:
    x = random(700, 1, 40, 40, dtype=torch.float32)
    assert_exact(ops.autocorrelation(x, (2, 2), stride=2), exact(x, (2, 2), 2), x.dtype)
    rows = random(300_000, 2, dtype=torch.float32)
    assert_exact(ops.autocorrelation(rows), exact(rows), rows.dtype)


# More outputs in a row, in an image and in a batch than are added up in one run; more groups than are stored.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 8, 9001), (5,), {"padding": 2}),
        ((3, 18, 71, 70), (3, 3), {"padding": 1, "groups": 9}),
        ((40, 150, 13, 12), (3, 3), {"padding": 1, "groups": 150}),
        ((2, 8, 4, 40, 41), (2, 3, 3), {"padding": (0, 1, 1)}),
        ((9000, 16), (), {}),
    ],
)
def test_depthwise_of_every_size(shape: Any, kernel: Any, options: Any, dtype: torch.dtype) -> None:
    options = {"groups": shape[1], **options}
    x = random(*shape, dtype=dtype)
    assert_exact(ops.autocorrelation(x, kernel, **options), exact(x, kernel, **options), dtype)


def test_depthwise_keeps_what_float64_can_tell_apart() -> None:
    """Thousands of ones next to 2^30, of which float32 would keep multiples of 128."""
    x = torch.ones(1, 8, 70, 70, dtype=torch.float64)
    x[:, 1, 0, 0] = 2.0**15
    found = ops.autocorrelation(x, (2, 2), groups=8)
    assert found.products[0].eq(69 * 69).all()
    assert found.products[1, 0, 0].item() == 2.0**30 + 69 * 69 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    inputs: list[tuple[Tensor, dict[str, Any]]] = [
        (random(4, 20, 17, 16, dtype=dtype), {"kernel": (3, 3), "padding": 1}),
        (random(4, 40, 9, 8, dtype=dtype), {"kernel": (3, 3), "padding": 1, "groups": 2, "stride": 2}),
        (random(777, 50, dtype=dtype), {}),
        (random(4, 20, 67, 66, dtype=dtype), {"kernel": (3, 3), "padding": 1, "groups": 20}),
        (random(4, 16, 67, 66, dtype=dtype), {"kernel": (5, 5), "padding": 2, "groups": 8}),
    ]
    threads = torch.get_num_threads()
    try:
        for x, options in inputs:
            found = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(ops.autocorrelation(x, **options))
            for other in found[1:]:
                assert torch.equal(found[0].products, other.products)
                assert torch.equal(found[0].sums, other.sums)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("channels", [1, 64, 65, 512])
@pytest.mark.parametrize("room", [1, 1 << 16, 1 << 30])
def test_rounds_take_every_cell_and_window_once(kernel: int, channels: int, room: int) -> None:
    """How the CUDA kernel's work is cut: in ascending order, into a workspace that is large enough."""
    axis = Axis(14, kernel, padding=kernel // 2, out=14)
    axes = (Axis(1), axis, axis)
    offset_rows, cells, windows, _ = tables(axes, torch.device("cpu"))
    pixels, products, wanted = 32 * 14 * 14, channels**2, 400
    plan = rounds(axes, pixels, products, (-(-channels // 64)) ** 2, wanted, room)
    ends = [(0, 0, 0, 0), *plan.ranges]
    assert all(b[0] == a[1] and b[2] == a[3] for a, b in pairwise(ends))
    assert ends[-1][1::2] == (len(cells), len(windows))
    assert plan.cells == max(end - first for first, end, _, _ in plan.ranges)
    assert 1 <= plan.splits <= max(1, pixels // 1024)
    single = max(int(row[4] - row[3]) for row in offset_rows)
    assert 8 * products * plan.splits * plan.cells <= max(room, 8 * products * single)


def test_nan_stays_in_its_channels() -> None:
    x = random(2, 20, 6, 6, dtype=torch.float32)
    x[1, 17, 2, 3] = torch.nan
    found = ops.autocorrelation(x, (3, 3), padding=1)
    touched = torch.zeros(180, dtype=torch.bool)
    touched[17 * 9 : 18 * 9] = True
    assert torch.equal(found.products[0].isnan(), touched[:, None] | touched)
    assert torch.equal(found.sums[0].isnan(), touched)


def test_nothing_in() -> None:
    empty = ops.autocorrelation(torch.empty(0, 3, 5, 5), (3, 3))
    assert empty.products.shape == (1, 27, 27)
    assert not empty.products.any()
    assert not empty.sums.any()
    assert empty.count == 0
    assert ops.autocorrelation(torch.empty(4, 0)).products.shape == (1, 0, 0)


def test_no_gradient_is_recorded() -> None:
    assert not ops.autocorrelation(torch.ones(2, 3, requires_grad=True)).products.requires_grad


IMAGE = torch.zeros(2, 4, 5, 5)
ZEROS = ops.autocorrelation(IMAGE[:0], (3, 3))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 2).long(), {}, r"floating type of 16 to 64 bits, got torch.int64"),
        (torch.zeros(()), {}, r"\[\.\.\., in\] for kernel \(\), got shape \(\)"),
        (IMAGE, {"kernel": (3,)}, r"\[batch, in, 1 sizes\] for kernel \(3,\), got shape \(2, 4, 5, 5\)"),
        (IMAGE, {"kernel": (1, 1, 1, 1)}, r"for kernel \(1, 1, 1, 1\), got shape"),
        (IMAGE, {"kernel": (3, 3), "groups": 3}, r"divide the 4 channels of x, got 3"),
        (IMAGE, {"kernel": (3, 3), "groups": 0}, r"divide the 4 channels of x, got 0"),
        (IMAGE, {"kernel": (6, 3)}, r"span at most 5, the padded size, got 6"),
        (IMAGE, {"kernel": (3, 3), "dilation": 3}, r"span at most 5, the padded size, got 7"),
        (IMAGE, {"kernel": (3, 3), "stride": 0}, r"at least 1, got \(3, 3\), \(0, 0\) and \(1, 1\)"),
        (IMAGE, {"kernel": (3, 3), "stride": (1, 1, 1)}, r"one number or 2, .* got \(1, 1, 1\)"),
        (IMAGE, {"kernel": (3, 3), "padding": -1}, r"padding must be at least 0, got \(-1, -1\)"),
        (IMAGE, {"kernel": (3, 3), "padding": "full"}, r"'same' or 'valid', got 'full'"),
        (IMAGE, {"kernel": (3, 3), "padding": "same", "stride": 2}, r"needs stride 1, got \(2, 2\)"),
        (IMAGE, {"kernel": (3, 3), "padding_mode": "zero"}, r"one of .* got 'zero'"),
        (IMAGE, {"kernel": (2, 2), "into": ZEROS}, r"into.products must be float64 \[1, 16, 16\] .* \[1, 36"),
        (
            IMAGE,
            {"kernel": (3, 3), "into": ZEROS._replace(sums=torch.zeros(1, 36))},
            r"into.sums must be float64 \[1, 36\] on cpu, got torch.float32",
        ),
        (
            IMAGE,
            {"kernel": (3, 3), "into": ZEROS._replace(products=torch.zeros(1, 36, 36).double().mT)},
            r"into.products must be contiguous, got strides",
        ),
    ],
)
def test_bad_arguments_say_what_is_wrong(x: Tensor, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.autocorrelation(x, **options)
