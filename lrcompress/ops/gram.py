"""Products of many matrices of different shapes with their own transposes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompress import _C
from lrcompress.ops._arrays import check_writable, with_values

# One problem: address, row stride, column stride, side, terms, offset in `out`, and tiles of those before it.
_Row = tuple[int, int, int, int, int, int, int]


def gram(
    batches: Sequence[Tensor],  # each [batch, side, terms], float32 or float64, of any strides, on one device
    out: Tensor | None = None,  # [at least the sum of batch * side^2] float64, aliases no batch
) -> list[Tensor]:  # each float64 [batch, side, side], views of `out`, one behind the other from its start on
    """Compute the lower triangle of ``A A^T`` in float64 for each matrix A of each batch.

    Entries above the diagonal are left as they were in ``out``. A transposed view gives ``A^T A``; no view is
    copied. The same matrix gives the same bits for any number of threads and whatever else is in the call.
    Not differentiable.

    Raises:
        ValueError: A dtype, shape, layout or device is not as annotated.
    """
    batches = [with_values(f"batches[{i}]", batch) for i, batch in enumerate(batches)]
    size = sum(_check_batch(i, batch) * batch.shape[1] for i, batch in enumerate(batches))
    if out is None:
        device = batches[0].device if batches else torch.device("cpu")
        out = torch.empty(size, dtype=torch.float64, device=device)
    _check_out(out, size)
    if any(batch.device != out.device for batch in batches):
        devices = sorted({str(tensor.device) for tensor in (*batches, out)})
        raise ValueError(f"batches and out must lie on one device, got {devices}")
    views, offset = [], 0
    for batch in batches:
        count, side, _ = batch.shape
        views.append(out[offset : offset + count * side * side].view(count, side, side))
        offset += count * side * side
    for dtype in (torch.float32, torch.float64):
        _multiply([(b, v) for b, v in zip(batches, views, strict=True) if b.dtype == dtype], out)
    return views


def _check_batch(index: int, batch: Tensor) -> int:  # batch * side
    if batch.ndim != 3 or batch.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"batches[{index}] must be a float32 or float64 [batch, side, terms] tensor, "
            f"got {batch.dtype} of shape {tuple(batch.shape)}"
        )
    return batch.shape[0] * batch.shape[1]


def _check_out(out: Tensor, size: int) -> None:
    check_writable("out", out)
    if out.dtype != torch.float64 or out.ndim != 1 or not out.is_contiguous() or len(out) < size:
        raise ValueError(
            f"out must be a contiguous float64 [at least {size}] tensor, "
            f"got {out.dtype} of shape {tuple(out.shape)}, strides {out.stride()}"
        )


def _multiply(
    pairs: list[tuple[Tensor, Tensor]],  # of a batch and its products, all batches of one dtype
    out: Tensor,
) -> None:
    """Call the kernel once for all matrices."""
    table: list[_Row] = []
    tiles = 0
    for batch, products in pairs:
        count, side, terms = batch.shape
        matrix_stride, row_stride, column_stride = batch.stride()
        tiles_each = _C.gram_tiles(side)
        offset = int(products.storage_offset()) - int(out.storage_offset())
        for i in range(count):
            address = batch.data_ptr() + i * matrix_stride * batch.element_size()
            matrix = (address, row_stride, column_stride)
            table.append((*matrix, side, terms, offset + i * side * side, tiles + i * tiles_each))
        tiles += count * tiles_each
    if tiles == 0:
        return
    on_device = torch.tensor(table, dtype=torch.int64, device=out.device)
    bits = 8 * pairs[0][0].element_size()
    if out.is_cuda:
        with torch.cuda.device(out.device):
            _C.gram(on_device, out, tiles, bits, torch.get_num_threads())
    else:
        _C.gram(on_device, out, tiles, bits, torch.get_num_threads())
