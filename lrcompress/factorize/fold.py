"""A convolution or linear weight as the matrix that a fold scheme factors, and its factors as two weights."""

from __future__ import annotations

from torch import Tensor

from lrcompress.types import Layer, LowRank, encoder_axes


def fold(
    weight: Tensor,  # [out, in / conv_groups, *kernel]
    layer: Layer,
    scheme: int,
) -> Tensor:  # [conv_groups, out / conv_groups * decoder area, in / conv_groups * encoder area]
    """Unfold each existing group's weight; columns run channel-major, so channel groups are column blocks."""
    axes = encoder_axes(scheme, len(layer.kernel))
    split = weight.unflatten(0, (layer.conv_groups, -1))
    encoder = [i + 3 for i, mine in enumerate(axes) if mine]
    decoder = [i + 3 for i, mine in enumerate(axes) if not mine]
    folded: Tensor = split.permute(0, 1, *decoder, 2, *encoder).reshape(
        layer.conv_groups, *layer.folded_shape(scheme)
    )
    return folded


def unfold_factors(
    left: Tensor,  # [conv_groups, groups, rows, rank]
    right: Tensor,  # [conv_groups, groups, rank, columns / groups]
    layer: Layer,
    config: LowRank,
) -> tuple[Tensor, Tensor]:
    """Arrange the factors of the folded matrix as the weights of two layers, decoder U and encoder V.

    U is [out, groups rank, *decoder kernel], V is [conv_groups groups rank, in / conv_groups / groups,
    *encoder kernel]; a kernel has size 1 along the axes that the other part owns.
    """
    axes = encoder_axes(config.scheme, len(layer.kernel))
    encoder = [size if mine else 1 for size, mine in zip(layer.kernel, axes, strict=True)]
    decoder = [1 if mine else size for size, mine in zip(layer.kernel, axes, strict=True)]
    rows = left.unflatten(
        2, (layer.out_channels // layer.conv_groups, -1)
    )  # [conv_groups, groups, out, area, rank]
    U = rows.permute(0, 2, 1, 4, 3).reshape(layer.out_channels, config.groups * config.rank, *decoder)
    V = right.reshape(layer.conv_groups * config.groups * config.rank, -1, *encoder)
    return U.contiguous(), V.contiguous()
