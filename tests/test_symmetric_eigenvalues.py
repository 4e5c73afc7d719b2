"""Eigenvalues of many symmetric matrices: certificates, the tolerance law and bad arguments."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lrcompress.ops.symmetric_eigenvalues import symmetric_eigenvalues

EPS = torch.finfo(torch.float64).eps
# 0, 1, primes, and the sides around vectors (4), batches of shifts (12), the kernel's limit (128) and the
# switch to delayed updates (256).
SIDES = [0, 1, 2, 3, 4, 5, 7, 11, 12, 13, 31, 64, 97, 127, 128, 129, 255, 256, 257, 300]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def random_symmetric(side: int, seed: int = 0) -> Tensor:
    matrix = torch.randn(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return matrix + matrix.T


def solve(matrices: Sequence[Tensor], device: str = "cpu") -> list[Tensor]:
    """Pack contiguous matrices into one workspace and split the result."""
    sides = [len(matrix) for matrix in matrices]
    problems, offset = [], 0
    for side in sides:
        problems.append((offset, side, side))
        offset += side * side
    workspace = torch.cat([matrix.reshape(-1) for matrix in matrices])
    table = torch.tensor(problems, dtype=torch.int64).reshape(-1, 3)
    return list(symmetric_eigenvalues(workspace.to(device), table).cpu().split(sides))


def assert_spectrum(values: Tensor, matrix: Tensor) -> None:
    """Weyl: two backward stable solvers differ by their perturbations of the matrix, some eps |A| each."""
    expected = torch.linalg.eigvalsh(matrix)
    assert values.shape == expected.shape
    if len(matrix) == 0:
        return
    bound = (8 + len(matrix) / 2) * EPS * expected.abs().max()
    assert (values - expected).abs().max() <= bound
    assert (values.diff() >= -bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", SIDES)
def test_agrees_with_lapack(side: int, device: str) -> None:
    matrix = random_symmetric(side)
    assert_spectrum(solve([matrix], device)[0], matrix)


@pytest.mark.parametrize("device", DEVICES)
def test_many_sides_in_one_call(device: str) -> None:
    matrices = [random_symmetric(side, seed) for seed, side in enumerate(SIDES)]
    for values, matrix in zip(solve(matrices, device), matrices, strict=True):
        assert_spectrum(values, matrix)


@pytest.mark.parametrize("device", DEVICES)
def test_diagonal_blocks_share_one_workspace(device: str) -> None:
    """The row stride of a block is that of the whole matrix, whose upper triangle must not matter."""
    whole = random_symmetric(60)
    whole[torch.triu(torch.ones(60, 60), 1).bool()] = torch.nan
    blocks = [(0, 20), (20, 7), (27, 33), (0, 60)]
    problems = torch.tensor([(start * 60 + start, 60, side) for start, side in blocks])
    parts = symmetric_eigenvalues(whole.reshape(-1).to(device), problems).cpu().split([s for _, s in blocks])
    for values, (start, side) in zip(parts, blocks, strict=True):
        lower = whole[start : start + side, start : start + side].tril()
        assert_spectrum(values, lower + lower.tril(-1).T)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [12, 128, 300])
def test_rank_deficient_gram_has_small_zeros(side: int, device: str) -> None:
    """Singular values are square roots: |sigma error| <= 1e-7 sigma_max needs 1e-14 lambda_max."""
    factor = torch.randn(side, side // 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = solve([factor @ factor.T], device)[0]
    assert values[: side - side // 3].abs().max() <= 1e-14 * values[-1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
def test_scale_does_not_matter(scale: float, device: str) -> None:
    matrix = random_symmetric(33)
    scaled = solve([matrix * scale], device)[0]
    torch.testing.assert_close(scaled / scale, solve([matrix], device)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_entry_that_is_not_finite_gives_nan_there_alone(bad: float, device: str) -> None:
    matrices = [random_symmetric(side) for side in (5, 40, 300, 5)]
    matrices[1][30, 2] = matrices[2][200, 100] = bad
    first, second, third, last = solve(matrices, device)
    assert second.isnan().all()
    assert third.isnan().all()
    assert first.isfinite().all()
    assert torch.equal(first, last)


@pytest.mark.parametrize("device", DEVICES)
def test_the_zero_matrix(device: str) -> None:
    assert torch.equal(solve([torch.zeros(9, 9).double()], device)[0], torch.zeros(9).double())


def test_threads_do_not_change_the_bits() -> None:
    matrices = [random_symmetric(side, seed) for seed, side in enumerate(SIDES)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.cat(solve(matrices)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_problems() -> None:
    assert symmetric_eigenvalues(torch.empty(0).double(), torch.empty(0, 3, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("matrices", "problems", "message"),
    [
        (torch.zeros(4), torch.zeros(1, 3).long(), r"float64 tensor, got torch.float32 of shape \(4,\)"),
        (
            torch.zeros(2, 2).double(),
            torch.zeros(1, 3).long(),
            r"1-D float64 tensor, got .* of shape \(2, 2\)",
        ),
        (torch.zeros(8).double()[::2], torch.zeros(1, 3).long(), r"contiguous .* strides \(2,\)"),
        (torch.zeros(4).double(), torch.zeros(1, 4).long(), r"\[count, 3\] tensor, got .* \(1, 4\)"),
        (torch.zeros(4).double(), torch.zeros(1, 3), r"int64 \[count, 3\] tensor, got torch.float32"),
        (
            torch.zeros(4).double(),
            torch.zeros(1, 3, device="meta").long(),
            "problems must be dense .* meta device",
        ),
        (
            torch.zeros(4).double(),
            torch.tensor([[0, 2, 2], [1, 2, 2]]),
            r"\[4\], got problem 1 = \(1, 2, 2\)",
        ),
        (torch.zeros(4).double(), torch.tensor([[-1, 1, 1]]), r"got problem 0 = \(-1, 1, 1\)"),
        (
            torch.zeros(4).double(),
            torch.tensor([[0, 1, 2]]),
            r"row_stride >= side .* got problem 0 = \(0, 1, 2\)",
        ),
        (torch.zeros(4).double(), torch.tensor([[0, 2**62, 2]]), r"within matrices \[4\]"),
        (torch.zeros(4).double(), torch.tensor([[0, 2**62, 2**62]]), r"within matrices \[4\]"),
        (torch.zeros(4).double(), torch.tensor([[0, 0, -1]]), r"side >= 0 .* got problem 0 = \(0, 0, -1\)"),
    ],
)
def test_bad_arguments_say_what_is_wrong(matrices: Tensor, problems: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        symmetric_eigenvalues(matrices, problems)


@pytest.mark.parametrize("value", [1.0, 3.7, -1e-3])
@pytest.mark.parametrize("side", [2, 16, 33, 128, 257, 300])
def test_what_is_left_of_a_low_rank_may_vanish(side, value):
    """A constant matrix has one eigenvalue; the rest of its reduction falls by eps at each step."""
    matrix = torch.full((side, side), value, dtype=torch.float64)
    found = symmetric_eigenvalues(matrix.flatten(), torch.tensor([[0, side, side]]))
    expected = torch.zeros(side, dtype=torch.float64)
    expected[-1 if value > 0 else 0] = side * value
    # What singular_values needs: the root of an error of 1e-14 is 1e-7 of the largest value.
    assert (found - expected).abs().max() <= 1e-14 * side * abs(value)
