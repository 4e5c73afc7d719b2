"""Where the channels of a tensor are after a function that has no parameters.

Each rule returns the channels of its result, or None when it cannot follow them: then all of them stay.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from lrcompress.removal.spaces import Channels, Segment, Spaces

Shape = tuple[int, ...]


class Step(NamedTuple):
    """One node of the graph, with what its tensors look like."""

    node: fx.Node
    spaces: Spaces
    inputs: list[tuple[Channels | None, Shape]]  # of the node's tensor arguments, in their order
    shape: Shape  # of the result

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument of a call, given by position or by name."""
        args = self.node.args
        return args[position] if len(args) > position else self.node.kwargs.get(name, default)


Rule = Callable[[Step], Channels | None]


def pointwise(step: Step) -> Channels | None:
    """Each entry of the result depends on the same entry of the arguments: they share their channels."""
    placed = [
        (channels, channels.axis + len(step.shape) - len(shape))
        for channels, shape in step.inputs
        if channels is not None
    ]
    full = [
        Channels(axis, channels.segments)
        for channels, axis in placed
        if axis < len(step.shape) and _size(channels) == step.shape[axis]
    ]
    if not full:
        return None
    lead, reason = full[0], f"{step.node.name!r} combines it with channels that are laid out otherwise"
    for channels, axis in placed:
        if axis == lead.axis and _size(channels) == step.shape[axis]:
            step.spaces.join(lead.segments, channels.segments, reason)
        else:
            step.spaces.hold(channels.segments, f"{step.node.name!r} spreads it over other channels")
    for unknown, shape in step.inputs:
        axis = lead.axis - len(step.shape) + len(shape)
        if unknown is None and axis >= 0 and shape[axis] > 1:
            step.spaces.hold(
                lead.segments, f"{step.node.name!r} combines it with a tensor that was not followed"
            )
    return lead


def _size(channels: Channels) -> int:
    return sum(s.channels * s.width for s in channels.segments)


def spatial(axes: int | None) -> Rule:
    """Return the rule of what changes only the last ``axes`` axes (all but two if None), as pooling does."""

    def rule(step: Step) -> Channels | None:
        channels, shape = step.inputs[0]
        last = len(shape) - (axes or len(shape) - 2)
        return channels if channels is not None and channels.axis < last else None

    return rule


