"""One layer as planning sees it: shapes, the ways to factor it, and what each way costs."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from lrcompress.types.errors import PlanError

SPATIAL_AXES = {"Linear": 0, "Conv1d": 1, "Conv2d": 2, "Conv3d": 3}  # of the kinds of layers

# Sizes and counts above this could not be multiplied in float64 without rounding.
_LARGEST = 2**53
_LARGEST_ITEM = 16  # bytes: complex128


def _whole(name: str, value: object) -> int:
    """Return a number as an int; NumPy's integers are welcome, bools and fractions are not."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise PlanError(f"{name} must be a whole number, got {value!r}")
    return operator.index(value)


@dataclass(frozen=True)
class LowRank:
    """One way to factor a layer: fold scheme, column groups per existing group, rank per group."""

    scheme: int
    groups: int
    rank: int

    def __post_init__(self) -> None:
        for name in ("scheme", "groups", "rank"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))

    def __str__(self) -> str:
        return f"scheme {self.scheme}, groups {self.groups}, rank {self.rank}"


def encoder_axes(scheme: int, spatial: int) -> tuple[bool, ...]:
    """Say which spatial axes of the kernel the encoder spans; the decoder spans the others.

    0: all of them (channel-wise), 1: the width, 2: the height, 3: none.

    Raises:
        PlanError: a scheme other than 0 for a kernel that is not 2-D, or an unknown scheme.

    Source: Liebenwein et al. 2021; Denton et al. 2014 (0), Jaderberg et al. 2014 (1).
    """
    if scheme == 0:
        return (True,) * spatial
    if spatial != 2 or scheme not in (1, 2, 3):
        raise PlanError(
            f"scheme must be 0, or 1 to 3 for a 2-D kernel, got {scheme} for a {spatial}-D kernel"
        )
    return {1: (False, True), 2: (True, False), 3: (False, False)}[scheme]


@dataclass(frozen=True)
class Call:
    """One call of a layer while the example inputs ran."""

    repeats: float  # batch entries (conv) or rows (Linear) of the call for each sample of the example
    input_size: tuple[int, ...] = ()  # spatial; () for Linear
    output_size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.repeats <= _LARGEST:
            raise PlanError(f"repeats must be a number of at least 0, got {self.repeats}")
        if (
            len(self.input_size) != len(self.output_size)
            or min(self.input_size + self.output_size, default=0) < 0
        ):
            raise PlanError(f"sizes must be of equal length, got {self.input_size} and {self.output_size}")
        if max(math.prod(self.input_size), math.prod(self.output_size)) > _LARGEST:
            raise PlanError(f"sizes must be at most {_LARGEST}, got {self.input_size} and {self.output_size}")


