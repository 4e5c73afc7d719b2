"""Which calls may go to a kernel without torch's dispatcher, which takes longer than a small layer."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def is_plain_inference(*tensors: Tensor | None) -> bool:
    """Say whether nothing but the result is asked for: no gradient, trace, transform, mode or subclass."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    with_grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or (with_grad and tensor.requires_grad)):
            return False
    # torch has no public name for these three: a trace, a transform of torch.func, a mode.
    return (
        torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
    )
