"""What a factored layer lets its user choose beside its shape: the activation behind it, and the kernel."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "relu", "gelu", "silu"]
Kernel = Literal["auto", "fused", "composed"]  # of inference; training always runs the composition


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


def activate(
    y: Tensor,  # a layer's output
    activation: Activation,
) -> Tensor:
    """Apply an activation by name."""
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    return F.silu(y) if activation == "silu" else y


def choices_repr(activation: Activation, kernel: Kernel) -> str:
    """Describe what is not the default."""
    text = "" if activation == "none" else f", activation={activation}"
    return text + ("" if kernel == "auto" else f", kernel={kernel}")


def takes_fused(
    *tensors: Tensor | None,  # the input, the factors, the bias
) -> bool:
    """Say whether a fused op may run on these tensors: inference, on the CPU, float32, and not for export.

    For a backward pass the composition keeps what the op would compute again, and an exported graph must not
    need an op that its reader does not have. Asked at every call, so written for speed.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):  # type: ignore[attr-defined,no-untyped-call]
        return False
    recorded = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (
            t.dtype != torch.float32 or t.device.type != "cpu" or (recorded and t.requires_grad)
        ):
            return False
    return True
