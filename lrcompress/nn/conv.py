"""A convolution as two: an encoder to a few channels and a decoder, the kernel's axes shared out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress import ops
from lrcompress.nn.choices import Activation, Kernel, check_choices, choices_repr, is_traced, takes_fused
from lrcompress.nn.weight import check_new_weight, decoders, take_decoder, weight_of
from lrcompress.ops._activations import activate
from lrcompress.ops._processor import has_native_bfloat16
from lrcompress.types import encoder_axes

Size = int | Sequence[int]


class _Part(NamedTuple):
    """Geometry of the encoder or of the decoder: what the other part owns is 1, or 0 for padding."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, for each axis
    dilation: tuple[int, ...]


class _LowRankConv(nn.Module):
    """Convolve with V, then with U: abstract over the number of spatial axes.

    The encoder V [conv_groups groups rank, in / conv_groups / groups, *kernel] has ``conv_groups x groups``
    groups, the decoder U [out, groups rank, *kernel] has ``conv_groups``; ``scheme`` says which of them spans
    an axis of the kernel (0: encoder all, 1: encoder the width, 2: encoder the height, 3: decoder all) and
    with it takes that axis's stride, padding and dilation. ``padding_mode`` holds for both, the bias is the
    decoder's.
    """

    axes: int
    convolve: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        rank: int,
        groups: int = 1,
        *,
        scheme: int = 0,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        conv_groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: Activation = "none",
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_choices(activation, kernel)
        self.activation, self.kernel = activation, kernel
        if (
            conv_groups < 1
            or out_channels % conv_groups
            or in_channels % (conv_groups * max(groups, 1))
            or groups < 1
        ):
            raise ValueError(
                f"conv_groups must divide out_channels={out_channels} and conv_groups x groups in_channels="
                f"{in_channels}, got conv_groups={conv_groups}, groups={groups}"
            )
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.in_channels, self.out_channels, self.rank, self.groups = in_channels, out_channels, rank, groups
        self.scheme, self.conv_groups, self.padding_mode = scheme, conv_groups, padding_mode
        self.kernel_size = self._each(kernel_size)
        self.stride, self.dilation = self._each(stride), self._each(dilation)
        self.padding = padding if isinstance(padding, str) else self._each(padding)
        mine = encoder_axes(scheme, self.axes)
        geometry = (self.stride, self.padding, self.dilation)
        self.encoder = self._part(mine, *geometry)
        self.decoder = self._part(tuple(not own for own in mine), *geometry)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = conv_groups * groups
        self.U = nn.Parameter(torch.empty(out_channels, groups * rank, *self.decoder.kernel, **made))
        self.V = nn.Parameter(torch.empty(inner * rank, in_channels // inner, *self.encoder.kernel, **made))
        self.bias = nn.Parameter(torch.empty(out_channels, **made)) if bias else None
        self.reset_parameters()

    def _each(self, size: Size) -> tuple[int, ...]:
        """Spread one size over all axes."""
        return (size,) * self.axes if isinstance(size, int) else tuple(size)

    def _part(self, mine: tuple[bool, ...], stride: Any, padding: Any, dilation: Any) -> _Part:
        """Return the geometry of the part that owns the given axes."""
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, self.kernel_size, strict=True)]
            both = [(t // 2, t - t // 2) for t in total]
        else:
            both = [(0, 0)] * self.axes if isinstance(padding, str) else [(p, p) for p in padding]
        return _Part(
            tuple(k if own else 1 for k, own in zip(self.kernel_size, mine, strict=True)),
            tuple(s if own else 1 for s, own in zip(stride, mine, strict=True)),
            tuple(p if own else (0, 0) for p, own in zip(both, mine, strict=True)),
            tuple(d if own else 1 for d, own in zip(dilation, mine, strict=True)),
        )

    def reset_parameters(self) -> None:
        """Draw both factors so that the outputs vary as those of a new convolution do."""
        nn.init.kaiming_uniform_(self.V, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.U, nonlinearity="linear")
        if self.bias is not None:
            fan_in = self.in_channels // self.conv_groups * math.prod(self.kernel_size)
            nn.init.uniform_(self.bias, -1 / math.sqrt(max(fan_in, 1)), 1 / math.sqrt(max(fan_in, 1)))

    @property
    def weight(self) -> Tensor:  # [out, in / conv_groups, *kernel]
        """What the factors multiply out to, for code that reads the weight of any layer."""
        return weight_of(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a new weight goes to the factors."""
        if name == "weight":
            self.take_weight(value)
        else:
            super().__setattr__(name, value)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (self.out_channels, self.in_channels // self.conv_groups, *self.kernel_size)

    def factors(self) -> tuple[Tensor, ...]:
        """Return U and V."""
        return self.U, self.V

    def take_weight(self, weight: Tensor) -> None:
        """Change U so that the factors multiply out to a weight.

        Raises:
            WeightError: there is no such U.
        """
        check_new_weight(self, weight)
        sizes = [
            pair[i] for pair in zip(self.encoder.kernel, self.decoder.kernel, strict=True) for i in (0, 1)
        ]
        W = weight.detach().reshape(*self.weight_shape[:2], *sizes)
        order = [2 + 2 * i + part for part in (0, 1) for i in range(self.axes)]
        W = W.permute(0, 1, *order).reshape(
            self.conv_groups,
            self.out_channels // self.conv_groups,
            self.groups,
            -1,
            math.prod(self.encoder.kernel),
            math.prod(self.decoder.kernel),
        )
        blocks = W.permute(0, 2, 1, 5, 3, 4).flatten(4).flatten(2, 3).flatten(0, 1)  # [groups, out d, in e]
        V = self.V.detach().unflatten(0, (-1, self.rank)).flatten(2)
        U = decoders(self, blocks, V).unflatten(1, (-1, W.shape[5])).unflatten(0, (-1, self.groups))
        take_decoder(self, U.permute(0, 2, 1, 4, 3), weight)

    def run_factors(self, input: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor | None:
        """Apply the factors in a convolution of another geometry, without the layer's bias and activation."""
        stride, padding, dilation, groups = geometry
        if groups != self.conv_groups:
            return None
        each = (self._each(stride), padding if isinstance(padding, str) else self._each(padding))
        mine = encoder_axes(self.scheme, self.axes)
        z = input
        for own, weight, b, count in (
            (mine, self.V, None, groups * self.groups),
            (tuple(not axis for axis in mine), self.U, bias, groups),
        ):
            z = self._run(self._part(own, *each, self._each(dilation)), z, weight, b, count, "zeros")
        return z

    def multiplied_out(self) -> Tensor:  # [out, in / conv_groups, *kernel]
        """Return the product of the factors."""
        return self.product(self.U, self.V)

    def product(self, U: Tensor, V: Tensor) -> Tensor:  # [out, in / conv_groups, *kernel]
        """Return what factors shaped as those of the layer multiply out to."""
        outer = (self.conv_groups, self.out_channels // self.conv_groups, self.groups, self.rank)
        U = U.reshape(*outer, *self.decoder.kernel).flatten(4)
        V = V.unflatten(0, (self.conv_groups, self.groups, self.rank)).flatten(4)
        product = torch.einsum("gokjd,gkjne->gokned", U, V)
        sizes = [*self.encoder.kernel, *self.decoder.kernel]
        weight = product.reshape(self.out_channels, -1, *sizes)
        pairs = [axis for i in range(self.axes) for axis in (2 + i, 2 + self.axes + i)]
        return weight.permute(0, 1, *pairs).reshape(self.out_channels, -1, *self.kernel_size)

    def forward(
        self,
        input: Tensor,  # [batch, in_channels, *size], or without the batch
    ) -> Tensor:  # [batch, out_channels, *size]
        """Apply the layer."""
        mode, groups = self.padding_mode, self.conv_groups
        z = self._run(self.encoder, input, self.V, None, groups * self.groups, mode)
        return activate(self._run(self.decoder, z, self.U, self.bias, groups, mode), self.activation)

    def runs_fused(self, input: Tensor) -> bool:
        """Say whether a fused op runs this call."""
        return False

    def _run(
        self, part: _Part, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, mode: str
    ) -> Tensor:
        """Pad and convolve; symmetric zeros go to the convolution itself."""
        padding: tuple[int, ...] = tuple(before for before, _ in part.padding)
        if any(map(sum, part.padding)) and (
            mode != "zeros" or any(before != after for before, after in part.padding)
        ):
            sides = [side for pair in reversed(part.padding) for side in pair]
            x = F.pad(x, sides, mode="constant" if mode == "zeros" else mode)
            padding = (0,) * self.axes
        return type(self).convolve(x, weight, bias, part.stride, padding, part.dilation, groups)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
        text += f", groups={self.groups}, scheme={self.scheme}, stride={self.stride}, padding={self.padding}"
        text += f", dilation={self.dilation}, conv_groups={self.conv_groups}, bias={self.bias is not None}"
        text += f", padding_mode={self.padding_mode}" if self.padding_mode != "zeros" else ""
        return text + choices_repr(self.activation, self.kernel)


# Where the fused op is ahead of two library calls in bench/lowrank_conv2d.py and bench/lowrank.py, in either
# memory format: at most so many input channels a group and entries of U, more of both for 3 x 3 kernels that
# Winograd's algorithm takes. 1 x 1 is a matrix product, the library's own; above 3 x 3 none is measured.
_WINOGRAD_LIMITS = 256, 1 << 16
_WINOGRAD_RANK = 8  # at least, of large groups: timed ad hoc, no benchmark here has lower ones
_DIRECT_LIMITS = 32, 1 << 14
_DIRECT_KERNEL_AREAS = range(2, 10)
# In bfloat16, where the library has instructions for it, bench/results/lowrank_conv2d.avx512.json has its two
# calls ahead for groups of some channels, unless there are so few pixels that calls take most of the time.
_NATIVE_BFLOAT16_INSIDE = 4
_NATIVE_BFLOAT16_PIXELS = 1 << 11  # of the batch's images


class LowRankConv1d(_LowRankConv):
    """A 1-D convolution in two parts; see ``LowRankConv2d``. Only scheme 0."""

    axes = 1
    convolve = staticmethod(F.conv1d)


class LowRankConv2d(_LowRankConv):
    """A 2-D convolution in two parts, ``conv(conv(x, V), U) + bias``, a drop-in for ``nn.Conv2d``.

    ``rank`` is the rank of each of the ``groups`` slices of an existing group's input channels. Full rank is
    ``min(out / conv_groups x decoder area, in / conv_groups / groups x encoder area)``. ``activation`` comes
    behind the bias. ``kernel`` says what runs in inference: "fused" wherever ``ops.lowrank_conv2d`` can,
    "composed" two convolutions, "auto" the one that a benchmark has ahead for such sizes on the CPU, and two
    convolutions elsewhere.
    """

    axes = 2
    convolve = staticmethod(F.conv2d)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        even = all(before == after for before, after in self.encoder.padding)
        self._fusable = self.scheme == 0 and self.conv_groups == 1 and self.padding_mode == "zeros" and even
        self._fused_pays = self._kernel_pays()
        self._before = tuple(before for before, _ in self.encoder.padding)
        self._packed = ops.PackedFactors()

    def forward(
        self,
        input: Tensor,  # [batch, in_channels, height, width], or without the batch
    ) -> Tensor:  # [batch, out_channels, height, width]
        """Apply the layer."""
        U, V, bias = self.U, self.V, self.bias  # once: a module takes its time to look them up
        if not self._runs_fused(input, U, V, bias):
            return super().forward(input)
        geometry = (self.encoder.stride, self._before, self.encoder.dilation, self.groups)
        return ops.lowrank_conv2d(input, U, V, bias, *geometry, self.activation, self._packed)

    def runs_fused(self, input: Tensor) -> bool:
        """Say whether ``ops.lowrank_conv2d`` runs this call: as ``kernel`` says, where the op can."""
        return self._runs_fused(input, self.U, self.V, self.bias)

    def _kernel_pays(self) -> bool:
        """Say whether "auto" takes the fused op on the CPU."""
        inside = self.in_channels // self.groups

        def within(limits: tuple[int, int]) -> bool:
            return inside <= limits[0] and self.U.numel() <= limits[1]

        if within(_DIRECT_LIMITS):
            return math.prod(self.kernel_size) in _DIRECT_KERNEL_AREAS
        steps = *self.encoder.stride, *self.encoder.dilation
        fits = self.kernel_size == (3, 3) and steps == (1, 1, 1, 1)
        return fits and within(_WINOGRAD_LIMITS) and self.rank >= _WINOGRAD_RANK

    def _library_pays(self, input: Tensor) -> bool:
        """Say whether "auto" leaves bfloat16 to two calls, as a graph, which is of any size, does."""
        inside = self.in_channels // self.groups
        if inside < _NATIVE_BFLOAT16_INSIDE:
            return False
        if torch.compiler.is_compiling():
            return True
        return input.numel() > _NATIVE_BFLOAT16_PIXELS * self.in_channels

    def _runs_fused(self, input: Tensor, *factors: Tensor | None) -> bool:
        wanted = self._fused_pays if self.kernel == "auto" else self.kernel == "fused"
        if not (wanted and self._fusable) or is_traced(input) or input.ndim != 4:
            return False
        if self.kernel == "auto" and has_native_bfloat16(input) and self._library_pays(input):
            return False
        return takes_fused(self.kernel, input, *factors)


class LowRankConv3d(_LowRankConv):
    """A 3-D convolution in two parts; see ``LowRankConv2d``. Only scheme 0."""

    axes = 3
    convolve = staticmethod(F.conv3d)
