"""What the library's own calls have on this processor: where they are faster than a kernel depends on it."""

import torch
from torch import Tensor

# Products of bfloat16: vdpbf16ps or AMX, which oneDNN uses. Where both are missing it converts to float32.
NATIVE_BFLOAT16 = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_native_bfloat16(x: Tensor) -> bool:
    """Say whether torch's own calls multiply this tensor by instructions for bfloat16."""
    return NATIVE_BFLOAT16 and x.dtype == torch.bfloat16 and x.is_cpu
