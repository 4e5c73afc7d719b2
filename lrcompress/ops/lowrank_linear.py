"""A factored linear layer: both products in one call for few rows, and on CUDA for small ranks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lrcompress import _C
from lrcompress.ops._activations import activate, activation_backward, activation_number
from lrcompress.ops._cuda import has_kernels, lowrank_tile
from lrcompress.ops._eager import check_dense, follows_tangents, is_plain_inference, without_autocast
from lrcompress.ops._processor import has_native_bfloat16

_NAME = "lrcompress::lowrank_linear"
torch.library.define(
    _NAME, "(Tensor x, Tensor U, Tensor V, Tensor? bias, int groups, str activation) -> Tensor"
)
# What bench/lowrank_linear.py has the kernel ahead of two library calls for.
_KERNEL_ROWS = ((1024, 32), (512, 16), (0, 8))  # in float32, from so many rows of V on: rows at most
_KERNEL_ROWS_AVX512 = 8  # the same on processors with AVX-512, whatever the rows of V
_KERNEL_ROWS_BFLOAT16 = {False: 128, True: 4}  # by whether the library has instructions for bfloat16
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_HAS_AMX = torch.cpu._is_amx_tile_supported()
# On CUDA: few rows, whose time is that of reading the weights; or enough rows for a tile of a tensor core
# product, of a rank at which reading V and U again for each tile costs less than storing V x.
_CUDA_FEW_ROWS: int = _C.MAX_CUDA_ROWS
_CUDA_MANY_ROWS = 64
_CUDA_INNER = 256


def lowrank_linear(
    x: Tensor,  # [..., in] of a floating type
    U: Tensor,  # [out, groups rank]
    V: Tensor,  # [groups rank, in / groups]
    bias: Tensor | None = None,  # [out]
    groups: int = 1,
    activation: str = "none",
) -> Tensor:  # [..., out], contiguous
    """Compute ``activation(U V x + bias)`` with V block-diagonal over equal slices of the input features.

    ``activation`` is none, relu, gelu (the exact one) or silu. Few rows on the CPU, in float32 and bfloat16,
    run as one kernel that sums in float32, as do many rows in bfloat16 where the processor has AMX; elsewhere
    these are two products of torch. On CUDA kernels take float32, bfloat16 and float16, for at most 16 rows,
    or for at least 64 of an inner size of at most 256; they round ``V x`` to the dtype, as two calls do. In
    float32 they keep float32's accuracy even where ``torch.backends`` lets the library's calls use TF32, but
    what an infinite input reaches may be not a number. Differentiable, but the backward pass computes ``V x``
    again.

    Raises:
        ValueError: A dtype, shape or device is not as annotated.
    """
    if is_plain_inference(x, U, V, bias):
        return _run(x, U, V, bias, groups, activation)
    check_dense(x=x, U=U, V=V, bias=bias)
    if follows_tangents():
        _check(x, U, V, bias, groups)
        activation_number(activation)
        return _apply(x, U, V, bias, groups, activation)
    result: Tensor = torch.ops.lrcompress.lowrank_linear.default(x, U, V, bias, groups, activation)
    return result


def _check(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, groups: int) -> None:
    if not x.dtype.is_floating_point or x.ndim == 0:
        raise ValueError(f"x must be [..., in] of a floating type, got {x.dtype} of shape {tuple(x.shape)}")
    for name, tensor, ndim in (("U", U, 2), ("V", V, 2), ("bias", bias, 1)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} must be {x.dtype} on {x.device}, as x is, got {tensor.dtype} on {tensor.device}"
            )
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
    inner, inside = V.shape
    if groups < 1 or inner % groups or x.shape[-1] != groups * inside:
        raise ValueError(
            f"V must be [{groups} rank, features {x.shape[-1]} / {groups}] for groups={groups}, "
            f"got {tuple(V.shape)}"
        )
    if U.shape[1] != inner:
        raise ValueError(f"U must be [out, {inner}] for V of {tuple(V.shape)}, got {tuple(U.shape)}")
    if bias is not None and bias.shape[0] != U.shape[0]:
        raise ValueError(f"bias must be [{U.shape[0]}], as U has rows, got {tuple(bias.shape)}")


def _run(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, groups: int, activation: str) -> Tensor:
    """Check, allocate and call the kernel, or two products."""
    _check(x, U, V, bias, groups)
    number = activation_number(activation)
    *batch, features = x.shape
    rows = math.prod(batch)
    pays = kernel_pays(x, V.shape[0], rows) or takes_many_rows(x, V.shape[0] // groups, rows, groups)
    if x.is_cuda and pays:
        tile = _cuda_tile(x, V, rows, groups)
        if tile is not None:
            return _run_on_cuda(x, U, V, bias, groups, number, tile)
    if x.is_cuda or not pays:
        return _apply(x, U, V, bias, groups, activation)
    out = x.new_empty((*batch, U.shape[0]))
    hidden = torch.empty(rows, V.shape[0], dtype=torch.float32, device=x.device)
    flat = x.contiguous().view(rows, features)
    rest = (hidden, groups, number, torch.get_num_threads())
    given = None if bias is None else bias.contiguous()
    _C.lowrank_linear(flat, V.contiguous(), U.contiguous(), given, out.view(rows, U.shape[0]), *rest)
    return out


torch.library.impl(_NAME, "default", _run)


def kernel_pays(x: Tensor, inner: int, rows: int) -> bool:
    """Say whether a kernel is made for this call; on the CPU, whether it is ahead there."""
    if x.is_cuda:
        return rows <= _CUDA_FEW_ROWS or (rows >= _CUDA_MANY_ROWS and inner <= _CUDA_INNER)
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.dtype == torch.bfloat16:
        return rows <= _KERNEL_ROWS_BFLOAT16[has_native_bfloat16(x)]
    if _HAS_AVX512:
        return rows <= _KERNEL_ROWS_AVX512
    return rows <= next(most for least, most in _KERNEL_ROWS if inner >= least)


def chooses_rows(x: Tensor) -> bool:
    """Say whether the op, given any number of rows, runs only kernels that a benchmark has shown ahead."""
    return x.dtype != torch.bfloat16 or not _HAS_AMX


def takes_many_rows(x: Tensor, rank: int, rows: int, groups: int) -> bool:
    """Say whether the kernel for AMX runs this call, which no benchmark has shown ahead."""
    if not x.is_cpu or x.dtype != torch.bfloat16:
        return False
    return _C.linear_takes_many_rows(rows, rank, x.shape[-1] // groups)


def _cuda_tile(x: Tensor, V: Tensor, rows: int, groups: int) -> Sequence[int] | None:
    """Return the tile to call the kernels with, None where they do not run; few rows need no tile."""
    if rows <= _CUDA_FEW_ROWS:
        return (0, 0, 0) if has_kernels(x) else None
    return lowrank_tile(x, rows, groups, V.shape[0] // groups)


def _run_on_cuda(
    x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, groups: int, activation: int, tile: Sequence[int]
) -> Tensor:
    """Allocate and call the kernels."""
    out = x.new_empty((*x.shape[:-1], U.shape[0]))
    flat = x.contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])
    size = _C.linear_hidden_size(flat.shape[0], groups, V.shape[0] // groups, V.shape[1])
    hidden = torch.empty(size, dtype=torch.float32, device=x.device)
    factors = V.contiguous(), U.contiguous(), None if bias is None else bias.contiguous()
    rows = out.view(flat.shape[0], U.shape[0])
    with torch.cuda.device(x.device):
        _C.lowrank_linear(flat, *factors, rows, hidden, groups, activation, 0, tile)
    return out


def _slices(x: Tensor, groups: int) -> Tensor:  # [groups, rows, features / groups]
    """Put the groups first."""
    return x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)


def _joined(slices: Tensor, batch: Sequence[int]) -> Tensor:  # [*batch, groups features]
    """Put the groups back."""
    return slices.transpose(0, 1).reshape(*batch, slices.shape[0] * slices.shape[2])


def _encode(x: Tensor, V: Tensor, groups: int) -> Tensor:  # [..., groups rank]
    """Multiply each slice of the features by its rows of V."""
    if groups == 1:
        return F.linear(x, V)
    blocks = V.unflatten(0, (groups, V.shape[0] // groups))
    return _joined(torch.bmm(_slices(x, groups), blocks.mT), x.shape[:-1])


def _compose(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Multiply twice."""
    return F.linear(_encode(x, V, groups), U, bias)


