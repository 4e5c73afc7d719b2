"""Which output channels of a network feed which input columns, found while it runs on example inputs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lrcompress import calibrate, rewrite
from lrcompress.removal.rules import RULES, TAKE_WIDTHS, Rule, Step
from lrcompress.removal.spaces import Channels, Segments, Spaces
from lrcompress.removal.vectors import own_tensors, owners_of, vectors_of
from lrcompress.removal.watch import watched
from lrcompress.removal.widths import Width
from lrcompress.types import Coupling, Held, PlanError, Slot, Wiring

_INPUT, _OUTPUT = "it is an input of the network", "it is an output of the network"
_KEPT = "something holds on to it after the forward"
_PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d")
_SIZES = ("shape", "size", "numel", "nelement", "len")
# What these tell of a tensor is the same whatever its values and its width.
_METADATA = (
    *("dtype", "device", "layout", "requires_grad", "requires_grad_", "grad", "grad_fn", "retains_grad"),
    *("dim", "ndim", "ndimension", "element_size", "itemsize", "names", "get_device", "output_nr"),
    *("storage_offset", "result_type", "can_cast", "hash"),
)
# What these make has the type of a tensor, not its values.
_NEW = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")


def trace(
    model: nn.Module,
    example_inputs: Any,  # a tensor, a tuple of positional or a mapping of keyword arguments
    ignore: str | Sequence[str] = (),  # shell patterns of names of layers that keep all rows and columns
) -> Wiring:
    """Find which channels of a network can be removed, and everything that makes, carries or reads them.

    The model is run once, in evaluation mode, and left as it was. Its tensors are followed from Linear and
    convolution layers through what it calls of torch: pointwise functions, vectors with an entry for each
    channel (batch norm, scales), pooling, flatten (a channel is then its H W consecutive columns), views,
    permutations, sums and products (the terms share their channels), concatenations and depthwise
    convolutions. Branches are those that the example inputs take: where values decide, what a layer that did
    not run could read stays whole. The network's outputs keep all channels. Its inputs are couplings without
    producers, one for each layer that reads them: that layer may select some of its columns. Channels that
    meet anything else are listed in ``held`` with the operator and its module. So are those of layers whose
    weight is read elsewhere, and those whose number the code computes with or decides on.

    Raises:
        PlanError: torch.jit compiled the network itself.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise PlanError(
            "torch.jit compiled the network, whose channels cannot be followed: pass the original"
        )
    layers, _ = rewrite.survey(model, (ignore,) if isinstance(ignore, str) else ignore)
    follower = _Follower(model, layers)
    handle = model.register_forward_pre_hook(follower.enter, with_kwargs=True)
    try:
        with calibrate.inference(model):
            with watched(model, follower) as follower.where:
                result = calibrate.run(model, example_inputs)
            follower.leave(result)  # before what the model holds on to is taken from it
    finally:
        handle.remove()
    return follower.wiring()


