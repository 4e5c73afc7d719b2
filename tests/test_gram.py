"""Products of many matrices: the tolerance law, layouts, and bad arguments."""

import pytest
import torch
from torch import Tensor

from lrcompress import ops
from lrcompress.ops import reference

EPS = torch.finfo(torch.float64).eps
# 0, 1, primes, and around the vectors (4), panels (12), tiles (64) and blocks (192) of the kernels, by terms
# around their chunks (16 and 128).
SHAPES = [
    *((side, terms) for side in (0, 1, 4, 13, 64, 65) for terms in (0, 1, 9, 17, 129)),
    *((side, 131) for side in (2, 7, 11, 12, 63, 97, 191, 192, 193, 300)),
    (256, 600),
]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
DTYPES = [torch.float32, torch.float64]


def random_batch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def assert_products(found: list[Tensor], batches: list[Tensor]) -> None:
    """Two sums of the same products differ by at most their roundings: 2 terms eps |A_i| |A_j|."""
    for ours, exact, batch in zip(found, reference.gram(batches), batches, strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == torch.float64
        norms = batch.double().norm(dim=2)
        bound = 2 * batch.shape[2] * EPS * norms[:, :, None] * norms[:, None, :]
        assert ((ours - exact).tril().abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_in_one_call(dtype: torch.dtype, device: str) -> None:
    batches = [random_batch(1 + i % 3, *shape, dtype=dtype) for i, shape in enumerate(SHAPES)]
    found = ops.gram([batch.to(device) for batch in batches])
    assert_products([products.cpu() for products in found], batches)


@pytest.mark.parametrize("device", DEVICES)
def test_both_dtypes_in_one_call(device: str) -> None:
    batches = [random_batch(2, 5, 9, dtype=dtype) for dtype in (*DTYPES, *DTYPES)]
    assert_products([found.cpu() for found in ops.gram([batch.to(device) for batch in batches])], batches)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_any_strides(dtype: torch.dtype, device: str) -> None:
    """Groups of columns, their transposes, steps, a broadcast row and a repeated matrix."""
    matrix = random_batch(30, 60, dtype=dtype).to(device)
    groups = matrix.unflatten(1, (4, 15)).transpose(0, 1)
    views = [groups, groups.mT, matrix[None, ::2, ::3], matrix[:1].expand(3, 30, 60), matrix[None, :, 1:2]]
    assert_products([found.cpu() for found in ops.gram(views)], [view.cpu() for view in views])


@pytest.mark.parametrize("device", DEVICES)
def test_products_lie_one_behind_the_other_in_out(device: str) -> None:
    """And nothing else is written: neither above a diagonal nor behind the last product."""
    batches = [
        random_batch(2, 65, 7).to(device),
        random_batch(3, 0, 4).to(device),
        random_batch(1, 13, 8).to(device),
    ]
    out = torch.full((2 * 65 * 65 + 13 * 13 + 5,), torch.nan, dtype=torch.float64, device=device)
    found = ops.gram(batches, out)
    assert [products.storage_offset() for products in found] == [0, 2 * 65 * 65, 2 * 65 * 65]
    written = out.isfinite().sum()
    assert written == 2 * 65 * 66 // 2 + 13 * 14 // 2


@pytest.mark.parametrize("device", DEVICES)
def test_without_terms_the_product_is_zero(device: str) -> None:
    out = torch.full((18,), torch.nan, dtype=torch.float64, device=device)
    assert not ops.gram([torch.empty(2, 3, 0, device=device)], out)[0].tril().nan_to_num(1.0).tril().any()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_rows(device: str) -> None:
    """What surrounds a view, here infinity, is never read."""
    around = torch.full((2, 40, 50), torch.inf)
    around[:, 3:33, 5:42] = random_batch(2, 30, 37, dtype=torch.float32)
    around[1, 10, 20] = torch.nan
    first, second = ops.gram([around.to(device)[:, 3:33, 5:42]])[0].cpu()
    lower = torch.ones(30, 30).tril().bool()
    touched = torch.zeros(30, 30).bool()
    touched[7, :] = touched[:, 7] = True
    assert first[lower].isfinite().all()
    assert torch.equal(second.isnan() & lower, touched & lower)


def test_neither_threads_nor_neighbours_change_the_bits() -> None:
    batches = [random_batch(2, *shape) for shape in SHAPES]
    alone = [ops.gram([batch])[0].tril() for batch in batches]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for one, other in zip(alone, ops.gram(batches), strict=True):
                assert torch.equal(one, other.tril())
    finally:
        torch.set_num_threads(threads)


def test_no_batches() -> None:
    assert ops.gram([]) == []
    assert ops.gram([torch.empty(0, 3, 4)])[0].shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("batches", "out", "message"),
    [
        ([torch.zeros(2, 2)], None, r"batches\[0\] must be .* got torch.float32 of shape \(2, 2\)"),
        (
            [torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).half()],
            None,
            r"batches\[1\] must be a float32 or float64 \[batch, side, terms\] tensor, got torch.float16",
        ),
        ([torch.zeros(2, 2, 1)], torch.zeros(7).double(), r"\[at least 8\] tensor, got .* of shape \(7,\)"),
        ([torch.zeros(1, 2, 1)], torch.zeros(4), r"float64 .* got torch.float32"),
        ([torch.zeros(1, 2, 1)], torch.zeros(2, 2).double(), r"got .* of shape \(2, 2\)"),
        ([torch.zeros(1, 2, 1)], torch.zeros(8).double()[::2], r"contiguous .* strides \(2,\)"),
        (
            [torch.zeros(1, 2, 1, device="meta")],
            torch.zeros(4).double(),
            r"must be dense and hold values, got the meta device",
        ),
    ],
)
def test_bad_arguments_say_what_is_wrong(batches: list[Tensor], out: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.gram(batches, out)
