"""Modules with a forward of their own, whose weight is that of a layer inside of them."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrcompress.nn.weight import FactoredWeight, in_graph, layer_call
from lrcompress.types import WeightError

INNER = "inner"  # the layer's name
_SPATIAL: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


class OwnForward(nn.Module):
    """A module whose forward, its own, runs the layer ``inner`` where it called F.linear or a convolution.

    Abstract: ``opened`` makes a subclass of it and of the module's class. ``inner`` is an ordinary layer or a
    factored one, without padding: whatever the forward does before and after it, it does as ever. ``weight``
    and ``bias`` are the layer's; the weight stands for the layer in that one call of torch, and is a tensor
    for everything else.
    """

    inner: Any

    _traced: list[Tensor]  # the weight, while a graph is made of a forward
    _bare: bool  # the module has no bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, in a graph, too, where the weight is a tensor like any other."""
        if not in_graph():
            return super().forward(*args, **kwargs)
        weight: Tensor = self.inner.weight
        self._traced.append(weight)
        with _Traced(self, weight):
            result = super().forward(*args, **kwargs)
        self._traced.clear()
        return result

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        if in_graph():
            weight: Tensor = self._traced[0] if self._traced else self.inner.weight
            return weight
        return FactoredWeight(self)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        bias: Tensor | None = self.inner.bias
        return bias

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a new weight or bias goes to the layer."""
        if name in ("weight", "bias") and INNER in self._modules:
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the class as the one that it was made of."""
        return _blank, (type(self).__mro__[2],), self.__getstate__()  # type: ignore[no-untyped-call]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.inner.weight.shape)

    def factors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the weight is made of."""
        inner = self.inner
        factors: tuple[Tensor, ...] = inner.factors() if hasattr(inner, "factors") else (inner.weight,)
        return factors

    def multiplied_out(self) -> Tensor:
        """Return the weight as a tensor of torch."""
        inner = self.inner
        weight: Tensor = inner.multiplied_out() if hasattr(inner, "multiplied_out") else inner.weight
        return weight

    def take_weight(self, weight: Tensor) -> None:
        """Give the layer another weight."""
        inner = self.inner
        inner.weight = weight if hasattr(inner, "factors") else nn.Parameter(weight)

    def run_factors(self, input: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor | None:
        """Run the layer; None where the call is not the layer's.

        Raises:
            WeightError: it is not, and an activation was folded into the layer.
        """
        inner = self.inner
        own = bias is inner.bias or (self._bare and bias is None)  # a batch norm that was folded makes one
        sides: tuple[int, ...] | None = ()
        if geometry:
            stride, padding, dilation, groups = geometry
            axes = len(inner.kernel_size)
            own = own and (_each(stride, axes), _each(dilation, axes), groups) == geometry_of(inner)
            sides = zero_padding(padding, axes)
        if not own or sides is None:
            if getattr(inner, "activation", "none") != "none":
                raise WeightError(
                    f"{type(self).__name__} runs its weight in another way than when it was folded"
                )
            return None
        if any(sides):
            input = F.pad(input, [side for side in reversed(sides) for _ in (0, 1)])
        result: Tensor = inner(input)
        return result


class _Traced(TorchFunctionMode):
    """Runs the layer in the place of the call with the weight, while a graph is made."""

    def __init__(self, module: OwnForward, weight: Tensor) -> None:
        super().__init__()
        self._module, self._weight = module, weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = layer_call(func, args, kwargs)
        if call is not None and call[1] is self._weight:
            input, _, bias, geometry = call
            result = self._module.run_factors(input, bias, geometry)
            if result is not None:
                return result
        return func(*args, **kwargs)


def geometry_of(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:  # stride, dilation, groups
    """Return the geometry of an ordinary or factored convolution."""
    axes = len(layer.kernel_size)
    return _each(layer.stride, axes), _each(layer.dilation, axes), getattr(layer, "conv_groups", layer.groups)


def zero_padding(padding: Any, axes: int) -> tuple[int, ...] | None:
    """Return the zeros on both sides of each axis; None for padding that is not the same on both."""
    if isinstance(padding, str):
        return (0,) * axes if padding == "valid" else None
    return _each(padding, axes)


def _each(size: Any, axes: int) -> tuple[int, ...]:
    """Spread one size over all axes."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * axes if len(sizes) == 1 else sizes


@functools.cache
def _opened_class(kind: Any) -> type[OwnForward]:
    return type(kind.__name__, (OwnForward, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: Any) -> OwnForward:
    made: type[OwnForward] = _opened_class(kind)
    return made.__new__(made)


def opened(module: nn.Module) -> OwnForward:
    """Make a module one that holds its weight and bias in a layer inside, in place; its class changes."""
    base = next(base for base in _SPATIAL if isinstance(module, base))
    weight, bias = module._parameters.pop("weight"), module._parameters.pop("bias", None)
    assert weight is not None
    made: dict[str, Any] = {"bias": False, "device": "meta", "dtype": weight.dtype}
    source: Any = module
    inner: Any
    if base is nn.Linear:
        inner = nn.Linear(source.in_features, source.out_features, **made)
    else:
        stride, dilation, groups = geometry_of(source)
        made |= {"stride": stride, "dilation": dilation, "groups": groups}
        inner = base(source.in_channels, source.out_channels, source.kernel_size, **made)
    inner.weight, inner.bias = weight, bias
    inner.train(module.training)
    module.__class__ = _opened_class(source.__class__)
    assert isinstance(module, OwnForward)
    module._traced, module._bare = [], bias is None
    module.add_module(INNER, inner)
    return module
