"""A factored 2-D convolution in one pass over each image."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from lrcompress import _C
from lrcompress._C import PackedFactors
from lrcompress.ops._activations import activate, activation_backward, activation_number
from lrcompress.ops._cuda import lowrank_tile
from lrcompress.ops._eager import check_dense, follows_tangents, is_plain_inference, without_autocast

# Not custom_op, whose wrapper takes some 20 us a call: as long as a small layer.
_NAME = "lrcompress::lowrank_conv2d"
torch.library.define(
    _NAME,
    "(Tensor input, Tensor U, Tensor V, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, str activation) -> Tensor",
)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def lowrank_conv2d(
    input: Tensor,  # [batch, channels, height, width] of a floating type
    U: Tensor,  # [out, groups rank, 1, 1]
    V: Tensor,  # [groups rank, channels / groups, kernel height, kernel width]
    bias: Tensor | None = None,  # [out]
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    packed: PackedFactors | None = None,
) -> Tensor:  # [batch, out, out height, out width], channels_last where the input or V is
    """Compute ``activation(conv2d(conv2d(input, V), U) + bias)`` and keep what is between in the cache.

    ``activation`` is none, relu, gelu (the exact one) or silu. On the CPU in float32 and bfloat16 this is one
    kernel that sums in float32: the same image gives the same bits in any batch and for any number of
    threads. Where the processor has AMX, bfloat16 takes its tiles and rounds ``conv2d(input, V)``, as two
    calls do. On CUDA channels_last images in float32, bfloat16 and float16 run as one kernel, which rounds
    that to the dtype, too, if it fits the shared memory of a block. In float32 it keeps float32's accuracy
    even where ``torch.backends`` lets the library's calls use TF32. What an infinite input reaches may be not
    a number on either device. Elsewhere it is two convolutions of torch. Inputs that are neither contiguous
    nor channels_last are copied. ``packed`` keeps what the CPU's kernel makes of the factors for the next
    call with equal ones; whether they are equal is looked up in each call. Differentiable, but the backward
    pass computes ``conv2d(input, V)`` again.

    Raises:
        ValueError: A dtype, shape or device is not as annotated, or the kernel does not fit the image.
    """
    if is_plain_inference(input, U, V, bias):
        return _run(input, U, V, bias, stride, padding, dilation, groups, activation, packed)
    check_dense(input=input, U=U, V=V, bias=bias)
    if follows_tangents():
        _check_kinds(input, U, V, bias)
        activation_number(activation)
        geometry = tuple(stride), tuple(padding), tuple(dilation), groups
        bias_shape = None if bias is None else bias.shape
        shape = _out_shape(input.shape, U.shape, V.shape, bias_shape, *geometry)
        return _apply(input, U, V, bias, shape, geometry, activation)
    op = torch.ops.lrcompress.lowrank_conv2d.default
    result: Tensor = op(input, U, V, bias, stride, padding, dilation, groups, activation)
    return result


def _check_kinds(input: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> None:
    """Check that all are of one floating dtype and on one device."""
    dtype, device = input.dtype, input.device
    if not dtype.is_floating_point:
        raise ValueError(f"input must be of a floating type, got {dtype}")
    for name, tensor in (("U", U), ("V", V), ("bias", bias)):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            raise ValueError(
                f"{name} must be {dtype} on {device}, as the input is, got {tensor.dtype} on {tensor.device}"
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
    input: Sequence[int],
    U: Sequence[int],
    V: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """Check all shapes."""
    for name, shape in (("input", input), ("U", U), ("V", V)):
        if len(shape) != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(shape)}")
    batch, channels, height, width = input
    inner, inside, kernel_height, kernel_width = V
    if groups < 1 or inner % groups or channels != groups * inside:
        raise ValueError(
            f"V must be [{groups} rank, input channels {channels} / {groups}, ...] for groups={groups}, "
            f"got {tuple(V)}"
        )
    out, *rest = U
    if rest != [inner, 1, 1]:
        raise ValueError(f"U must be [out, {inner}, 1, 1] for V of {tuple(V)}, got {tuple(U)}")
    if bias is not None and tuple(bias) != (out,):
        raise ValueError(f"bias must be [{out}], as U has rows, got {tuple(bias)}")
    rows = _out_size(height, kernel_height, stride[0], padding[0], dilation[0])
    return batch, out, rows, _out_size(width, kernel_width, stride[1], padding[1], dilation[1])


_known_out_shape = functools.lru_cache(maxsize=1024)(_out_shape)  # the check takes as long as the call


def _is_channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _memory_format(input: Tensor, V: Tensor) -> torch.memory_format:
    """Return that of the result, as torch's convolutions choose it."""
    last = _is_channels_last(input) or _is_channels_last(V)
    return torch.channels_last if last else torch.contiguous_format


