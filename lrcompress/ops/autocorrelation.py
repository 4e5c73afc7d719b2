"""The second moment of the patches that a layer multiplies its weight with."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompress import _C
from lrcompress.ops._arrays import check_writable, with_values
from lrcompress.ops._cuda import has_kernels
from lrcompress.ops._windows import Axis, Cell, Offset, Triple, centre, offsets, rounds, tables

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
# A call takes so many images at a time that their copies stay below the size of its input, or below this.
_COPY_BYTES = 1 << 20
_RUN = 1 << 12  # products that the compositions add up in float32
_FEW = 2  # channels of a group of which the CPU kernel's panels would be nearly empty
_LEAST_GROUPS = 8  # in a batch of products, or the library's bits depend on the number of threads
_PATCH_BYTES = 1 << 20  # patches of few channels that are stored at a time
_CUDA_TILE = 64  # channels of either side of a block of the CUDA kernel
_CUDA_WAVES = 4  # blocks for each multiprocessor


class Autocorrelation(NamedTuple):
    """Sums over patches; divided by ``count`` they are E[x x^T] and E[x]."""

    products: Tensor  # float64 [conv_groups, d, d], sum of patch patch^T, exactly symmetric
    sums: Tensor  # float64 [conv_groups, d], sum of patches
    count: int  # type: ignore[assignment]  # patches; hides tuple.count


def autocorrelation(
    x: Tensor,  # kernel == (): [..., in]; else [batch, in, *size] or [in, *size]; float16 to float64
    kernel: Sequence[int] = (),  # () for Linear, else one size for each of the 1 to 3 axes
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,  # also "same" and "valid"
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    into: Autocorrelation | None = None,
) -> Autocorrelation:  # d = in / groups * kernel area, ordered as the columns of weight.reshape(out, -1)
    """Add up ``vec(patch) vec(patch)^T`` over all samples and output positions, and the patches.

    With ``into`` its tensors are added to in place. Patches of all images are never stored: a block of the
    result belongs to two kernel positions, and at stride 1 all blocks of one distance share the product of
    the image with the shifted image, strips at the border apart. Above stride 1 those share that fall on the
    same pixels. On the CPU, groups of few channels, such as those of depthwise convolutions, are small
    products instead, of about a megabyte of patches at a time. All
    is exact but for rounding: float16, bfloat16 and float32 are added up in float32 over short runs, those in
    float64. The same input gives the same bits for any number of threads, and on CUDA in every call on one
    kind of device. Not differentiable.

    Raises:
        ValueError: A shape, dtype, device or setting does not fit.
    """
    x = with_values("x", x)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"x must be of a floating type of 16 to 64 bits, got {x.dtype}")
    dims = len(kernel)
    axes, pads = _geometry(x, kernel, stride, padding, dilation, groups, padding_mode)
    images = x
    images = images.reshape(1, axes[2].size, x.shape[-1]).mT if dims == 0 else images
    images = images[None] if images.ndim == dims + 1 else images
    groups_of = images.shape[1] // groups * math.prod(kernel)
    into = _zeros(groups, groups_of, x.device) if into is None else into
    _check_into(into, groups, groups_of, x.device)
    places = math.prod(axis.out for axis in axes)
    total = Autocorrelation(into.products, into.sums, into.count + len(images) * places)
    if images.numel() == 0 or places == 0:
        return total
    apart = math.prod(kernel) > 1 and all(axis.stride >= axis.span for axis in axes)
    padded = any(any(pad) for pad in pads)
    on_cuda = has_kernels(x)  # which packs nothing
    copied = apart or padded or not (on_cuda or x.dtype in (torch.float32, torch.float64))
    whole = on_cuda and not copied
    packed = not on_cuda and not _is_depthwise(x.device, groups, images.shape[1] // groups)
    for part in [images] if whole else _parts(images, groups, 0 if dims else 2, copied, packed):
        if padded:
            part = F.pad(part, [end for pad in reversed(pads) for end in pad], mode=padding_mode)
        part_axes = axes if dims else _samples(part.shape[2])
        _add(part.unflatten(1, (groups, -1)), part_axes, apart, into)
    return total


def _add(
    part: Tensor,  # [batch, groups, in / groups, *size]; without a kernel [1, groups, in / groups, samples]
    axes: tuple[Axis, Axis, Axis],
    apart: bool,
    into: Autocorrelation,
) -> None:
    """Add what some of the images contribute."""
    x = part[(slice(None),) * 3 + (None,) * (6 - part.ndim)]
    if _is_depthwise(x.device, *x.shape[1:3]):
        _multiply_patches(x if x.dtype == torch.float64 else x.float(), axes, into.products, into.sums)
        return
    if apart:
        x = _patches(x, axes)
        axes = _samples(x.shape[5])
    if has_kernels(x):
        _multiply_on_cuda(x, axes, into.products)
        _add_sums(x, axes, into.sums)
        return
    x = x if x.dtype == torch.float64 else x.float()
    call = _multiply if x.device.type == "cpu" else _compose
    call(x, axes, into.products, into.sums)


def _is_depthwise(device: torch.device, groups: int, channels: int) -> bool:
    """Say whether the groups are so many and small that the library multiplies stored patches faster."""
    return device.type == "cpu" and groups >= _LEAST_GROUPS and channels <= _FEW


def _samples(count: int) -> tuple[Axis, Axis, Axis]:
    """Describe inputs of a Linear as the pixels of one row."""
    return Axis(1), Axis(1), Axis(count, out=count)


def _zeros(groups: int, side: int, device: torch.device) -> Autocorrelation:
    products = torch.zeros(groups, side, side, dtype=torch.float64, device=device)
    return Autocorrelation(products, torch.zeros(groups, side, dtype=torch.float64, device=device), 0)


def _parts(
    images: Tensor,  # [batch, in, *size]
    groups: int,
    along: int,
    copied: bool,  # before the kernel packs it
    packed: bool,
) -> Sequence[Tensor]:
    """Split so that a part's copies, whose channels the kernel pads, stay below the size of the whole."""
    wide = max(images.element_size(), 4)
    panel = 64 // wide if packed else 1
    inside = images.shape[1] // groups
    entries = images.numel() // images.shape[along] // inside * -(-inside // panel) * panel
    limit = max(images.numel() * images.element_size(), _COPY_BYTES) // (1 + copied)
    parts: Sequence[Tensor] = images.split(max(1, limit // (entries * wide)), along)
    return parts


def _per_axis(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ValueError(f"{name} must be one number or {dims}, as many as the kernel, got {value}")
    return values


def _geometry(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
) -> tuple[tuple[Axis, Axis, Axis], list[tuple[int, int]]]:  # axes; what must be padded before
    """Check everything, and describe the axes, of which the first ones may be of size 1."""
    dims = len(kernel)
    if dims > 3 or x.ndim not in ((dims + 1, dims + 2) if dims else range(1, x.ndim + 1)):
        expected = f"[in, {dims} sizes] or [batch, in, {dims} sizes]" if 0 < dims <= 3 else "[..., in]"
        raise ValueError(f"x must be {expected} for kernel {tuple(kernel)}, got shape {tuple(x.shape)}")
    channels = x.shape[-1] if dims == 0 else x.shape[-dims - 1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {_PADDING_MODES}, got {padding_mode!r}")
    if dims == 0:
        rows = x.numel() // channels if channels else math.prod(x.shape[:-1])
        return _samples(rows), []
    strides, dilations = _per_axis("stride", stride, dims), _per_axis("dilation", dilation, dims)
    if min(*kernel, *strides, *dilations) < 1:
        raise ValueError(
            f"kernel, stride and dilation must be at least 1, got {tuple(kernel)}, {strides} and {dilations}"
        )
    axes, pads = [], []
    ends = _padding(kernel, strides, padding, dilations)
    for i, (size, (before, after)) in enumerate(zip(x.shape[-dims:], ends, strict=True)):
        span, padded = Axis(size, kernel[i], dilation=dilations[i]).span, size + before + after
        if span > padded:
            raise ValueError(f"the kernel must span at most {padded}, the padded size, got {span}")
        out = (padded - span) // strides[i] + 1
        inside = padding_mode == "zeros"
        pads.append((0, 0) if inside else (before, after))
        size, before = (size, before) if inside else (padded, 0)
        axes.append(Axis(size, kernel[i], strides[i], before, dilations[i], out))
    first, second, third = [Axis(1)] * (3 - dims) + axes
    return (first, second, third), pads


def _padding(
    kernel: Sequence[int], stride: Sequence[int], padding: int | Sequence[int] | str, dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is added before and after each axis."""
    if padding == "same":
        if max(stride) > 1:
            raise ValueError(f"padding 'same' needs stride 1, got {tuple(stride)}")
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    if isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        padding = 0
    values = _per_axis("padding", padding, len(kernel))
    if min(values) < 0:
        raise ValueError(f"padding must be at least 0, got {values}")
    return [(p, p) for p in values]


def _check_into(into: Autocorrelation, groups: int, side: int, device: torch.device) -> None:
    shapes = {"products": (groups, side, side), "sums": (groups, side)}
    for (name, shape), tensor in zip(shapes.items(), into[:2], strict=True):
        check_writable(f"into.{name}", tensor)
        if (tensor.dtype, tensor.device, tensor.shape) != (torch.float64, device, shape):
            raise ValueError(
                f"into.{name} must be float64 {list(shape)} on {device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"into.{name} must be contiguous, got strides {tensor.stride()}")


def _patches(
    x: Tensor,  # [batch, groups, in / groups, *three sizes]
    axes: tuple[Axis, Axis, Axis],
) -> Tensor:  # [1, groups, d, 1, 1, patches]
    """Store patches that do not overlap, hence no more than the pixels: there is nothing to share."""
    return _view(x, axes).flatten(1, 4).flatten(2)[None, :, :, None, None]


def _view(
    x: Tensor,  # [batch, groups, in / groups, *three sizes]
    axes: tuple[Axis, Axis, Axis],
) -> Tensor:  # [groups, in / groups, *three kernel sizes, batch, *three outputs]
    """Make a view of the padded pixels that has every patch."""
    ends = [(a.padding, (a.out - 1) * a.stride + a.span - a.padding - a.size) for a in axes]
    x = F.pad(x, [end for pair in reversed(ends) for end in pair])
    for i, axis in enumerate(axes):
        x = x.unfold(3 + i, axis.span, axis.stride)[..., :: axis.dilation]
    return x.permute(1, 2, 6, 7, 8, 0, 3, 4, 5)


def _multiply_patches(
    x: Tensor,  # [batch, groups, in / groups, *three sizes] float32 or float64
    axes: tuple[Axis, Axis, Axis],
    products: Tensor,
    sums: Tensor,
) -> None:
    """Store and multiply the patches of some outputs and groups at a time with the library."""
    view = _view(x, axes)
    total = torch.zeros_like(products)
    few = _LEAST_GROUPS * products.shape[1] * x.element_size()
    for box in _boxes(view.shape[5:], max(1, min(_RUN, _PATCH_BYTES // few))):
        some = view[(slice(None),) * 5 + box]
        chunks = -(-some.numel() * x.element_size() // _PATCH_BYTES)
        chunks = min(chunks, len(view) // _LEAST_GROUPS)
        ends = [len(view) * i // chunks for i in range(chunks + 1)]
        for groups in map(slice, ends, ends[1:]):
            patches = some[groups].flatten(1, 4).flatten(2)
            total[groups] += patches @ patches.mT
            sums[groups] += patches.sum(2)
    products += total.tril() + total.tril(-1).mT  # the library rounds both halves


def _boxes(counts: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cut an array into boxes of at most so many entries."""
    cuts = []
    for count in reversed(counts):
        step = min(count, most)
        most //= step
        cuts.append([slice(i, i + step) for i in range(0, count, step)])
    return product(*reversed(cuts))


def _multiply(
    x: Tensor,  # [batch, groups, in / groups, *three sizes] float32 or float64 on the CPU
    axes: tuple[Axis, Axis, Axis],
    products: Tensor,
    sums: Tensor,
) -> None:
    """Call the kernel."""
    step = [axis.stride for axis in axes]
    bits = 8 * x.element_size()
    layout = (x.data_ptr(), bits, x.shape, x.stride(), step)
    _C.autocorrelation(*layout, tables(axes, x.device), products, sums, torch.get_num_threads())


def _multiply_on_cuda(
    x: Tensor,  # [batch, groups, in / groups, *three sizes] float32, bfloat16 or float16
    axes: tuple[Axis, Axis, Axis],
    products: Tensor,
) -> None:
    """Call the kernel for as many offsets at a time as a workspace of the size of x has room for."""
    groups, channels = x.shape[1:3]
    tiles = -(-channels // _CUDA_TILE)
    pixels = x.numel() // (groups * channels)
    wanted = _CUDA_WAVES * torch.cuda.get_device_properties(x.device).multi_processor_count
    room = max(x.numel() * x.element_size(), _COPY_BYTES)
    plan = rounds(axes, pixels, groups * channels**2, groups * tiles**2, wanted, room)
    workspace = products.new_empty(plan.splits * plan.cells * groups * channels**2)
    dtype = str(x.dtype).removeprefix("torch.")
    step = [axis.stride for axis in axes]
    table = tables(axes, x.device)
    with torch.cuda.device(x.device):
        for one in plan.ranges:
            layout = (x.data_ptr(), dtype, x.shape, x.stride(), step)
            _C.autocorrelation_round(*layout, table, products, one, plan.splits, workspace)


def _compose(
    x: Tensor,  # [batch, groups, in / groups, *three sizes] float32 or float64
    axes: tuple[Axis, Axis, Axis],
    products: Tensor,
    sums: Tensor,
) -> None:
    """Multiply cell by cell with the library."""
    groups, channels = x.shape[1:3]
    last = x.permute(1, 0, 3, 4, 5, 2).contiguous()
    area = math.prod(axis.kernel for axis in axes)
    blocks = products.view(groups, channels, area, channels, area)
    stride = (axes[0].stride, axes[1].stride, axes[2].stride)
    for offset in offsets(axes):
        cells = [_product(last, cell, offset, stride) for cell in offset.cells]
        if offset.distance == (0, 0, 0):
            cells = [cell.tril() + cell.tril(-1).mT for cell in cells]  # the library rounds both halves
        for u, v, inside in offset.windows:
            for i in inside:
                blocks[:, :, u, :, v] += cells[i]
                if u != v:
                    blocks[:, :, v, :, u] += cells[i].mT
    _add_sums(x, axes, sums)


def _add_sums(
    x: Tensor,  # [batch, groups, in / groups, *three sizes]
    axes: tuple[Axis, Axis, Axis],
    sums: Tensor,
) -> None:
    """Add up the pixels of cells with the library."""
    groups, channels = x.shape[1:3]
    last = x.permute(1, 0, 3, 4, 5, 2)
    stride = (axes[0].stride, axes[1].stride, axes[2].stride)
    for offset in centre(axes):
        taken = (_take(last, cell.start, cell.count, stride) for cell in offset.cells)
        totals = [pixels.sum((1, 2, 3, 4), dtype=torch.float64) for pixels in taken]
        for u, _, inside in offset.windows:
            for i in inside:
                sums.view(groups, channels, -1)[:, :, u] += totals[i]


def _take(
    last: Tensor,  # [groups, batch, *three sizes, channels]
    start: Triple,
    count: Triple,
    stride: Triple,
) -> Tensor:  # [groups, batch, *three counts, channels]
    for i in range(3):
        last = last[(slice(None),) * (2 + i) + (slice(start[i], None, stride[i]),)].narrow(2 + i, 0, count[i])
    return last


def _product(
    last: Tensor,  # [groups, batch, *three sizes, channels]
    cell: Cell,
    offset: Offset,
    stride: Triple,
) -> Tensor:  # float64 [groups, channels, channels]
    z, y, x = (s + d for s, d in zip(cell.start, offset.distance, strict=True))
    pixels = _take(last, cell.start, cell.count, stride).flatten(1, 4).split(_RUN, 1)
    shifted = _take(last, (z, y, x), cell.count, stride).flatten(1, 4).split(_RUN, 1)
    total = torch.zeros((), dtype=torch.float64, device=last.device)
    for a, b in zip(pixels, shifted, strict=True):
        total = total + (a.mT @ b).double()
    return total
