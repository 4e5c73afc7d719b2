"""Truncated factors: orthonormal, as good as Eckart and Young allow, for every shape and spectrum."""

import numpy as np
import pytest
import torch

from lrcompress import ops
from lrcompress.ops import reference

SHAPES = [(1, 1), (1, 9), (9, 1), (7, 13), (13, 7), (32, 32), (33, 64), (65, 31)]


def assert_optimal(matrix: torch.Tensor, factors: tuple[torch.Tensor, ...], rank: int) -> None:
    """Check the certificate: orthonormal sides, and a residual no larger than the dropped values."""
    U, S, V = factors
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(V @ V.T, eye, rtol=0, atol=1e-12)
    assert (S.diff() <= 0).all()
    exact = torch.linalg.svdvals(matrix.double())
    allowed = torch.where(exact > 1e-4 * exact[0], 1e-6 * exact, 1e-7 * exact[0])[:rank]
    assert ((S - exact[:rank]).abs() <= allowed).all()
    residual = (matrix.double() - (U * S) @ V).norm()
    assert residual <= exact[rank:].norm() * (1 + 1e-9) + 1e-7 * exact[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_shape_and_rank(dtype):
    matrices, ranks = [], []
    for shape in SHAPES:
        for rank in {1, (min(shape) + 1) // 2, min(shape)}:
            matrices.append(torch.randn(shape, dtype=torch.float64).to(dtype))
            ranks.append(rank)
    for matrix, rank, factors in zip(matrices, ranks, ops.truncated_svd(matrices, ranks), strict=True):
        assert_optimal(matrix, factors, rank)


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
@pytest.mark.parametrize("spectrum", ["zero", "one", "deficient", "decaying", "repeated"])
def test_hard_spectra_stay_orthonormal(spectrum, scale):
    rows = 24
    index = torch.arange(rows, dtype=torch.float64)
    values = {
        "zero": index * 0,
        "one": (index == 0).double(),
        "deficient": (index < 9).double(),
        "decaying": 10 ** (-12 * index / rows),
        "repeated": 1 + (index < 12).double(),
    }[spectrum]
    left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(40, rows, dtype=torch.float64)).Q
    matrix = (left * values * scale) @ right.T
    for given in (matrix, matrix.T):
        assert_optimal(given, ops.truncated_svd([given], [rows])[0], rows)


def test_separated_values_give_the_reference_factors():
    matrix = torch.diag(torch.tensor([5.0, 3.0, 1.0])) @ torch.linalg.qr(torch.randn(6, 3)).Q.T
    ours = ops.truncated_svd([matrix], [2])[0]
    exact = reference.truncated_svd([matrix], [2])[0]
    torch.testing.assert_close((ours[0] * ours[1]) @ ours[2], (exact[0] * exact[1]) @ exact[2])


def test_numpy_arrays_and_views():
    base = np.random.default_rng(0).normal(size=(6, 10))
    for array in (base, base.T, base[:, ::3]):
        assert_optimal(torch.from_numpy(array.copy()), ops.truncated_svd([array], [3])[0], 3)


def test_bad_arguments_say_what_was_given():
    matrix = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"ranks\[0\] must be 1 to 4 for \(4, 6\), got 5"):
        ops.truncated_svd([matrix], [5])
    with pytest.raises(ValueError, match="got 0"):
        ops.truncated_svd([matrix], [0])
    with pytest.raises(ValueError, match="one rank for each of the 1 matrices, got 2"):
        ops.truncated_svd([matrix], [1, 2])
    matrix[2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"matrices\[0\] must be finite"):
        ops.truncated_svd([matrix], [1])
