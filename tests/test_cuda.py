"""The CUDA kernels on a GPU: `make gpu`. Without one, tests/test_cuda_emulation.py runs the same sources."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from lrcompress import _C, ops
from lrcompress.ops import _cuda, reference

missing = "a CUDA GPU" if not torch.cuda.is_available() else "a build with nvcc"
on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and _C.build_info()["cuda"]), reason=f"needs {missing}: make gpu"
    ),
]
# shape of x, kernel, stride, padding, groups: 1, primes, around the tiles of 64 channels, both layouts.
PATCHES = [
    ((1, 1, 1, 1), 1, 1, 0, 1),
    ((2, 7, 5, 6), 3, 1, 1, 1),
    ((3, 6, 9, 8), 3, 2, 1, 2),
    ((2, 65, 7, 7), 3, 1, 1, 1),
    ((16, 128, 28, 28), 3, 1, 1, 1),
    ((8, 32, 33, 32), 7, 1, 3, 1),
]
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
# batch, groups, channels of a group, rank, filters, height, width, kernel, stride, padding, dilation:
# 1, primes, around the tiles of 64 and 128 pixels and the chunks of 32 terms, more than one image of each.
CONVOLUTIONS = [
    (1, 1, 2, 1, 2, 1, 2, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 2, 3, 5, 7, 11, 13, (3, 3), (2, 1), (1, 2), (1, 2)),
    (1, 12, 1, 1, 11, 5, 9, (5, 3), (1, 1), (2, 1), (1, 1)),
    (3, 4, 16, 8, 32, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 1, 33, 65, 63, 8, 17, (3, 3), (1, 1), (2, 2), (2, 2)),
    (16, 4, 32, 32, 128, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1)),
    (32, 1, 128, 130, 256, 28, 28, (3, 3), (2, 2), (1, 1), (1, 1)),
    (2, 8, 8, 128, 64, 14, 14, (3, 3), (1, 1), (1, 1), (1, 1)),
]
SMALL_CONVOLUTIONS = CONVOLUTIONS[:5]
# rows, groups, features of a group, rank, filters
LINEARS = [
    (1, 1, 1, 1, 1),
    (3, 4, 13, 3, 31),
    (16, 2, 24, 9, 17),
    (7, 1, 1024, 16, 40),
    (65, 2, 40, 24, 136),
    (1, 1, 4096, 1024, 4096),
    (16, 1, 4096, 128, 11008),
    (300, 1, 1024, 256, 1000),
]
SMALL_LINEARS = LINEARS[:5]


def check_conv2d(case, dtype, activation, assert_as_accurate_as_torch):
    batch, groups, inside, rank, filters, height, width, kernel, *geometry = case
    input = torch.randn(batch, groups * inside, height, width, dtype=dtype, device="cuda")
    input = input.to(memory_format=torch.channels_last)
    U = torch.randn(filters, groups * rank, 1, 1, dtype=dtype, device="cuda") / (groups * rank) ** 0.5
    V = torch.randn(groups * rank, inside, *kernel, dtype=dtype, device="cuda")
    V = V / (inside * kernel[0] * kernel[1]) ** 0.5
    bias = torch.randn(filters, dtype=dtype, device="cuda")
    given = (*geometry, groups)
    act = ACTIVATIONS[activation]
    exact = act(reference.lowrank_conv2d(input, U, V, bias, *given))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        same = act(F.conv2d(F.conv2d(input, V, None, *given), U, bias))
    found = ops.lowrank_conv2d(input, U, V, bias, *given, activation)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate_as_torch(found, same, exact)
    assert torch.equal(found, ops.lowrank_conv2d(input, U, V, bias, *given, activation))


def check_linear(case, dtype, activation, assert_as_accurate_as_torch):
    rows, groups, inside, rank, filters = case
    x = torch.randn(rows, groups * inside, dtype=dtype, device="cuda")
    U = torch.randn(filters, groups * rank, dtype=dtype, device="cuda") / (groups * rank) ** 0.5
    V = torch.randn(groups * rank, inside, dtype=dtype, device="cuda") / inside**0.5
    bias = torch.randn(filters, dtype=dtype, device="cuda")

    def compose(x, U, V, bias):
        z = torch.einsum("bgi,gri->bgr", x.unflatten(1, (groups, inside)), V.unflatten(0, (groups, rank)))
        return ACTIVATIONS[activation](F.linear(z.flatten(1), U, bias))

    exact = compose(x.double(), U.double(), V.double(), bias.double())
    found = ops.lowrank_linear(x, U, V, bias, groups, activation)
    assert_as_accurate_as_torch(found, compose(x, U, V, bias), exact)
    assert torch.equal(found, ops.lowrank_linear(x, U, V, bias, groups, activation))


def all_dtypes(test):
    for mark in on_gpu:
        test = mark(test)
    return pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)(test)


@all_dtypes
@pytest.mark.parametrize("case", SMALL_CONVOLUTIONS, ids=str)
def test_small_convolutions(case, dtype, assert_as_accurate_as_torch):
    check_conv2d(case, dtype, "gelu", assert_as_accurate_as_torch)


@all_dtypes
@pytest.mark.parametrize("case", SMALL_LINEARS, ids=str)
def test_small_linears(case, dtype, assert_as_accurate_as_torch):
    check_linear(case, dtype, "silu", assert_as_accurate_as_torch)


@all_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions(case, dtype, activation, assert_as_accurate_as_torch):
    check_conv2d(case, dtype, activation, assert_as_accurate_as_torch)


@all_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_linears(case, dtype, activation, assert_as_accurate_as_torch):
    check_linear(case, dtype, activation, assert_as_accurate_as_torch)


@all_dtypes
def test_a_graph_replays_a_linear_layer(dtype):
    x = torch.randn(2, 512, dtype=dtype, device="cuda")
    U, V = (torch.randn(*shape, dtype=dtype, device="cuda") for shape in ((256, 64), (64, 512)))
    ops.lowrank_linear(x, U, V)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.lowrank_linear(x, U, V)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, ops.lowrank_linear(x, U, V))


def check_autocorrelation(case, dtype):
    """The bound is of 4096 terms in float32, by Cauchy and Schwarz."""
    shape, kernel, stride, padding, groups = case
    x = torch.randn(shape, dtype=dtype, device="cuda")
    given = ((kernel, kernel), stride, padding)
    truth = ops.autocorrelation(x.double().cpu(), *given, groups=groups)
    norms = truth.products.diagonal(dim1=1, dim2=2).sqrt()
    terms = min(truth.count, 4096)
    bound = terms * torch.finfo(torch.float32).eps * norms[:, :, None] * norms[:, None, :] + 1e-300
    for images in (x, x.to(memory_format=torch.channels_last)):
        found = ops.autocorrelation(images, *given, groups=groups)
        assert ((found.products.cpu() - truth.products).abs() <= bound).all()
        assert torch.equal(found.products, found.products.mT)
        torch.testing.assert_close(found.sums.cpu(), truth.sums)
        again = ops.autocorrelation(images, *given, groups=groups)
        assert torch.equal(found.products, again.products)


@all_dtypes
@pytest.mark.parametrize("case", PATCHES[:4], ids=str)
def test_small_autocorrelations(case, dtype):
    check_autocorrelation(case, dtype)


@all_dtypes
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_autocorrelations(case, dtype):
    check_autocorrelation(case, dtype)


@all_dtypes
def test_small_gram_and_eigenvalues(dtype):
    matrix = torch.randn(65, 129, device="cuda").to(dtype).float()
    found = ops.singular_values([matrix], [(1,)])[0][1][0]
    exact = torch.linalg.svdvals(matrix.double())
    assert (found.double() - exact).abs().max() <= 1e-6 * exact.max()


def check_group_lasso(outputs, channels, area, steps):
    """Against the twin on the CPU, which takes the same steps but for rounding, and by the certificate."""
    random = torch.Generator().manual_seed(outputs + channels)
    x = torch.randn(4 * channels * area, channels * area, generator=random, dtype=torch.float64).relu()
    R, W = x.T @ x / len(x), torch.randn(outputs, channels * area, generator=random, dtype=torch.float64)
    penalties = [ops.penalty_max(R, W, area) * share for share in (1.0, 0.5, 0.1, 0.03)]
    cut = ops.group_lasso(R.cuda(), W.cuda(), penalties, area, "fista", max_iter=steps)
    for penalty, found in zip(penalties, cut, strict=True):
        same = ops.group_lasso(R, W, penalty, area, "fista", max_iter=steps)
        torch.testing.assert_close(found.solution.cpu(), same.solution, rtol=1e-6, atol=1e-8)
    for found in ops.group_lasso(R.cuda(), W.cuda(), penalties, area):
        assert found.converged
        again = ops.group_lasso(R, W, found.penalty, area, "fista", max_iter=0, initial=found.solution.cpu())
        assert again.converged


def only_on_gpu(test):
    for mark in on_gpu:
        test = mark(test)
    return test


# Steps: fewer than a graph holds, as many, and more.
@only_on_gpu
@pytest.mark.parametrize("steps", [3, 9, 25])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (40, 150, 1)], ids=str)
def test_small_group_lassos(shape, steps):
    check_group_lasso(*shape, steps)


@only_on_gpu
@pytest.mark.parametrize("shape", [(64, 64, 9), (300, 784, 1), (512, 512, 9)], ids=str)
def test_group_lassos(shape):
    check_group_lasso(*shape, 12)


@only_on_gpu
def test_small_matrices_are_truncated_in_size_classes():
    """Sides 33 to 300, which torch solves one by one, and one matrix of low rank."""
    shapes = [(33, 70), (64, 64), (200, 65), (300, 301), (40, 500)]
    given = [torch.randn(shape, device="cuda") for shape in shapes]
    given.append(torch.randn(50, 3, device="cuda") @ torch.randn(3, 80, device="cuda"))
    ranks = [min(matrix.shape) // 3 for matrix in given]
    for W, rank, (U, S, V) in zip(given, ranks, ops.truncated_svd(given, ranks), strict=True):
        exact = torch.linalg.svdvals(W.double())
        torch.testing.assert_close(S, exact[:rank], atol=1e-8 * float(exact[0]), rtol=1e-9)
        lost = float((W.double() - (U * S) @ V).square().sum())
        least = float(exact[rank:].square().sum())
        assert lost == pytest.approx(least, rel=1e-6, abs=1e-12 * float(exact.square().sum()))


def test_without_a_gpu_nothing_goes_there():
    assert not _cuda.has_kernels(torch.zeros(1, dtype=torch.bfloat16))
    assert not _cuda.has_kernels(torch.zeros(1))
    assert _cuda.lowrank_tile(torch.zeros(1, dtype=torch.bfloat16), 1, 1, 1) is None


def test_a_tile_fits_the_device_or_there_is_none():
    limits, ranks = (48 << 10, 99 << 10, 163 << 10, 227 << 10), (0, 1, 64, 65, 250, 1000, 2000)
    every_pixels = (1, 64 * 108, 64 * 108 + 1, 1 << 40)
    for limit, rank, pixels, entry in itertools.product(limits, ranks, every_pixels, (2, 4)):
        size, columns, shared = _C.lowrank_tile(pixels, 2, rank, entry, limit, 108)
        assert size in ((0, 64, 128) if pixels > 64 * 108 else (0, 64))
        assert (shared <= limit) == (size > 0)
        assert columns == (0 if size == 0 else 128 if size == 128 and rank > 64 else 64)


@pytest.mark.parametrize(
    ("dtype", "pixels"),
    [(torch.float32, 64), (torch.bfloat16, 128), (torch.float16, 128), (torch.float64, None)],
)
def test_a_tile_has_room_for_the_entries_of_each_dtype(monkeypatch, dtype, pixels):
    """On a tensor that only says it is on a GPU with the shared memory of sm_80."""
    device = SimpleNamespace(shared_memory_per_block_optin=163 << 10, multi_processor_count=108)
    monkeypatch.setattr(_cuda, "_HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    with FakeTensorMode():
        tile = _cuda.lowrank_tile(torch.empty(1, dtype=dtype, device="cuda"), 1 << 20, 1, 256)
    assert (tile and tile[0]) == pixels


def test_a_workspace_has_room_for_every_share_of_a_sum():
    assert _C.linear_hidden_size(1, 1, 1024, 4096) == 1024  # a block for each eight filters
    assert _C.linear_hidden_size(16, 1, 128, 4096) == 8 * 16 * 128  # eight blocks for each
    assert _C.linear_hidden_size(3, 2, 5, 100) == 3 * 16  # ten entries, in pieces of eight
    assert _C.linear_hidden_size(_C.MAX_CUDA_ROWS + 1, 1, 8, 8) == 0
