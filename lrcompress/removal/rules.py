"""Where the channels of a tensor are after a call of torch that has no parameters of a layer.

Each rule returns the channels of the call's result, or None when it cannot follow them: then all of them
stay. Calls are known by their names, which functions, methods and operators share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lrcompress.removal.spaces import Channels, Segment, Spaces, size_of
from lrcompress.removal.widths import Width

Shape = tuple[int, ...]


class Step(NamedTuple):
    """One call of torch, with what is known of its tensors."""

    name: str
    where: str  # the operator and the module that calls it, for reasons
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    spaces: Spaces
    inputs: list[tuple[Channels | None, Shape]]  # of the tensor arguments, in their order
    shape: Shape  # of the result, the first if there are several

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument of a call, given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def sizes(self, name: str) -> tuple[Any, ...]:
        """Return numbers that are given one by one or as a sequence, after the tensor or by name."""
        found = tuple(self.args[1:]) or (self.kwargs.get(name, self.kwargs.get("size", ())),)
        return tuple(found[0]) if len(found) == 1 and isinstance(found[0], tuple | list) else found


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
        if axis < len(step.shape) and size_of(channels.segments) == step.shape[axis]
    ]
    if not full:
        return None
    lead, reason = full[0], f"{step.where} combines it with channels that are laid out otherwise"
    for channels, axis in placed:
        if axis == lead.axis and size_of(channels.segments) == step.shape[axis]:
            step.spaces.join(lead.segments, channels.segments, reason)
        else:
            step.spaces.hold(channels.segments, f"{step.where} spreads it over other channels")
    for unknown, shape in step.inputs:
        axis = lead.axis - len(step.shape) + len(shape)
        if unknown is None and axis >= 0 and shape[axis] > 1:
            step.spaces.hold(lead.segments, f"{step.where} combines it with a tensor that was not followed")
    return lead


def first_alone(step: Step) -> Channels | None:
    """Follow the first tensor; another one gives its type alone."""
    return step.inputs[0][0]


def per_channel(step: Step) -> Channels | None:
    """Join vectors of one entry for each channel with the second axis, as batch norm does."""
    channels, shape = step.inputs[0]
    if channels is None or channels.axis != min(1, len(shape) - 1):
        return None
    for vector, of in step.inputs[1:]:
        if vector is not None and of == (shape[channels.axis],):
            step.spaces.join(
                channels.segments, vector.segments, f"{step.where} has channels that are laid out otherwise"
            )
        elif math.prod(of) > 1:
            step.spaces.hold(channels.segments, f"{step.where} has a vector that was not followed")
    return channels


def prelu(step: Step) -> Channels | None:
    """Follow an activation that has one slope, or one for each channel."""
    return pointwise(step) if math.prod(step.inputs[-1][1]) == 1 else per_channel(step)


def over_last(step: Step) -> Channels | None:
    """Follow what mixes only the last axes, those of a given shape, as layer norm does."""
    channels, shape = step.inputs[0]
    normalized = step.argument(1, "normalized_shape", shape)
    return channels if channels is not None and channels.axis < len(shape) - len(normalized) else None


def spatial(axes: int | None) -> Rule:
    """Return the rule of what changes only the last ``axes`` axes (all but two if None), as pooling does."""

    def rule(step: Step) -> Channels | None:
        channels, shape = step.inputs[0]
        last = len(shape) - (axes or len(shape) - 2)
        return channels if channels is not None and channels.axis < last else None

    return rule


def along_others(step: Step) -> Channels | None:
    """Follow what mixes the entries of one axis, other than the channels', as softmax does."""
    dim, (channels, shape) = step.argument(1, "dim"), step.inputs[0]
    if channels is None or type(dim) is not int or dim % len(shape) == channels.axis:
        return None
    return channels


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
    found, sizes = reshaped(step), step.sizes("shape")
    fit = _widths_fit(step, sizes, found)
    return found if found is not None and fit and not _fixed(step, sizes, found) else None


def expanded(step: Step) -> Channels | None:
    """Follow an expansion of axes other than the channels'."""
    (channels, shape), sizes = step.inputs[0], step.sizes("sizes")
    if channels is None:
        return None
    found = Channels(channels.axis + len(step.shape) - len(shape), channels.segments)
    fit = _widths_fit(step, sizes, found)
    whole = step.shape[found.axis] == size_of(found.segments)
    return found if whole and fit and not _fixed(step, sizes, found) else None


def _fixed(step: Step, sizes: tuple[Any, ...], found: Channels) -> bool:
    """Say whether code gives the size of the channels' axis as a plain number."""
    return len(sizes) != len(step.shape) or not (
        isinstance(sizes[found.axis], Width) or sizes[found.axis] == -1
    )


def _widths_fit(step: Step, sizes: tuple[Any, ...], found: Channels | None) -> bool:
    """Say whether a width is the size of its own channels' axis, if of that axis; keep all others whole."""
    fit = True
    for axis, size in enumerate(sizes):
        own = found is not None and axis == found.axis
        if isinstance(size, Width) and not (own and _counts(step.spaces, size, found)):
            size.watcher.used(size, step.name)
            fit = fit and not own
    return fit


