"""What ``weight`` of a factored layer is: a tensor, multiplied out only where its values are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lrcompress.types import WeightError

_METADATA = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "get_device",
        "stride",
        "storage_offset",
        "is_contiguous",
        "__len__",
        "__hash__",
    ]
)
_COMPUTED = frozenset(["T", "mT", "H", "mH", "real", "imag", "data"])  # attributes that hold values
_LIKE = frozenset(
    ["to", "type_as", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]
)  # read type and device
_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in [
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    ]
) | {"__setitem__"}
_CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}  # where a convolution is given none


class Holder(Protocol):
    """A layer with a weight that it does not hold as such."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""

    def factors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the weight is made of."""

    def multiplied_out(self) -> Tensor:
        """Return the weight, as a function of its factors."""

    def run_factors(self, input: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor | None:
        """Apply the weight in F.linear, or in a convolution of a geometry; None where the factors cannot."""

    def take_weight(self, weight: Tensor) -> None:
        """Change the factors so that they multiply out to another weight; WeightError if they cannot."""


class FactoredWeight(Tensor):
    """The weight of a layer that holds only its factors.

    Type, shape and device cost nothing. F.linear and convolutions with it run the factors; everything else
    multiplies them out, differentiably. What is written to it is written to the factors, or refused where
    they cannot hold it; views of it are read-only.
    """

    _holder: Holder
    _cut: bool

    @staticmethod
    def __new__(cls, holder: Holder, cut: bool = False) -> FactoredWeight:
        """Make a tensor without values; ``cut`` from the graph of gradients, as detached ones are."""
        factor = holder.factors()[0]
        made: FactoredWeight = Tensor._make_wrapper_subclass(
            cls,
            holder.weight_shape,
            dtype=factor.dtype,
            device=factor.device,
            requires_grad=factor.requires_grad and not cut,
        )
        made._holder, made._cut = holder, cut
        return made

    def __init__(self, holder: Holder, cut: bool = False) -> None: ...

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FactoredWeight({self._product()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._product().detach().clone().requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({}).__reduce_ex__(protocol)

    def _product(self) -> Tensor:
        weight = self._holder.multiplied_out().contiguous()  # as its strides say
        return weight.detach() if self._cut else weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the cheapest thing that is right."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(func.__self__, "__name__", "") if name in ("__get__", "__set__") else ""
        if name in _METADATA or (name == "__get__" and attribute not in _COMPUTED):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if attribute == "data" or name == "detach":
            return args[0]._assign(args[1]) if name == "__set__" else cls(args[0]._holder, cut=True)
        if name == "requires_grad_" or attribute == "requires_grad":
            return args[0]._require_grad(*args[1:], **kwargs)
        if name in _LIKE and args and (name.startswith("new_") or not isinstance(args[0], cls)):
            return func(*_with(args, lambda w: w._holder.factors()[0]), **kwargs)
        if _written(name, args, kwargs, cls):
            return _write(func, name, args, kwargs)
        if (result := _run(func, args, kwargs)) is not None:
            return result
        products: list[Tensor] = []

        def multiply(weight: FactoredWeight) -> Tensor:
            products.append(weight._product())
            return products[-1]

        return _guarded(func(*_with(args, multiply), **_with(kwargs, multiply)), products)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Multiply out for what bypasses Python: nothing there may write."""
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write and isinstance(value, cls):
                raise value._refusal(str(func))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_with(args, cls._product), **_with(kwargs, cls._product))

    def _refusal(self, name: str) -> WeightError:
        return WeightError(
            f"{name} cannot write to the weight of {self._holder}, which holds only its factors: "
            "change those, or make the layer dense with lrcompress.merge first"
        )

    def _assign(self, weight: Tensor) -> None:
        self._holder.take_weight(weight)

    def _require_grad(self, wanted: bool = True) -> FactoredWeight:
        if self._cut:
            raise self._refusal("requires_grad_")
        for factor in self._holder.factors():
            factor.requires_grad_(wanted)
        with torch._C.DisableTorchFunctionSubclass():
            self.requires_grad = wanted
        return self


