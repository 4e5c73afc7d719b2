"""Arrays of other libraries as tensors, without a copy."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack


def as_matrices(
    matrices: Sequence[Any],  # each [rows, columns]: torch, NumPy, CuPy or anything with __dlpack__
) -> list[Tensor]:
    """View each matrix as a tensor on the device where it lies.

    Raises:
        TypeError: an item is no array, or not of a real floating type.
        ValueError: an item is not a matrix, or the items lie on different devices.
    """
    tensors = []
    for i, matrix in enumerate(matrices):
        if not isinstance(matrix, Tensor) and not hasattr(matrix, "__dlpack__"):
            raise TypeError(
                f"matrices[{i}] must be a tensor or an array with __dlpack__, got {type(matrix).__name__}"
            )
        tensor = matrix.detach() if isinstance(matrix, Tensor) else from_dlpack(matrix)
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"matrices[{i}] must be of a floating type, got {tensor.dtype}")
        if tensor.ndim != 2:
            raise ValueError(f"matrices[{i}] must be [rows, columns], got shape {tuple(tensor.shape)}")
        tensors.append(tensor)
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"matrices must lie on one device, got {sorted(devices)}")
    return tensors
