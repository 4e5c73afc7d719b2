"""Eigenvalues of many symmetric matrices."""

import torch
from torch import Tensor

from lrcompress import _C
from lrcompress.ops._arrays import with_values
from lrcompress.ops._eigh import eigh_of

# One problem: offset, row stride, side, and offset in the values.
_Row = tuple[int, int, int, int]
# The largest side the CUDA kernel takes; a build without CUDA has no kernel.
_MAX_KERNEL_SIDE: int = _C.MAX_CUDA_SIDE if _C.build_info()["cuda"] else 0


def symmetric_eigenvalues(
    matrices: Tensor,  # [size] float64, a flat workspace
    problems: Tensor,  # [count, 3] int64 on the CPU: offset of the first entry, row stride, side
) -> Tensor:  # [sum of the sides] float64, on the device of `matrices`
    """Compute all eigenvalues, ascending, of each matrix ``A[i, j] = matrices[offset + i * row_stride + j]``.

    Only the lower triangles are read; problems may overlap. The error is absolute, a small multiple of
    ``eps * max|lambda|`` of the matrix, so a tiny eigenvalue of a semidefinite matrix can come out negative.
    A matrix with an entry that is not finite gets NaN. On the CPU each matrix is solved by one thread, and
    the values do not depend on the number of threads.

    Raises:
        ValueError: A dtype, shape or device is not as annotated, or a problem reaches outside ``matrices``.
    """
    matrices, problems = with_values("matrices", matrices), with_values("problems", problems)
    _check_tensors(matrices, problems)
    table = _with_value_offsets(problems.tolist(), matrices.numel())
    values = matrices.new_empty(sum(side for _, _, side, _ in table))
    if matrices.is_cuda:
        _solve_on_cuda(matrices, table, values)
    elif values.numel() > 0:
        _call_kernel(matrices, table, values)
    return values


def _check_tensors(matrices: Tensor, problems: Tensor) -> None:
    if matrices.dtype != torch.float64 or matrices.ndim != 1 or not matrices.is_contiguous():
        raise ValueError(
            "matrices must be a contiguous 1-D float64 tensor, "
            f"got {matrices.dtype} of shape {tuple(matrices.shape)}, strides {matrices.stride()}"
        )
    if problems.dtype != torch.int64 or problems.ndim != 2 or problems.shape[1] != 3:
        raise ValueError(
            "problems must be an int64 [count, 3] tensor, "
            f"got {problems.dtype} of shape {tuple(problems.shape)}"
        )
    if problems.device.type != "cpu":
        raise ValueError(f"problems must be on the cpu, got {problems.device}")


def _with_value_offsets(
    problems: list[list[int]],  # of (offset, row stride, side)
    size: int,  # entries of the workspace
) -> list[_Row]:
    """Check each problem's bounds and append where its values start."""
    table: list[_Row] = []
    values = 0
    for index, (offset, row_stride, side) in enumerate(problems):
        end = offset + (side - 1) * row_stride + side if side > 0 else offset
        if offset < 0 or not 0 <= side <= row_stride or end > size:
            raise ValueError(
                "a problem (offset, row_stride, side) needs offset >= 0, row_stride >= side >= 0 and all its "
                f"entries within matrices [{size}], got problem {index} = {(offset, row_stride, side)}"
            )
        table.append((offset, row_stride, side, values))
        values += side
    return table


def _call_kernel(matrices: Tensor, table: list[_Row], values: Tensor) -> None:
    on_device = torch.tensor(table, dtype=torch.int64, device=matrices.device)
    max_side = max(side for _, _, side, _ in table)
    _C.symmetric_eigenvalues(matrices, on_device, values, max_side, torch.get_num_threads())


def _solve_on_cuda(matrices: Tensor, table: list[_Row], values: Tensor) -> None:
    """Solve what fits a block's shared memory by the kernel, the rest by cuSOLVER, a call a size class."""
    small = [row for row in table if row[2] <= _MAX_KERNEL_SIDE]
    if small:
        with torch.cuda.device(matrices.device):
            _call_kernel(matrices, small, values)
    large = [row for row in table if row[2] > _MAX_KERNEL_SIDE]
    solved = _eigenvalues_or_nan([_square(matrices, row) for row in large])
    for (_, _, side, at), found in zip(large, solved, strict=True):
        values[at : at + side] = found


def _square(matrices: Tensor, row: _Row) -> Tensor:  # [side, side]
    offset, row_stride, side, _ = row
    return matrices.as_strided((side, side), (row_stride, 1), matrices.storage_offset() + offset)


def _eigenvalues_or_nan(
    matrices: list[Tensor],  # each [side, side]
) -> list[Tensor]:  # each [side]
    """Solve by the library, which refuses entries that are not finite."""
    lower = [matrix.tril() for matrix in matrices]
    finite = [matrix.isfinite().all() for matrix in lower]
    safe = [torch.where(good, m, 0.0)[None] for m, good in zip(lower, finite, strict=True)]
    solved = eigh_of(safe, vectors=False)
    return [torch.where(good, found[0], torch.nan) for (found, _), good in zip(solved, finite, strict=True)]
