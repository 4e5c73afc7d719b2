"""Which output channels of a network feed which input columns, found on its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from lrcompress import calibrate, rewrite
from lrcompress.nn import SelectInputs
from lrcompress.removal.rules import FUNCTIONS, METHODS, MODULES, Shape, Step, pointwise
from lrcompress.removal.spaces import Channels, Segment, Spaces
from lrcompress.types import Coupling, Held, PlanError, Slot, Wiring

_INPUT, _OUTPUT = "it is an input of the network", "it is an output of the network"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SIZES = ("size", "dim", "numel", "nelement", "stride", "is_contiguous", "ndimension")  # tell no values

Segments = tuple[Segment, ...]


def trace(
    model: nn.Module,
    example_inputs: Any,  # a tensor, a tuple of positional or a mapping of keyword arguments
    ignore: str | Sequence[str] = (),  # shell patterns of names of layers that keep all rows and columns
) -> Wiring:
    """Find which channels of a network can be removed, and everything that makes, carries or reads them.

    Channels are followed from Linear and convolution layers through pointwise functions, batch norm, pooling,
    dropout, flatten (a channel is then its H W consecutive columns), views whose sizes the code computes,
    permutations, sums (the terms share their channels), concatenations and depthwise convolutions. The
    network's outputs keep all channels. Its inputs are couplings without producers, one for each layer that
    reads them: that layer may select some of its columns. Whatever meets an operation that is not followed
    is listed in ``held`` with that node. The model is run once, in evaluation mode, and left as it was.

    Raises:
        PlanError: the graph depends on the data or cannot be traced; the message names the node.
    """
    layers, _ = rewrite.survey(model, (ignore,) if isinstance(ignore, str) else ignore)
    with calibrate.inference(model):
        graph = _Tracer().traced(model)
        follower = _Follower(model, graph, layers)
        follower.run(*_positional(graph, example_inputs))
    return follower.wiring()


class _Tracer(fx.Tracer):
    """Torch's tracer, with errors that name the node."""

    def traced(self, model: nn.Module) -> fx.Graph:
        try:
            return self.trace(model)
        except PlanError:
            raise
        except Exception as error:  # whatever the model's own code raises on a proxy
            raise PlanError(f"the model cannot be traced: {error}") from error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = rewrite.is_factored(m) or isinstance(m, SelectInputs)
        return ours or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> NoReturn:
        self._refuse(obj, "a branch")

    def iter(self, obj: fx.Proxy) -> NoReturn:
        self._refuse(obj, "a loop")

    def _refuse(self, obj: fx.Proxy, what: str) -> NoReturn:
        raise PlanError(
            f"the model cannot be traced: {what} depends on the value of node {obj.node.name!r} "
            f"({obj.node.op} {obj.node.target})"
        )


def _positional(graph: fx.Graph, inputs: Any) -> list[Any]:
    """Return example inputs in the order of the graph's placeholders."""
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if isinstance(inputs, Mapping):
        return [inputs[name] for name in names if name in inputs]
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


