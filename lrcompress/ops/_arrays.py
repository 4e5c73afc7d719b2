"""Arrays of other libraries as tensors, without a copy where that is possible."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack


def as_matrices(
    matrices: Sequence[Any],  # each [rows, columns]: torch, NumPy, CuPy or anything with __dlpack__
) -> list[Tensor]:
    """View each matrix as a tensor on the device where it lies.

    Raises:
        TypeError: an item is no array, or not of a real floating type.
        ValueError: an item is not a dense matrix with values, or the items lie on different devices.
    """
    tensors = []
    for i, matrix in enumerate(matrices):
        tensor = matrix if isinstance(matrix, Tensor) else _from_array(matrix, f"matrices[{i}]")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"matrices[{i}] must be of a floating type, got {tensor.dtype}")
        tensor = with_values(f"matrices[{i}]", tensor)
        if tensor.ndim != 2:
            raise ValueError(f"matrices[{i}] must be [rows, columns], got shape {tuple(tensor.shape)}")
        tensors.append(tensor)
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"matrices must lie on one device, got {sorted(devices)}")
    return tensors


def with_values(name: str, tensor: Tensor) -> Tensor:
    """Return the values as memory that a kernel can read: detached, and signs carried out.

    Raises:
        ValueError: the tensor is sparse, nested, a subclass, without values, or inside a transform.
    """
    found = _without_values(tensor)
    if found is not None:
        raise ValueError(f"{name} must be dense and hold values, got {found}")
    plain: Tensor = tensor.detach().resolve_neg()
    return plain


def check_writable(name: str, tensor: Tensor) -> None:
    """Refuse a result's place that a kernel cannot write to as it lies.

    Raises:
        ValueError: the tensor holds no values, or is a negated view.
    """
    found = "a negated view" if tensor.is_neg() else _without_values(tensor)
    if found is not None:
        raise ValueError(f"{name} must be dense and hold values, got {found}")


def _without_values(tensor: Tensor) -> str | None:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor inside a transform of torch.func"
    if isinstance(tensor, FakeTensor) or hasattr(tensor, "__tensor_flatten__"):  # memory that others hold
        return type(tensor).__name__
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_meta:
        return "the meta device"
    return None if tensor.layout is torch.strided else str(tensor.layout)


def _from_array(array: Any, name: str) -> Tensor:
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name} must be a tensor or an array with __dlpack__, got {type(array).__name__}")
    if isinstance(array, np.ndarray):
        if array.dtype.kind != "f":
            raise TypeError(f"{name} must be of a floating type, got {array.dtype}")
        array = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
    # A negative stride aborts the process inside torch.
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
        array = array.copy()
    tensor: Tensor = from_dlpack(array)
    return tensor
