"""Singular values of every group count against an fp64 SVD, under the accuracy that the op promises."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress import ops
from lrcompress.ops import reference

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 12), (12, 5), (31, 24), (64, 64), (65, 126), (33, 130), (3, 0), (0, 3)]


def divisors(columns: int) -> list[int]:
    return [k for k in range(1, columns + 1) if columns % k == 0]


def assert_accurate(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Relative error 1e-6 above 1e-4 of the largest value, absolute error 1e-7 of the largest below."""
    assert ours.shape == exact.shape
    assert ours.dtype == torch.float64
    largest = exact.amax(-1, keepdim=True) if exact.numel() else exact.new_zeros(exact.shape[0], 1)
    allowed = torch.where(exact > 1e-4 * largest, 1e-6 * exact, 1e-7 * largest)
    assert ((ours - exact).abs() <= allowed).all()
    assert (ours.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_group_count_of_every_shape(dtype):
    matrices = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    groups = [divisors(columns) for _, columns in SHAPES]
    expected = reference.singular_values(matrices, groups)
    for ours, exact in zip(ops.singular_values(matrices, groups), expected, strict=True):
        assert sorted(ours) == sorted(exact)
        for count, values in exact.items():
            assert_accurate(ours[count], values)


@pytest.mark.parametrize("decay", ["exponential", "power", "deficient", "repeated"])
def test_hard_spectra(decay):
    rows, columns = 96, 192
    index = torch.arange(rows, dtype=torch.float64)
    spectrum = {
        "exponential": 10 ** (-9 * index / rows),
        "power": 1 / (1 + index) ** 2,
        "deficient": (index < 40).double(),
        "repeated": 1 + (index < 48).double(),
    }[decay]
    left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64)).Q
    matrix = (left * spectrum) @ right.T
    for scale in (1e-30, 1.0, 1e30):
        found = ops.singular_values([matrix * scale], (1, 2, 4, 8))[0]
        exact = reference.singular_values([matrix * scale], [(1, 2, 4, 8)])[0]
        for count in exact:
            assert_accurate(found[count], exact[count])


@given(st.integers(1, 20), st.integers(1, 24), st.sets(st.integers(1, 24), min_size=1), st.integers(0, 9))
@settings(max_examples=60)
def test_only_the_counts_that_divide_are_given(rows, columns, counts, seed):
    torch.manual_seed(seed)
    matrix = torch.randn(rows, columns)
    found = ops.singular_values([matrix], counts)[0]
    assert set(found) == {k for k in counts if columns % k == 0}
    for count, values in found.items():
        energy = torch.stack(matrix.double().chunk(count, 1)).square().sum((1, 2))
        torch.testing.assert_close(values.square().sum(1), energy)


def test_views_numpy_arrays_and_other_strides():
    base = torch.randn(12, 20)
    views = [base.T, base[::2], base[:, ::3], base[:0]]
    for view, found in zip(views, ops.singular_values(views), strict=True):
        assert_accurate(found[1], torch.linalg.svdvals(view.double())[None])
    array = np.asarray(base, dtype=np.float64)
    frozen = array.copy()
    frozen.flags.writeable = False
    expected = torch.linalg.svdvals(torch.from_numpy(array))[None]
    for same in (array, frozen, array.T, array[::-1], array[:, ::-1].T, array.astype(">f8")):
        assert_accurate(ops.singular_values([same])[0][1], expected)


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy", reason="install the cupy extra on a machine with a GPU")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    matrix = torch.randn(8, 12, device="cuda")
    found = ops.singular_values([cupy.asarray(matrix)], (1, 2))[0]
    for count, exact in reference.singular_values([matrix.cpu()], [(1, 2)])[0].items():
        assert_accurate(found[count].cpu(), exact)


def test_memory_is_bounded_by_parts(monkeypatch):
    matrices = [torch.randn(6, 12) for _ in range(5)]
    whole = ops.singular_values(matrices, (1, 3))
    monkeypatch.setattr(sys.modules["lrcompress.ops.singular_values"], "_WORKSPACE", 80)
    for one, other in zip(whole, ops.singular_values(matrices, (1, 3)), strict=True):
        for count in one:
            torch.testing.assert_close(one[count], other[count], rtol=0, atol=0)


def test_nan_stays_in_its_matrix():
    broken = torch.randn(4, 6)
    broken[1, 5] = torch.nan
    found = ops.singular_values([torch.eye(3), broken], (1, 2))
    assert found[0][1].tolist() == [[1.0, 1.0, 1.0]]
    assert found[1][1].isnan().all()
    assert found[1][2].isnan().tolist() == [[False] * 3, [True] * 3]


def test_bad_arguments_say_what_was_given():
    with pytest.raises(ValueError, match=r"\[rows, columns\], got shape \(3,\)"):
        ops.singular_values([torch.randn(3)])
    with pytest.raises(TypeError, match=r"floating type, got torch\.int64"):
        ops.singular_values([torch.ones(2, 2, dtype=torch.int64)])
    with pytest.raises(TypeError, match=r"floating type, got int64"):
        ops.singular_values([np.ones((2, 2), dtype=np.int64)])
    with pytest.raises(ValueError, match="hold values, got the meta device"):
        ops.singular_values([torch.ones(2, 2, device="meta")])
    with pytest.raises(ValueError, match=r"dense and hold values, got torch\.sparse_coo"):
        ops.singular_values([torch.eye(2).to_sparse()])
    with pytest.raises(TypeError, match="got list"):
        ops.singular_values([[1.0]])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ops.singular_values([torch.randn(2, 2)], (1, 0))
    with pytest.raises(ValueError, match="one for each of the 2 matrices, got 1"):
        ops.singular_values([torch.randn(2, 2)] * 2, [(1,)])
    assert ops.singular_values([]) == []