@dataclass(frozen=True)
class Layer:
    """A compressible layer: its shape, and its calls while the example inputs ran."""

    name: str
    kind: str  # "Linear", "Conv1d", "Conv2d" or "Conv3d"
    weight_shape: tuple[int, ...]  # [out, in / conv_groups, *kernel]
    conv_groups: int = 1
    calls: tuple[Call, ...] = ()  # empty without example inputs
    latency: int = 0  # nanoseconds of the calls of the dense layer in one forward; 0: not measured
    itemsize: int = 4  # bytes of one weight

    def __post_init__(self) -> None:
        axes = SPATIAL_AXES.get(self.kind, -1)
        shape = list(self.weight_shape)
        if len(shape) != axes + 2 or min(shape) < 1 or math.prod(shape) > _LARGEST:
            raise PlanError(f"layer {self.name!r}: {self.kind} cannot have a weight {shape}")
        if self.conv_groups < 1 or shape[0] % self.conv_groups or (axes == 0 and self.conv_groups > 1):
            raise PlanError(f"layer {self.name!r}: a weight {shape} cannot lie in {self.conv_groups} groups")
        if self.latency < 0 or not 1 <= self.itemsize <= _LARGEST_ITEM:
            raise PlanError(
                f"layer {self.name!r}: latency must be >= 0 and itemsize 1 to {_LARGEST_ITEM}, "
                f"got {self.latency} and {self.itemsize}"
            )
        if any(len(call.output_size) != axes for call in self.calls):
            raise PlanError(f"layer {self.name!r}: a call of {self.kind} has {axes} spatial sizes")

    @property
    def out_channels(self) -> int:
        """Outputs of the layer."""
        return self.weight_shape[0]

    @property
    def group_channels(self) -> int:
        """Input channels of one existing group: what ``LowRank.groups`` must divide."""
        return self.weight_shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size; empty for Linear."""
        return self.weight_shape[2:]

    @property
    def schemes(self) -> tuple[int, ...]:
        """Fold schemes that give different factors: a 1 x 1 kernel has one."""
        return (0, 1, 2, 3) if len(self.kernel) == 2 and math.prod(self.kernel) > 1 else (0,)

    @property
    def params(self) -> int:
        """Weights of the dense layer; the bias stays and is not counted."""
        return math.prod(self.weight_shape)

    @property
    def bytes(self) -> int:
        """Bytes of the weights of the dense layer."""
        return self.params * self.itemsize

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer for one sample; 0 without example inputs."""
        return round(self.params * self.positions(0)[1])

    @property
    def dense(self) -> Option:
        """The option of leaving the layer as it is."""
        return Option(None, self.params, self.macs, 0.0, self.latency)

    def cost_of(self, option: Option, cost: str) -> int:
        """Return what an option costs in ``"params"``, ``"macs"``, ``"bytes"`` or ``"latency"``."""
        known = {"params": option.params, "macs": option.macs, "latency": option.latency}
        return option.params * self.itemsize if cost == "bytes" else known[cost]

    def kernel_areas(self, scheme: int) -> tuple[int, int]:
        """Kernel area of the encoder and of the decoder."""
        axes = encoder_axes(scheme, len(self.kernel))
        encoder = math.prod(size for size, mine in zip(self.kernel, axes, strict=True) if mine)
        return encoder, math.prod(self.kernel) // encoder

    def folded_shape(self, scheme: int) -> tuple[int, int]:
        """Rows and columns of the matrix that one existing group folds into."""
        encoder, decoder = self.kernel_areas(scheme)
        return self.out_channels // self.conv_groups * decoder, self.group_channels * encoder

    def full_rank(self, scheme: int, groups: int) -> int:
        """Rank per group at which the factors reproduce the weight."""
        rows, columns = self.folded_shape(scheme)
        return min(rows, columns // groups)

    def factor_sizes(self, scheme: int, groups: int) -> tuple[int, int]:
        """Parameters of the encoder and of the decoder for each unit of rank."""
        encoder, decoder = self.kernel_areas(scheme)
        return self.conv_groups * self.group_channels * encoder, groups * self.out_channels * decoder

    def positions(self, scheme: int) -> tuple[float, float]:
        """Output positions of the encoder and of the decoder for one sample.

        The encoder keeps the input's size along each axis whose kernel, and so stride, the decoder owns.
        """
        axes = encoder_axes(scheme, len(self.kernel))
        encoder = decoder = 0.0
        for call in self.calls:
            sizes = zip(axes, call.input_size, call.output_size, strict=True)
            encoder += call.repeats * math.prod(after if mine else before for mine, before, after in sizes)
            decoder += call.repeats * math.prod(call.output_size)
        return encoder, decoder

    def unit_cost(self, scheme: int, groups: int) -> tuple[int, float]:
        """Parameters, and multiply-accumulates for one sample, of each unit of rank."""
        sizes, positions = self.factor_sizes(scheme, groups), self.positions(scheme)
        return sum(sizes), sizes[0] * positions[0] + sizes[1] * positions[1]

    def option(self, config: LowRank, error: float = math.nan) -> Option:
        """Price one configuration.

        Raises:
            PlanError: the layer cannot be factored like that.
        """
        where = f"layer {self.name!r} with weight {list(self.weight_shape)}"
        if config.scheme not in self.schemes:
            raise PlanError(f"{where} takes schemes {self.schemes}, got {config.scheme}")
        if config.groups < 1 or self.group_channels % config.groups:
            raise PlanError(f"{where}: groups must divide {self.group_channels}, got {config.groups}")
        full = self.full_rank(config.scheme, config.groups)
        if not 1 <= config.rank <= full:
            raise PlanError(f"{where} has ranks 1 to {full} for groups {config.groups}, got {config.rank}")
        params, macs = self.unit_cost(config.scheme, config.groups)
        return Option(config, config.rank * params, round(config.rank * macs), error)


@dataclass(frozen=True)
class Option:
    """One choice for one layer: its configuration (None: dense), its cost and its error."""

    config: LowRank | None
    params: int
    macs: int
    error: float  # in the unit of the local step; nan: not evaluated
    latency: int = 0  # nanoseconds of the layer's calls in one forward; 0: not measured
