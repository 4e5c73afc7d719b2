"""Batched eigenvalue problems in size classes: cuSOLVER's interface, served by a stub on host memory."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from lrcompress.ops import _cusolver, _eigh

STUB = Path(__file__).parent / "csrc" / "cusolver_stub.cpp"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("stub") / "libcusolver.so"
    subprocess.run(["c++", "-O2", "-std=c++20", "-shared", "-fPIC", "-o", built, STUB], check=True)
    return ctypes.CDLL(str(built))


def symmetric(count, side):
    A = torch.randn(count, side, side, dtype=torch.float64)
    return A + A.mT


def assert_solves(batches, found):
    for A, (values, vectors) in zip(batches, found, strict=True):
        exact = torch.linalg.eigvalsh(A)
        torch.testing.assert_close(values, exact, atol=1e-11, rtol=1e-11)
        eye = torch.eye(A.shape[-1], dtype=torch.float64).expand_as(A)
        torch.testing.assert_close(vectors.mT @ vectors, eye, atol=1e-11, rtol=0)
        torch.testing.assert_close(A @ vectors, vectors * values[:, None], atol=1e-10, rtol=0)


@pytest.mark.parametrize("side", [1, 2, 33, 64])
def test_solver_reads_lower_triangles_and_gives_eigenvectors_in_columns(library, side):
    A = symmetric(3, side)
    upper = torch.randn(3, side, side, dtype=torch.float64).triu(1)
    assert_solves([A], [_cusolver.eigh(library, A.tril() + upper, 0, vectors=True)])


def test_calls_are_cut_to_what_the_library_takes(library, monkeypatch):
    A = symmetric(7, 5)
    monkeypatch.setattr(_cusolver, "_MOST_ENTRIES", 60)
    assert_solves([A], [_cusolver.eigh(library, A.clone(), 0, vectors=True)])


def test_values_alone_are_the_same(library):
    A = symmetric(4, 20)
    values, _ = _cusolver.eigh(library, A.clone(), 0, vectors=False)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(A))


def test_sides_of_one_class_are_one_call_and_padding_is_cut_off(library):
    """Rank-deficient and indefinite matrices: what padding adds lies below, whatever the values."""
    B = torch.randn(2, 60, 7, dtype=torch.float64)
    batches = [symmetric(3, 50), B @ B.mT, -B[:, :9] @ B[:, :9].mT, torch.zeros(1, 64, 64), symmetric(2, 65)]
    batches = [batch.double() for batch in batches]
    calls = []

    def solve(padded):
        calls.append(tuple(padded.shape))
        return _cusolver.eigh(library, padded, 0, vectors=True)

    assert_solves(batches, _eigh.by_classes(batches, solve))
    assert calls == [(8, 64, 64), (2, 128, 128)]


def test_failures_are_raised_and_the_handle_is_given_back(library):
    A = symmetric(3, 4)
    A[1, 2, 2] = torch.nan
    with pytest.raises(RuntimeError, match=r"matrices \[1\] of 3 did not converge"):
        _cusolver.eigh(library, A, 0, vectors=True)
    with pytest.raises(RuntimeError, match="cusolverDnXsyevBatched failed with status 3"):
        _cusolver._call(library, "cusolverDnXsyevBatched", *[None] * 17)
    assert library.stub_handles() == 0


def test_the_cpu_takes_the_library_that_torch_has():
    batches = [symmetric(2, 9), symmetric(1, 40)]
    assert_solves(batches, _eigh.eigh_of(batches))
    values = _eigh.eigh_of(batches, vectors=False)[0][0]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(batches[0]))
