"""A factored 2-D convolution in one pass over each image, on the CPU."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from lrcompress import _C

# Not custom_op, whose wrapper takes some 20 us a call: as long as a small layer.
_NAME = "lrcompress::lowrank_conv2d"
torch.library.define(
    _NAME,
    "(Tensor input, Tensor U, Tensor V, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups) -> Tensor",
)


def lowrank_conv2d(
    input: Tensor,  # [batch, channels, height, width] float32 on the CPU
    U: Tensor,  # [out, groups rank, 1, 1]
    V: Tensor,  # [groups rank, channels / groups, kernel height, kernel width]
    bias: Tensor | None = None,  # [out]
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:  # [batch, out, out height, out width], contiguous
    """Convolve with V in groups, then with U, and keep what is between them in the cache.

    The same image gives the same bits in any batch and for any number of threads. Inputs of other layouts are
    copied. Differentiable, but the backward pass computes ``conv2d(input, V)`` again.

    Raises:
        ValueError: A dtype, shape or device is not as annotated, or the kernel does not fit the image.
    """
    op = torch.ops.lrcompress.lowrank_conv2d.default
    result: Tensor = op(input, U, V, bias, stride, padding, dilation, groups)
    return result


def _check_tensor(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.ndim != ndim:
        raise ValueError(
            f"{name} must be float32 of {ndim} dimensions on the CPU, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )


def _out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Check one axis."""
    if stride < 1 or padding < 0 or dilation < 1:
        raise ValueError(
            "stride and dilation must be at least 1 and padding at least 0, "
            f"got {stride}, {dilation} and {padding}"
        )
    span = dilation * (kernel - 1) + 1
    if kernel < 1 or span > size + 2 * padding:
        raise ValueError(
            f"the kernel must have a span of 1 to {size + 2 * padding}, the padded size, got {span}"
        )
    return (size + 2 * padding - span) // stride + 1


def _out_shape(
    input: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """Check everything."""
    _check_tensor("input", input, 4)
    _check_tensor("U", U, 4)
    _check_tensor("V", V, 4)
    batch, channels, height, width = input.shape
    inner, inside, kernel_height, kernel_width = V.shape
    if groups < 1 or inner < 1 or inner % groups or channels != groups * inside:
        raise ValueError(
            f"V must be [{groups} rank, input channels {channels} / {groups}, ...] for groups={groups}, "
            f"got {tuple(V.shape)}"
        )
    out, *rest = U.shape
    if rest != [inner, 1, 1]:
        raise ValueError(f"U must be [out, {inner}, 1, 1] for V of {tuple(V.shape)}, got {tuple(U.shape)}")
    if bias is not None:
        _check_tensor("bias", bias, 1)
        if bias.shape[0] != out:
            raise ValueError(f"bias must have {out} entries, as U has rows, got {bias.shape[0]}")
    rows = _out_size(height, kernel_height, stride[0], padding[0], dilation[0])
    return batch, out, rows, _out_size(width, kernel_width, stride[1], padding[1], dilation[1])


@torch.library.impl(_NAME, "cpu")
def _run(
    input: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Check, allocate and call the kernel."""
    out = input.new_empty(_out_shape(input, U, V, bias, stride, padding, dilation, groups))
    rest = (None if bias is None else bias.contiguous(), out, stride, padding, dilation, groups)
    _C.lowrank_conv2d(input.contiguous(), V.contiguous(), U.contiguous(), *rest, torch.get_num_threads())
    return out


@torch.library.register_fake(_NAME)
def _fake(input: Tensor, *args: Any) -> Tensor:
    return input.new_empty(_out_shape(input, *args))


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
    """Run one after another: any tensor may have a batch axis, the factors too."""
    results = []
    for i in range(info.batch_size):
        mine = [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]
        results.append(torch.ops.lrcompress.lowrank_conv2d.default(*mine))
    return torch.stack(results), 0


@register_flop_formula(torch.ops.lrcompress.lowrank_conv2d)
def _flops(
    input: Sequence[int], U: Sequence[int], V: Sequence[int], *_: Any, out_shape: Sequence[int]
) -> int:
    """Count both convolutions, from shapes."""
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * (math.prod(V) + math.prod(U))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, U, V, bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, U, V)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Go back through the two convolutions; each step is itself differentiable."""
    input, U, V = ctx.saved_tensors
    needs_input, needs_U, needs_V, needs_bias = ctx.needs_input_grad[:4]
    grad_input = grad_U = grad_V = grad_bias = None
    if needs_U:
        z = F.conv2d(input, V, None, *ctx.geometry)
        grad_U = conv2d_weight(z, U.shape, grad)
    if needs_input or needs_V:
        size = (grad.shape[0], U.shape[1], *grad.shape[2:])
        grad_z = conv2d_input(size, U, grad)
        grad_input = conv2d_input(input.shape, V, grad_z, *ctx.geometry) if needs_input else None
        grad_V = conv2d_weight(input, V.shape, grad_z, *ctx.geometry) if needs_V else None
    if ctx.has_bias and needs_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input, grad_U, grad_V, grad_bias, None, None, None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
