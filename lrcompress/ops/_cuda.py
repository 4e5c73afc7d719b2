"""Where the CUDA kernels for floats of 16 and 32 bits run, and with which tile those of factored layers."""

import torch
from torch import Tensor

from lrcompress import _C

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_CUDA = _C.build_info()["cuda"]
_CAPABILITY = (8, 0)  # the least: bfloat16 and TF32 on tensor cores, copies past the registers
_PLAIN_SHARED_BYTES = 48 << 10  # what every block has, where torch does not tell


def has_kernels(tensor: Tensor) -> bool:
    """Say whether there is code for the device and the dtype of a CUDA tensor."""
    known = _HAS_CUDA and tensor.is_cuda and tensor.dtype in _DTYPES
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
    sizes = pixels, groups, rank, tensor.element_size()
    tile = _C.lowrank_tile(*sizes, limit, device.multi_processor_count)
    return tile if tile[0] > 0 else None
