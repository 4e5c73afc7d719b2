"""What a factored layer lets its user choose beside its shape: the activation behind it, and the kernel."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Proxy

from lrcompress.ops._cuda import has_kernels
from lrcompress.ops._eager import follows_tangents, is_plain, is_transformed

Activation = Literal["none", "relu", "gelu", "silu"]
Kernel = Literal["auto", "fused", "composed"]  # of inference; training always runs the composition

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def check_choices(activation: str, kernel: str) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: either is unknown; the message lists the known ones.
    """
    for name, value, known in (
        ("activation", activation, get_args(Activation)),
        ("kernel", kernel, get_args(Kernel)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


def choices_repr(activation: Activation, kernel: Kernel) -> str:
    """Describe what is not the default."""
    text = "" if activation == "none" else f", activation={activation}"
    return text + ("" if kernel == "auto" else f", kernel={kernel}")


def is_traced(input: object) -> bool:
    """Say whether torch.fx traces the call: there are no sizes yet to choose a kernel by."""
    return isinstance(input, Proxy)


def takes_fused(
    kernel: Kernel,
    input: Tensor,
    *weights: Tensor | None,  # the factors, the bias
) -> bool:
    """Say whether a fused kernel may run on these tensors: inference, and not for export.

    On CUDA only where "fused" is asked for, by hand or by ``tune``. For a backward pass the composition keeps
    what the op would compute again, and an exported graph must not need an op that its reader does not have.
    Subclasses, other layouts and the transforms of torch.func meet torch's own operators, which know them.
    Asked at every call, so written for speed.
    """
    dtype, device = input.dtype, input.device
    known = dtype in _CPU_DTYPES if input.is_cpu else kernel == "fused" and has_kernels(input)
    recorded = torch.is_grad_enabled()
    if (
        not known
        or (recorded and input.requires_grad)
        or torch.is_autocast_enabled("cpu" if input.is_cpu else device.type)
    ):
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    if follows_tangents() or not (torch.compiler.is_compiling() or _is_plain_call(input, *weights)):
        return False
    for weight in weights:
        if weight is not None and (
            weight.dtype != dtype or weight.device != device or (recorded and weight.requires_grad)
        ):
            return False
    return True


def _is_plain_call(*tensors: Tensor | None) -> bool:
    if is_transformed():
        return False
    return all(each is None or type(each) is FakeTensor or is_plain(each) for each in tensors)