def reshaped(step: Step) -> Channels | None:
    """Find the axis in which a channel is still consecutive entries; the rest of a channel widens it."""
    channels, shape = step.inputs[0]
    if channels is None:
        return None
    leading, size = math.prod(shape[: channels.axis]), shape[channels.axis]
    trailing = math.prod(shape[channels.axis + 1 :])
    for axis in reversed(range(len(step.shape))):
        rest = math.prod(step.shape[axis + 1 :])
        fits = math.prod(step.shape[:axis]) == leading and step.shape[axis] * rest == size * trailing
        if fits and rest and trailing % rest == 0:
            widened = tuple(
                Segment(s.space, s.channels, s.width * trailing // rest) for s in channels.segments
            )
            return Channels(axis, widened)
    return None


def viewed(step: Step) -> Channels | None:
    """Follow a view unless the code fixes the size of the axis that would become narrower."""
    found = reshaped(step)
    sizes = step.node.args[1:] or (step.node.kwargs.get("shape") or step.node.kwargs.get("size"),)
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if found is None or len(sizes) != len(step.shape):
        return None
    size = sizes[found.axis]
    return found if isinstance(size, fx.Node) or size == -1 else None


def squeezed(step: Step) -> Channels | None:
    """Follow a squeeze of a named axis other than the channels'."""
    dim, (channels, shape) = step.argument(1, "dim"), step.inputs[0]
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if channels is None or not all(isinstance(d, int) and d % len(shape) != channels.axis for d in dims):
        return None
    return reshaped(step)


def reduced(step: Step) -> Channels | None:
    """Follow a sum or mean over other axes than the channels'."""
    dim, (channels, shape) = step.argument(1, "dim"), step.inputs[0]
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if channels is None or not all(isinstance(d, int) for d in dims):
        return None
    over = {d % len(shape) for d in dims}
    if channels.axis in over:
        return None
    before = sum(d < channels.axis for d in over) if len(step.shape) < len(shape) else 0
    return Channels(channels.axis - before, channels.segments)


def concatenated(step: Step) -> Channels | None:
    """Lay channels end to end, or join them where another axis is concatenated."""
    dim = step.argument(1, "dim", 0)
    if not isinstance(dim, int) or any(channels is None for channels, _ in step.inputs):
        return _concatenated_unknown(step, dim)
    parts = [channels for channels, _ in step.inputs if channels is not None]
    axis = parts[0].axis
    if any(part.axis != axis for part in parts):
        return None
    if dim % len(step.shape) == axis:
        return Channels(axis, tuple(s for part in parts for s in part.segments))
    for part in parts[1:]:
        step.spaces.join(
            parts[0].segments, part.segments, f"{step.node.name!r} joins channels laid out otherwise"
        )
    return parts[0]


def _concatenated_unknown(step: Step, dim: Any) -> Channels | None:
    """Concatenate along the channels where some parts were not followed: those stay whole."""
    axes = {channels.axis for channels, _ in step.inputs if channels is not None}
    if not isinstance(dim, int) or axes != {dim % len(step.shape)}:
        return None
    segments: list[Segment] = []
    for channels, shape in step.inputs:
        if channels is None:
            unknown = step.spaces.new(shape[dim])
            step.spaces.hold(unknown, f"part of {step.node.name!r} was not followed")
            segments += unknown
        else:
            segments += channels.segments
    return Channels(dim % len(step.shape), tuple(segments))


def permuted(step: Step) -> Channels | None:
    """Follow the channel axis through a permutation."""
    channels, shape = step.inputs[0]
    dims = step.node.args[1:] or (step.node.kwargs.get("dims"),)
    if len(dims) == 1 and isinstance(dims[0], tuple | list):
        dims = tuple(dims[0])
    if channels is None or not all(isinstance(d, int) for d in dims):
        return None
    return Channels([d % len(shape) for d in dims].index(channels.axis), channels.segments)  # type: ignore[operator]


def transposed(step: Step) -> Channels | None:
    """Follow the channel axis through the exchange of two axes."""
    channels, shape = step.inputs[0]
    dims = (step.argument(1, "dim0"), step.argument(2, "dim1"))
    if channels is None or not all(isinstance(d, int) for d in dims):
        return None
    one, other = (d % len(shape) for d in dims)
    return Channels({one: other, other: one}.get(channels.axis, channels.axis), channels.segments)


def padded(step: Step) -> Channels | None:
    """Follow padding that leaves the channel axis alone."""
    pad, (channels, shape) = step.argument(1, "pad"), step.inputs[0]
    if channels is None or not isinstance(pad, tuple | list):
        return None
    own = pad[2 * (len(shape) - 1 - channels.axis) :][:2]  # pairs from the last axis on
    return channels if not any(own) else None


def indexed(step: Step) -> Channels | None:
    """Follow slices and single entries of other axes than the channels'."""
    index, channels = step.argument(1, "index"), step.inputs[0][0]
    entries = index if isinstance(index, tuple) else (index,)
    if channels is None or not all(isinstance(entry, slice | int) for entry in entries):
        return None
    if len(entries) > channels.axis and entries[channels.axis] != slice(None):
        return None
    before = sum(isinstance(entry, int) for entry in entries[: channels.axis])
    return Channels(channels.axis - before, channels.segments)


_POINTWISE = (
    "abs clamp clamp_ clone contiguous detach double exp float half log neg relu relu_ sigmoid sigmoid_ sqrt "
    "square tanh tanh_ to type type_as erf add add_ sub sub_ mul mul_ div div_ maximum minimum pow"
)
_ACTIVATIONS = (
    "celu elu gelu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu sigmoid silu "
    "softplus softsign tanh tanhshrink hardshrink softshrink threshold dropout alpha_dropout dropout1d "
    "dropout2d dropout3d feature_alpha_dropout"
)
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
_SHAPING: dict[str, Rule] = {
    "flatten": reshaped,
    "view": viewed,
    "reshape": viewed,
    "squeeze": squeezed,
    "unsqueeze": reshaped,
    "permute": permuted,
    "transpose": transposed,
    "cat": concatenated,
    "concat": concatenated,
    "concatenate": concatenated,
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduced),
}
METHODS: dict[str, Rule] = {**dict.fromkeys(_POINTWISE.split(), pointwise), **_SHAPING}


def _functions() -> dict[Any, Rule]:
    """Return the rules of functions of torch, of ``torch.nn.functional`` and of operators."""
    found: dict[Any, Rule] = {}
    for module, names, rule in (
        (torch, _POINTWISE, pointwise),
        (F, _ACTIVATIONS, pointwise),
    ):
        found |= {getattr(module, name): rule for name in names.split() if hasattr(module, name)}
    for name, n in itertools.product(_POOLS, (1, 2, 3)):
        found |= {
            getattr(module, f"{name}{n}d"): spatial(n)
            for module in (F, torch)
            if hasattr(module, f"{name}{n}d")
        }
    found |= {getattr(torch, name): rule for name, rule in _SHAPING.items() if hasattr(torch, name)}
    binary = (operator.add, operator.sub, operator.mul, operator.truediv)
    in_place = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    found |= dict.fromkeys((*binary, *in_place, operator.neg, operator.pow), pointwise)
    return {**found, F.interpolate: spatial(None), F.pad: padded, operator.getitem: indexed}


FUNCTIONS = _functions()


def _modules() -> dict[type[nn.Module], Rule]:
    """Return the rules of modules without parameters."""
    activations = (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU "
        "ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold Dropout Dropout1d "
        "Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
    )
    found: dict[type[nn.Module], Rule] = {getattr(nn, name): pointwise for name in activations.split()}
    kinds = ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
    pads = ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad")
    for kind, n in itertools.product((*kinds, *pads), (1, 2, 3)):
        found[getattr(nn, f"{kind}{n}d")] = spatial(n)
    ups = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
    return {**found, **dict.fromkeys(ups, spatial(None)), nn.Flatten: reshaped}


MODULES = _modules()