def _counts(spaces: Spaces, size: Width, found: Channels | None) -> bool:
    """Say whether a number counts the indices of these channels, or a multiple of them."""
    counted, channels = spaces.resolved(size.segments), spaces.resolved(found.segments if found else ())
    alike = [s[:2] for s in counted] == [s[:2] for s in channels]
    return alike and len({one.width / other.width for one, other in zip(counted, channels, strict=True)}) == 1


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
        step.spaces.join(parts[0].segments, part.segments, f"{step.where} joins channels laid out otherwise")
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
            step.spaces.hold(unknown, f"part of what {step.where} joins was not followed")
            segments += unknown
        else:
            segments += channels.segments
    return Channels(dim % len(step.shape), tuple(segments))


def stacked(step: Step) -> Channels | None:
    """Join channels of tensors that become the entries of a new axis."""
    dim, parts = step.argument(1, "dim", 0), [channels for channels, _ in step.inputs]
    first = parts[0]
    if first is None or any(part is None or part.axis != first.axis for part in parts):
        return None
    for part in parts[1:]:
        assert part is not None
        step.spaces.join(first.segments, part.segments, f"{step.where} joins channels laid out otherwise")
    return Channels(first.axis + (dim % len(step.shape) <= first.axis), first.segments)


def unbound(step: Step) -> Channels | None:
    """Follow the entries of another axis than the channels'."""
    dim, (channels, shape) = step.argument(1, "dim", 0), step.inputs[0]
    if channels is None or dim % len(shape) == channels.axis:
        return None
    return Channels(channels.axis - (dim % len(shape) < channels.axis), channels.segments)


def cut(step: Step) -> Channels | None:
    """Follow pieces of another axis than the channels'."""
    dim, (channels, shape) = step.argument(2, "dim", 0), step.inputs[0]
    return None if channels is None or dim % len(shape) == channels.axis else channels


def permuted(step: Step) -> Channels | None:
    """Follow the channel axis through a permutation."""
    (channels, shape), dims = step.inputs[0], step.sizes("dims")
    if channels is None or not all(isinstance(d, int) for d in dims):
        return None
    return Channels([d % len(shape) for d in dims].index(channels.axis), channels.segments)


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
    """Follow slices, single entries and new axes beside the channels' axis."""
    index, (channels, shape) = step.argument(1, "index"), step.inputs[0]
    entries = list(index) if isinstance(index, tuple) else [index]
    simple = all(
        entry is None or entry is Ellipsis or isinstance(entry, slice) or type(entry) is int
        for entry in entries
    )
    if channels is None or not simple:
        return None
    taken = sum(entry is not None and entry is not Ellipsis for entry in entries)
    rest = [slice(None)] * (len(shape) - taken)
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    axis, result = 0, 0
    for entry in (*entries[:at], *rest, *entries[at + 1 :]):
        if entry is None:
            result += 1
            continue
        if axis == channels.axis:
            return Channels(result, channels.segments) if entry == slice(None) else None
        axis, result = axis + 1, result + isinstance(entry, slice)
    return None


_POINTWISE = (
    "abs add addcdiv addcmul alpha_dropout atan bfloat16 bitwise_not ceil celu clamp clamp_max "
    "clamp_min clip clone contiguous cos cpu cuda data detach div divide double dropout dropout1d "
    "dropout2d dropout3d elu eq erf exp expm1 feature_alpha_dropout float floor full_like ge gelu gt "
    "half hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan le leaky_relu lerp log log1p "
    "logical_and logical_not logical_or logsigmoid lt masked_fill maximum minimum mish mul multiply "
    "nan_to_num ne neg negative ones_like positive pow rdiv reciprocal relu relu6 round rpow rrelu "
    "rsqrt rsub rtruediv selu sigmoid sign silu sin softplus softshrink softsign sqrt square sub "
    "subtract tan tanh tanhshrink threshold true_divide truediv where zeros_like"
)
_SPATIAL = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
_SHAPING: dict[str, Rule] = {
    "flatten": reshaped,
    "view": viewed,
    "reshape": viewed,
    "expand": expanded,
    "squeeze": squeezed,
    "unsqueeze": reshaped,
    "permute": permuted,
    "transpose": transposed,
    "swapaxes": transposed,
    "swapdims": transposed,
    "cat": concatenated,
    "concat": concatenated,
    "concatenate": concatenated,
    "stack": stacked,
    "unbind": unbound,
    "chunk": cut,
    "split": cut,
    "tensor_split": cut,
    "pad": padded,
    "getitem": indexed,
}

TAKE_WIDTHS = ("view", "reshape", "expand")  # whose rules look at the widths among their arguments

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    **dict.fromkeys(("to", "type", "type_as"), first_alone),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "std"), reduced),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), along_others),
    **dict.fromkeys(("batch_norm", "instance_norm"), per_channel),
    **dict.fromkeys(("layer_norm", "rms_norm"), over_last),
    **{f"{name}{n}d": spatial(n) for name in _SPATIAL for n in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"), spatial(None)),
    "prelu": prelu,
    **_SHAPING,
}
