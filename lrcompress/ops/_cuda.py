"""Where the CUDA kernels of the factored layers run, and with which tile."""

from collections.abc import Container

import torch
from torch import Tensor

from lrcompress import _C

_DTYPES = (torch.bfloat16, torch.float16)
_HAS_CUDA = _C.build_info()["cuda"]
_CAPABILITY = (8, 0)  # the least: bfloat16 on tensor cores, copies past the registers
_PLAIN_SHARED_BYTES = 48 << 10  # what every block has, where torch does not tell


def has_kernels(tensor: Tensor, dtypes: Container[torch.dtype] = _DTYPES) -> bool:
    """Say whether there is code for the device and the dtype of a CUDA tensor.

    Factored layers have none for float32: the library's products keep to ``torch.backends``, which says
    whether TF32 may be used.
    """
    known = _HAS_CUDA and tensor.is_cuda and tensor.dtype in dtypes
    return known and torch.cuda.get_device_capability(tensor.device) >= _CAPABILITY


def lowrank_tile(
    tensor: Tensor,
    pixels: int,  # of all images
    groups: int,
    rank: int,  # of a group
) -> list[int] | None:
    """Return the tile of the fused convolution, None where it does not fit the device."""
    if not has_kernels(tensor):
        return None
    device = torch.cuda.get_device_properties(tensor.device)
    limit = getattr(device, "shared_memory_per_block_optin", _PLAIN_SHARED_BYTES)
    tile = _C.lowrank_tile(pixels, groups, rank, limit, device.multi_processor_count)
    return tile if tile[0] > 0 else None