class _Follower:
    """Knows the channels of every tensor."""

    def __init__(self, model: nn.Module, layers: Mapping[str, rewrite.Dense]) -> None:
        self.where: Callable[[str], str] = repr  # names an operator and the module that is running
        self._layers = layers
        self._spaces = Spaces()
        self._tensors: Any = WeakTensorKeyDictionary()  # tensor -> channels
        self._makes: dict[str, Segments] = {}
        self._carries: dict[str, Segments] = {}
        self._reads: dict[str, Segments] = {}
        self._elsewhere: dict[str, str] = {}  # layers that keep all rows and columns, and why
        self._equal: list[tuple[Width, Width, str]] = []
        self._decided = ""  # what told the code of values, if anything did
        self._given: set[int] = set()  # ids of tensors that are there before the forward
        self._weights: Any = WeakTensorKeyDictionary()  # parameter -> its layer
        for name, layer in layers.items():
            for parameter in own_tensors(layer).values():
                self._weights[parameter] = name
        self._vectors: dict[str, list[Segments]] = {}  # of modules with vectors of one entry a channel
        self._owner: Any = WeakTensorKeyDictionary()  # vector -> its module
        owners = owners_of(model)
        for name, module in model.named_modules():
            if name and name not in layers:
                self._open(name, module, owners)

    def _open(self, name: str, module: nn.Module, owners: Mapping[int, int]) -> None:
        """Let the vectors of a module become channels of what they are combined with."""
        tensors, axes = own_tensors(module), vectors_of(module)
        if any(owners[id(tensor)] > 1 for tensor in tensors.values()):
            return
        for key, axis in axes.items():
            segments = self._spaces.open(tensors[key].numel())
            self._vectors.setdefault(name, []).append(segments)
            self._tensors[tensors[key]] = Channels(axis, segments)
            self._owner[tensors[key]] = name
            self._given.add(id(tensors[key]))

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Take note of the network's inputs."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.is_floating_point():
                axis = min(1, leaf.ndim - 1)
                segments = self._spaces.new(leaf.shape[axis])
                self._spaces.hold(segments, _INPUT)
                self._tensors[leaf] = Channels(axis, segments)
                self._given.add(id(leaf))

    def leave(self, result: Any) -> None:
        """Keep what the forward returns, and whatever else outlives it."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf in self._tensors:
                self._spaces.hold(self._tensors[leaf].segments, _OUTPUT)
        if self._kept(result):
            gc.collect()  # what only a cycle of references held
        for channels in self._kept(result):
            self._spaces.hold(channels.segments, _KEPT)

    def _kept(self, result: Any) -> list[Channels]:
        """Return the channels of what exists beside what was there before and what is returned."""
        known = self._given | {id(leaf) for leaf in tree_leaves(result)}
        return [channels for tensor, channels in self._tensors.items() if id(tensor) not in known]

    def used(self, width: Width, name: str) -> None:
        """Keep a width whole that code computes with or decides on."""
        self._keep(width, self.where(name))

    def _keep(self, width: Width, where: str) -> None:
        self._spaces.hold(width.segments, f"its number of channels is read by {where}")
        if width.layer:
            self._elsewhere.setdefault(width.layer, f"the shape of its weight is read by {where}")

    def equal(self, one: Width, other: Width) -> None:
        """Take note of widths that must be equal in the narrower network too."""
        self._equal.append((one, other, self.where("eq")))

    def unseen(self, where: str, leaves: Sequence[Any]) -> None:
        """Keep whatever is read where calls are not followed."""
        self._hold([leaf for leaf in leaves if isinstance(leaf, Tensor)], where)

    def _hold(self, tensors: Sequence[Tensor], where: str) -> None:
        for tensor in tensors:
            if tensor in self._tensors:
                self._spaces.hold(self._tensors[tensor].segments, f"it reaches {where}")
            if tensor in self._weights:
                self._elsewhere.setdefault(self._weights[tensor], f"its weight is also read by {where}")

    def before(
        self, name: str, where: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Step, list[Tensor]]:
        """Take note of a call's tensors, before it works in place."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name not in TAKE_WIDTHS:
            parts = [part for leaf in leaves if isinstance(leaf, slice) for part in _ends(leaf)]
            for width in (*leaves, *parts):
                if isinstance(width, Width):
                    self.used(width, name)
        inputs = [(self._tensors.get(tensor), tuple(tensor.shape)) for tensor in tensors]
        return Step(name, where, args, kwargs, self._spaces, inputs, ()), tensors

    def after(self, seen: tuple[Step, list[Tensor]], result: Any) -> Any:
        """Follow the channels through a call."""
        step, tensors = seen
        if not tensors:
            return result
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs and step.name in _SIZES:
            return self._size(step, tensors[0], result)
        tells_type = not outputs and (step.name in _METADATA or step.name.startswith("is_"))
        if tells_type or step.name in _NEW:
            return result
        for tensor in tensors:
            if tensor in self._owner:
                self._carries.setdefault(self._owner[tensor], ())
        found = None
        if not outputs:
            self._decided = self._decided or step.where
        else:
            found = self._channels(step._replace(shape=tuple(outputs[0].shape)), tensors)
        if found is None:
            self._hold(tensors, step.where)
        for output in outputs:
            if found is not None:
                self._tensors[output] = found
            elif output in self._tensors and id(output) not in self._given:
                del self._tensors[output]
        return result

    def _size(self, step: Step, tensor: Tensor, result: Any) -> Any:
        """Return the numbers of a shape, those that count channels as widths."""
        channels, layer = self._tensors.get(tensor), self._weights.get(tensor, "")
        if isinstance(result, tuple):
            sizes = [
                Width(size, self, channels.segments if channels else (), layer)
                if (channels and axis == channels.axis) or (layer and axis < 2)
                else size
                for axis, size in enumerate(result)
            ]
            return type(result)(sizes)
        if step.name == "size":
            axis = step.argument(1, "dim") % tensor.ndim
            if not (axis < 2 if layer else channels and axis == channels.axis):
                return result
        elif step.name == "len":  # a plain number, whatever is returned
            self._hold([tensor] if layer or (channels and channels.axis == 0) else [], step.where)
            return result
        counts = bool(channels or layer)
        return Width(result, self, channels.segments if channels else (), layer) if counts else result

    def _channels(self, step: Step, tensors: list[Tensor]) -> Channels | None:
        """Return the channels of a call's results; None where they cannot be followed."""
        if step.kwargs.get("out") is not None:
            return None
        if step.name in _PRODUCTS:
            return self._product(step)
        if any(tensor in self._weights for tensor in tensors):
            return None
        rule: Rule | None = RULES.get(step.name)
        return rule(step) if rule and any(channels for channels, _ in step.inputs) else None

    def _product(self, step: Step) -> Channels | None:
        """Record a layer that reads channels and makes new ones, or carries them when it is depthwise."""
        x, weight, bias = (step.argument(i, key) for i, key in enumerate(("input", "weight", "bias")))
        name = self._weights.get(weight)
        layer = None if name is None else self._layers[name]
        if layer is None or weight is not layer.weight or not (bias is None or bias is layer.bias):
            return None
        axis = x.ndim - layer.weight.ndim + 1
        channels: Channels | None = self._tensors.get(x)
        at_axis = channels is not None and channels.axis == axis
        if not isinstance(layer, nn.Linear) and layer.groups > 1:
            if channels is None or not at_axis or layer.groups != layer.in_channels:
                return None
            followed = self._follow(name, channels)
            more = layer.out_channels // layer.groups
            return Channels(axis, tuple(s._replace(width=s.width * more) for s in followed.segments))
        if channels is not None and at_axis:
            earlier = self._reads.setdefault(name, channels.segments)
            reason = f"{name!r} runs on channels that are laid out otherwise"
            self._spaces.join(earlier, channels.segments, reason)
        elif channels is not None:
            self._spaces.hold(channels.segments, f"{name!r} runs along another axis")
        if name in self._reads and not at_axis:
            self._spaces.hold(self._reads[name], f"{name!r} also runs on a tensor that was not followed")
        if name not in self._makes:
            self._makes[name] = self._spaces.new(layer.weight.shape[0])
        return Channels(axis, self._makes[name])

    def _follow(self, name: str, channels: Channels) -> Channels:
        """Record a depthwise layer."""
        earlier = self._carries.setdefault(name, channels.segments)
        self._spaces.join(
            earlier, channels.segments, f"{name!r} runs on channels that are laid out otherwise"
        )
        return channels

    def _settle(self) -> None:
        """Hold what only the whole forward shows."""
        for name, reason in self._elsewhere.items():
            for recorded in (self._makes, self._carries, self._reads):
                self._spaces.hold(recorded.get(name, ()), reason)
        for one, other, where in self._equal:
            if one.layer or self._spaces.resolved(one.segments) != self._spaces.resolved(other.segments):
                self._keep(one, where)
                self._keep(other, where)
        for name, vectors in self._vectors.items():
            for segments in vectors[1:]:
                self._spaces.join(
                    vectors[0], segments, f"{name!r} holds vectors of several kinds of channels"
                )
            self._carries[name] = vectors[0]
        for name in self._unreached() if self._decided else ():
            read = rewrite.describe(name, self._layers[name]).group_channels
            for made in self._makes.values():
                if read % made[0].channels == 0:
                    self._spaces.hold(
                        made, f"{name!r} did not run and may read it where {self._decided} decides so"
                    )

    def _unreached(self) -> list[str]:
        return [name for name in self._layers if name not in self._makes and name not in self._carries]

    def wiring(self) -> Wiring:
        """Return what was found, in the order of the forward."""
        self._settle()
        producers: dict[int, list[str]] = {}
        for name, segments in self._makes.items():
            producers.setdefault(self._spaces.root(segments[0].space), []).append(name)
        followers, consumers = self._slots(self._carries), self._slots(self._reads)
        couplings = [
            Coupling(layer.weight.shape[1], (), (), (Slot(name),))
            for name, layer in self._layers.items()
            if layer.weight.shape[1] > 1 and self._reads_inputs(name)
        ]
        held = []
        for root, names in producers.items():
            channels, reason = self._layers[names[0]].weight.shape[0], self._spaces.reason(root)
            if reason is not None:
                held.append(Held(tuple(names), channels, reason))
            elif root in consumers:
                slots = tuple(followers.get(root, ())), tuple(consumers[root])
                couplings.append(Coupling(channels, tuple(names), *slots))
        return Wiring(tuple(couplings), tuple(held))

    def _reads_inputs(self, name: str) -> bool:
        segments = self._spaces.resolved(self._reads.get(name, ()))
        whole = name not in self._elsewhere
        return whole and bool(segments) and all(self._spaces.reason(s.space) == _INPUT for s in segments)

    def _slots(self, recorded: Mapping[str, Segments]) -> dict[int, list[Slot]]:
        """Return where each set of channels lies in the modules that carry or read it."""
        found: dict[int, list[Slot]] = {}
        for name, segments in recorded.items():
            offset = 0
            for segment in self._spaces.resolved(segments):
                slot = Slot(name, offset, segment.width)
                found.setdefault(segment.space, []).append(slot)
                offset += segment.channels * segment.width
        return found


def _ends(part: slice) -> tuple[Any, Any, Any]:
    return part.start, part.stop, part.step