def _run(
    input: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    packed: PackedFactors | None = None,
) -> Tensor:
    """Check, allocate and call the kernel, or two convolutions."""
    _check_kinds(input, U, V, bias)
    number = activation_number(activation)
    bias_shape = None if bias is None else bias.shape
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    shape = _known_out_shape(input.shape, U.shape, V.shape, bias_shape, *geometry)
    layout = _memory_format(input, V)
    last = layout == torch.channels_last
    if last and input.is_cuda:
        tile = lowrank_tile(input, shape[0] * shape[2] * shape[3], groups, V.shape[0] // groups)
        if tile is not None:
            image = input.contiguous(memory_format=layout)
            return _run_on_cuda(image, U, V, bias, shape, tile, *geometry, number)
    if not input.is_cpu or input.dtype not in _KERNEL_DTYPES:
        return _apply(input, U, V, bias, shape, geometry, activation)
    input = input.contiguous(memory_format=layout)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    if not (encoder_last := _is_channels_last(V)):
        V = V.contiguous()
    rest = (None if bias is None else bias.contiguous(), out, *geometry, number, last, encoder_last)
    _C.lowrank_conv2d(input, V, U.contiguous(), *rest, torch.get_num_threads(), packed)
    return out


torch.library.impl(_NAME, "default", _run)


def _run_on_cuda(
    input: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    tile: Sequence[int],
    *rest: Any,
) -> Tensor:
    """Allocate and call the kernel, which wants V as the input is: channels_last."""
    last = torch.channels_last
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=last)
    factors = V.contiguous(memory_format=last), U.contiguous(), None if bias is None else bias.contiguous()
    given: tuple[Any, ...] = (*factors, out, *rest, True, True, 0, None, tile)
    with torch.cuda.device(input.device):
        _C.lowrank_conv2d(input, *given)
    return out


def _apply(
    input: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    geometry: tuple[Any, ...],
    activation: str,
) -> Tensor:
    """Do what the kernels do by calls of torch, in the input's dtype."""
    with without_autocast(input.device):
        # torch convolves no channels with nothing.
        result = _compose(input, U, V, bias, *geometry) if V.numel() else input.new_zeros(shape)
        if bias is not None and not V.numel():
            result = result + bias[:, None, None]
        return activate(result, activation).contiguous(memory_format=_memory_format(input, V))


def _compose(input: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Convolve twice."""
    return F.conv2d(_encode(input, V, *geometry), U, bias)


def _encode(input: Tensor, V: Tensor, *geometry: Any) -> Tensor:
    return F.conv2d(input, V, None, *geometry)


@torch.library.register_fake(_NAME)
def _fake(input: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *geometry, activation = rest
    _check_kinds(input, U, V, bias)
    activation_number(activation)
    shape = _out_shape(input.shape, U.shape, V.shape, None if bias is None else bias.shape, *geometry)
    layout = _memory_format(input, V)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


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
    input, U, V, bias, *ctx.geometry, ctx.activation = inputs
    ctx.save_for_backward(input, U, V, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Go back through the two convolutions; each step is itself differentiable."""
    input, U, V, bias = ctx.saved_tensors
    needs_input, needs_U, needs_V, needs_bias = ctx.needs_input_grad[:4]
    grad_input = grad_U = grad_V = grad_bias = None
    if needs_U or ctx.activation != "none":
        z = _encode(input, V, *ctx.geometry)
        if ctx.activation != "none":
            grad = activation_backward(grad, F.conv2d(z, U, bias), ctx.activation)
        grad_U = conv2d_weight(z, U.shape, grad) if needs_U else None
    if needs_input or needs_V:
        size = (grad.shape[0], U.shape[1], *grad.shape[2:])
        grad_z = conv2d_input(size, U, grad)
        grad_input = conv2d_input(input.shape, V, grad_z, *ctx.geometry) if needs_input else None
        grad_V = conv2d_weight(input, V.shape, grad_z, *ctx.geometry) if needs_V else None
    if needs_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input, grad_U, grad_V, grad_bias, None, None, None, None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