def _apply(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, groups: int, activation: str) -> Tensor:
    """Do what the kernels do by calls of torch, in x's dtype."""
    with without_autocast(x.device):
        return activate(_compose(x, U, V, bias, groups), activation).contiguous()


@torch.library.register_fake(_NAME)
def _fake(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, groups: int, activation: str) -> Tensor:
    _check(x, U, V, bias, groups)
    activation_number(activation)
    return x.new_empty((*x.shape[:-1], U.shape[0]))


@torch.library.register_vmap(_NAME)
def _vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
    """Take a batch of x as more rows; run batches of factors one after another."""
    if in_dims[0] is not None and not any(isinstance(d, int) for d in in_dims[1:]):
        x, *rest = args
        return torch.ops.lrcompress.lowrank_linear.default(x.movedim(in_dims[0], 0), *rest), 0
    results = []
    for i in range(info.batch_size):
        mine = [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]
        results.append(torch.ops.lrcompress.lowrank_linear.default(*mine))
    return torch.stack(results), 0


@register_flop_formula(torch.ops.lrcompress.lowrank_linear)
def _flops(x: Sequence[int], U: Sequence[int], V: Sequence[int], *_: Any, out_shape: Sequence[int]) -> int:
    """Count both products, from shapes."""
    return 2 * math.prod(out_shape[:-1]) * (math.prod(V) + math.prod(U))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, U, V, bias, ctx.groups, ctx.activation = inputs
    ctx.save_for_backward(x, U, V, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Go back through the two products; each step is itself differentiable."""
    x, U, V, bias = ctx.saved_tensors
    needs_x, needs_U, needs_V, needs_bias = ctx.needs_input_grad[:4]
    groups = ctx.groups
    grad_x = grad_U = grad_V = None
    if needs_U or ctx.activation != "none":
        z = _encode(x, V, groups)
        if ctx.activation != "none":
            grad = activation_backward(grad, F.linear(z, U, bias), ctx.activation)
        grad_U = grad.flatten(0, -2).mT @ z.flatten(0, -2) if needs_U else None
    grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
    if needs_x or needs_V:
        grad_z = _slices(grad @ U, groups)  # [groups, rows, rank]
        grad_V = (grad_z.mT @ _slices(x, groups)).flatten(0, 1) if needs_V else None
        if needs_x:
            grad_x = _joined(grad_z @ V.unflatten(0, (groups, V.shape[0] // groups)), x.shape[:-1])
    return grad_x, grad_U, grad_V, grad_bias, None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