class _Follower(fx.Interpreter):
    """Runs the graph and follows the channels of every tensor."""

    def __init__(self, model: nn.Module, graph: fx.Graph, layers: Mapping[str, rewrite.Dense]) -> None:
        super().__init__(model, graph=graph)
        self._layers = layers
        self._spaces = Spaces()
        self._tensors: dict[fx.Node, tuple[Channels | None, Shape]] = {}
        self._makes: dict[str, Segments] = {}
        self._carries: dict[str, Segments] = {}
        self._reads: dict[str, Segments] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, then follow the channels through it."""
        result = super().run_node(n)
        inputs: list[tuple[Channels | None, Shape]] = []
        fx.map_arg(
            (n.args, n.kwargs), lambda a: inputs.append(self._tensors[a]) if a in self._tensors else None
        )
        if isinstance(result, Tensor):
            shape = tuple(result.shape)
            found = self._channels(Step(n, self._spaces, inputs, shape))
            self._tensors[n] = (found, shape)
            if found is not None:
                return result
        elif n.target is getattr or n.target in _SIZES:
            return result
        reason = _OUTPUT if n.op == "output" else f"it reaches node {n.name!r} ({_called(self, n)})"
        for channels, _ in inputs:
            self._spaces.hold(channels.segments if channels else (), reason)
        return result

    def _channels(self, step: Step) -> Channels | None:
        """Return the channels of a node's result; None where they cannot be followed."""
        node = step.node
        if node.op == "placeholder" and step.shape:
            axis = min(1, len(step.shape) - 1)
            segments = self._spaces.new(step.shape[axis])
            self._spaces.hold(segments, _INPUT)
            return Channels(axis, segments)
        if not step.inputs or node.op == "output":
            return None
        if node.op == "call_module":
            return self._module(step, str(node.target))
        rules = {"call_function": FUNCTIONS, "call_method": METHODS}.get(node.op, {})
        rule = rules.get(node.target)
        return rule(step) if rule else None

    def _module(self, step: Step, name: str) -> Channels | None:
        module = self.module.get_submodule(name)
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if any(hooks) or "forward" in vars(module) or len(step.inputs) != 1:
            return None
        if name in self._layers:
            return self._layer(step, name, self._layers[name])
        channels, _ = step.inputs[0]
        per_channel = type(module) in _NORMS or (isinstance(module, nn.PReLU) and module.num_parameters > 1)
        if per_channel:
            return self._follow(name, channels) if channels is not None and channels.axis == 1 else None
        rule = pointwise if type(module) is nn.PReLU else MODULES.get(type(module))
        return rule(step) if rule else None

    def _follow(self, name: str, channels: Channels) -> Channels:
        """Record a module with parameters of each channel."""
        earlier = self._carries.setdefault(name, channels.segments)
        self._spaces.join(
            earlier, channels.segments, f"{name!r} runs on channels that are laid out otherwise"
        )
        return channels

    def _layer(self, step: Step, name: str, layer: rewrite.Dense) -> Channels | None:
        """Record a layer that reads channels and makes new ones, or carries them when it is depthwise."""
        channels, shape = step.inputs[0]
        spatial = layer.weight.ndim - 2
        axis = len(shape) - spatial - 1
        at_axis = channels is not None and channels.axis == axis
        if not isinstance(layer, nn.Linear) and layer.groups > 1:
            if channels is None or not at_axis or layer.groups != layer.in_channels:
                return None
            followed, more = self._follow(name, channels), layer.out_channels // layer.groups
            return Channels(axis, tuple(s._replace(width=s.width * more) for s in followed.segments))
        if channels is not None and at_axis:
            earlier = self._reads.setdefault(name, channels.segments)
            reason = f"{name!r} runs on channels that are laid out otherwise"
            self._spaces.join(earlier, channels.segments, reason)
        elif channels is not None:
            self._spaces.hold(channels.segments, f"{name!r} runs along another axis")
        if name in self._reads and not (channels is not None and at_axis):
            self._spaces.hold(self._reads[name], f"{name!r} also runs on a tensor that was not followed")
        if name not in self._makes:
            self._makes[name] = self._spaces.new(layer.weight.shape[0])
        return Channels(axis, self._makes[name])

    def wiring(self) -> Wiring:
        """Return what was found, in the order of the forward."""
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
        segments = self._reads.get(name, ())
        return bool(segments) and all(self._spaces.reason(s.space) == _INPUT for s in segments)

    def _slots(self, recorded: Mapping[str, Segments]) -> dict[int, list[Slot]]:
        """Return where each set of channels lies in the modules that carry or read it."""
        found: dict[int, list[Slot]] = {}
        for name, segments in recorded.items():
            offset = 0
            for segment in segments:
                slot = Slot(name, offset, segment.width)
                found.setdefault(self._spaces.root(segment.space), []).append(slot)
                offset += segment.channels * segment.width
        return found


def _called(follower: _Follower, node: fx.Node) -> str:
    """Name what a node calls."""
    if node.op == "call_module":
        return type(follower.module.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