class _Product(Tensor):
    """A view of factors multiplied out: read-only, since nothing would come of writing to it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse writes; what is computed from the view is a plain tensor."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(func.__self__, "__name__", "") if name == "__set__" else ""
        if attribute == "data" or _written(name, args, kwargs, cls):
            raise WeightError(
                f"{attribute or name} cannot write to a view of a factored layer's weight: take "
                ".clone() for a tensor of its own, or make the layer dense with lrcompress.merge first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if name == "__get__" and func.__self__.__name__ in ("grad_fn", "grad"):
            return result
        return _guarded(result, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)])


def _with(tree: Any, made: Callable[[Any], Tensor]) -> Any:
    """Put something in the place of every factored weight."""
    return tree_map(lambda leaf: made(leaf) if isinstance(leaf, FactoredWeight) else leaf, tree)


def _guarded(result: Any, products: Iterable[Tensor]) -> Any:
    """Make what shares memory with a product read-only."""

    def guard(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and any(
            torch._C._is_alias_of(leaf, each)  # type: ignore[attr-defined]
            for each in products
        ):
            return leaf if isinstance(leaf, _Product) else leaf.as_subclass(_Product)
        return leaf

    return tree_map(guard, result)


def _written(name: str, args: Any, kwargs: Any, kind: type[Tensor]) -> bool:
    """Say whether a function of torch writes to a tensor of a kind."""
    target = [kwargs.get("out")]
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
        target.append(args[0] if args else kwargs.get("tensor", kwargs.get("input")))
    return any(isinstance(leaf, kind) for leaf in tree_leaves(target))


def _write(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Write to a copy of the product and give it to the layer, if its factors can hold it."""
    weight = args[0] if args else None
    if not isinstance(weight, FactoredWeight) or kwargs.get("out") is not None:
        leaves = tree_leaves((args, kwargs))
        raise next(leaf for leaf in leaves if isinstance(leaf, FactoredWeight))._refusal(name)
    if torch.is_grad_enabled() and weight.requires_grad:
        raise weight._refusal(f"{name} outside of torch.no_grad()")
    new = weight._product().detach().clone()
    func(new, *_with(args[1:], FactoredWeight._product), **_with(kwargs, FactoredWeight._product))
    weight._assign(new)
    return weight


def _run(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Run the factors where the function is F.linear or a convolution."""
    call = layer_call(func, args, kwargs)
    if call is None:
        return None
    input, weight, bias, geometry = call
    if not isinstance(weight, FactoredWeight) or isinstance(input, FactoredWeight):
        return None
    if weight.ndim != _CONVOLUTIONS.get(func, 0) + 2 or weight._cut:
        return None
    return weight._holder.run_factors(input, bias, geometry)


def layer_call(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any, tuple[Any, ...]] | None:
    """Return what F.linear or a convolution is called with: input, weight, bias and geometry.

    That is stride, padding, dilation and groups; of F.linear it is empty. None for other functions.
    """
    if func is not F.linear and func not in _CONVOLUTIONS:
        return None
    defaults = {} if func is F.linear else _GEOMETRY
    names = ("input", "weight", "bias", *defaults)
    given = {"bias": None, **defaults, **dict(zip(names, args, strict=False)), **kwargs}
    return given["input"], given["weight"], given["bias"], tuple(given[name] for name in defaults)


def in_graph() -> bool:
    """Say whether a graph is made of what runs, in which a weight must be a tensor like any other."""
    return torch.compiler.is_dynamo_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def weight_of(holder: Holder) -> Tensor:
    """Return the weight of a layer that holds factors; in a graph the product, dropped if unread."""
    if in_graph():
        return holder.multiplied_out()
    return FactoredWeight(holder)


def check_new_weight(holder: Holder, weight: Any) -> None:
    """Refuse what can be no weight of the layer.

    Raises:
        WeightError: another type or shape.
    """
    if not isinstance(weight, Tensor) or weight.shape != holder.weight_shape:
        found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise WeightError(f"the weight of {holder} must be a tensor {list(holder.weight_shape)}, got {found}")


def decoders(
    holder: Holder,
    blocks: Tensor,  # [groups, out, in]: the new weight
    V: Tensor,  # [groups, rank, in]
) -> Tensor:  # [groups, out, rank], float64
    """Return U with ``U V = blocks``, by least squares: exact for a weight scaled by rows, as fusions do.

    Raises:
        WeightError: the factors would miss the weight by more than rounding.
    """
    wide, new = V.double(), blocks.double()
    U: Tensor = new @ torch.linalg.pinv(wide)
    missed = float((U @ wide - new).norm())
    # A product of `rank` terms is rounded by so much, and the weight was rounded once more.
    allowed = (V.shape[1] + 1) * torch.finfo(V.dtype).eps * float(U.norm() * wide.norm() + new.norm())
    if not missed <= allowed:
        raise WeightError(
            f"{holder} cannot hold the new weight, which is no product U V with its V: make the layer dense "
            "with lrcompress.merge first"
        )
    return U


def take_decoder(layer: Any, U: Tensor, weight: Tensor) -> None:
    """Write a new U; a parameter that is assigned also says whether it is trained."""
    with torch.no_grad():
        layer.U.copy_(U.reshape(layer.U.shape))
    if isinstance(weight, nn.Parameter):
        for factor in layer.factors():
            factor.requires_grad_(weight.requires_grad)
