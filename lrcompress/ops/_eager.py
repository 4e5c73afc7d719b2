"""Which calls may go to a kernel without torch's dispatcher, which takes longer than a small layer."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_NOTHING: AbstractContextManager[None] = nullcontext()
_PLAIN = (Tensor, nn.Parameter)


def follows_tangents() -> bool:
    """Say whether forward-mode derivatives are wanted, for which torch's own operators have formulas."""
    return forward_ad._current_level >= 0


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keep the dtypes as they are given, as the kernels do."""
    if not torch.is_autocast_enabled(device.type):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)


def is_transformed() -> bool:
    """Say whether a transform of torch.func runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_plain(tensor: Tensor) -> bool:
    """Say whether a kernel may read the memory: no subclass, layout or negative bit gives it a meaning."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor.is_nested
    )


def check_dense(**tensors: Tensor | None) -> None:
    """Refuse what has no shape or no strides.

    Raises:
        ValueError: a tensor is sparse, nested, or of another layout that is not dense.
    """
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.layout is not torch.strided or tensor.is_nested):
            found = "a nested tensor" if tensor.is_nested else str(tensor.layout)
            raise ValueError(f"{name} must be dense, got {found}")


def is_plain_inference(*tensors: Tensor | None) -> bool:
    """Say whether nothing but the result is asked for: no gradient, trace, transform, mode or subclass."""
    if torch.compiler.is_compiling() or follows_tangents():
        return False
    with_grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (not is_plain(tensor) or (with_grad and tensor.requires_grad)):
            return False
    # torch has no public name for these three: a trace, a transform of torch.func, a mode.
    return (
        torch._C._get_tracing_state() is None
        and not is_transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
    )
