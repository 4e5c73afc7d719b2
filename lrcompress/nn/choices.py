"""What a factored layer lets its user choose beside its shape: the activation behind it, and the kernel."""

from typing import Literal, get_args

import torch
from torch import Tensor

Activation = Literal["none", "relu", "gelu", "silu"]
Kernel = Literal["auto", "fused", "composed"]  # of inference; training always runs the composition

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


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


def takes_fused(
    input: Tensor,
    *weights: Tensor | None,  # the factors, the bias
) -> bool:
    """Say whether a fused kernel may run on these tensors: inference, on the CPU, and not for export.

    For a backward pass the composition keeps what the op would compute again, and an exported graph must not
    need an op that its reader does not have. Asked at every call, so written for speed.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):  # type: ignore[attr-defined,no-untyped-call]
        return False
    recorded = torch.is_grad_enabled()
    dtype = input.dtype
    if dtype not in _KERNEL_DTYPES or input.device.type != "cpu" or (recorded and input.requires_grad):
        return False
    for weight in weights:
        if weight is not None and (
            weight.dtype != dtype or weight.device.type != "cpu" or (recorded and weight.requires_grad)
        ):
            return False
    return True
