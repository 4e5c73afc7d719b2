"""What may follow a factored layer, with its derivative."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu", "silu")  # in the order of csrc/math/activation.h


def activation_number(activation: str) -> int:
    """Return the number that the kernels know it by.

    Raises:
        ValueError: there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation; GELU is the exact one."""
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    return F.silu(x) if activation == "silu" else x


def activation_backward(
    grad: Tensor,  # of the output
    x: Tensor,  # the activation's input
    activation: str,
) -> Tensor:  # gradient of x
    """Go back through the activation, differentiably."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)  # type: ignore[no-any-return]
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)  # type: ignore[no-any-return]
    return torch.ops.aten.silu_backward(grad, x) if activation == "silu" else grad
