"""cuSOLVER's batched symmetric eigenvalue solver, called directly: torch takes it up to side 32 only."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

_SONAMES = ("libcusolver.so.12", "libcusolver.so.11")  # of CUDA 13 and 12
_VALUES, _VECTORS, _UPPER, _DOUBLE = 0, 1, 1, 1  # cusolverEigMode_t, cublasFillMode_t, cudaDataType
_MOST_ENTRIES = 2**31 - 1  # of the matrices of one call
_NAMES = (
    "cusolverDnCreate",
    "cusolverDnDestroy",
    "cusolverDnSetStream",
    "cusolverDnXsyevBatched_bufferSize",
    "cusolverDnXsyevBatched",
)
_int64, _size, _pointer = ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p


def loaded_library() -> ctypes.CDLL | None:
    """Return the libcusolver that torch has loaded, if it has the solver (CUDA 12.6.2 and later)."""
    torch.linalg.eigvalsh(torch.eye(2, device="cuda"))  # torch loads it with its first use
    for soname in _SONAMES:
        try:
            library = ctypes.CDLL(soname, os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
        if all(hasattr(library, name) for name in _NAMES):
            return library
    return None


def eigh(
    library: ctypes.CDLL,
    matrices: Tensor,  # float64 [batch, side, side], their lower triangles; overwritten
    stream: int,  # a cudaStream_t
    vectors: bool,
) -> tuple[Tensor, Tensor]:  # [batch, side] ascending; [batch, side, side], columns
    """Solve all matrices, as many in one call as the library takes.

    Raises:
        RuntimeError: a call failed or a matrix did not converge.
    """
    side = matrices.shape[-1]
    values = matrices.new_empty(matrices.shape[:-1])
    info = torch.zeros(len(matrices), dtype=torch.int32, device=matrices.device)
    handle = _pointer()
    _call(library, "cusolverDnCreate", ctypes.byref(handle))
    try:
        _call(library, "cusolverDnSetStream", handle, _pointer(stream))
        most = max(1, _MOST_ENTRIES // max(1, side * side))
        for A, W, state in zip(matrices.split(most), values.split(most), info.split(most), strict=True):
            _solve(library, handle, A, W, state, _VECTORS if vectors else _VALUES)
    finally:
        _call(library, "cusolverDnDestroy", handle)
    failed = info.nonzero().flatten().tolist()
    if failed:
        raise RuntimeError(f"{_NAMES[-1]}: matrices {failed[:8]} of {len(matrices)} did not converge")
    return values, matrices.mT


def _solve(
    library: ctypes.CDLL, handle: ctypes.c_void_p, A: Tensor, W: Tensor, info: Tensor, mode: int
) -> None:
    """Solve one call's matrices; what is a lower triangle in rows is an upper one in cuSOLVER's columns."""
    side, batch = _int64(A.shape[-1]), _int64(len(A))
    read = (handle, None, mode, _UPPER, side, _DOUBLE, _pointer(A.data_ptr()), side)
    head = (*read, _DOUBLE, _pointer(W.data_ptr()), _DOUBLE)
    on_device, on_host = _size(), _size()
    _call(library, _NAMES[-2], *head, ctypes.byref(on_device), ctypes.byref(on_host), batch)
    workspace = torch.empty(on_device.value, dtype=torch.uint8, device=A.device)
    buffer = ctypes.create_string_buffer(max(1, on_host.value))
    _call(
        library,
        _NAMES[-1],
        *head,
        _pointer(workspace.data_ptr()),
        on_device,
        buffer,
        on_host,
        _pointer(info.data_ptr()),
        batch,
    )


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    status = getattr(library, name)(*arguments)
    if status != 0:
        raise RuntimeError(f"{name} failed with status {status}")
