"""Copies of models that run none of the original's modules, whatever their attributes keep."""

from __future__ import annotations

import copy
import functools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

from lrcompress.types import PlanError

_NUMBERS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_PLAIN: tuple[type, ...] = (*_NUMBERS, type, ModuleType, OpOverload, OpOverloadPacket)
_CONTAINERS = (dict, list, set, deque)
_MOST = 10_000  # objects that are looked at for what a function leads to


def copied(
    model: nn.Module,
    made: Mapping[int, Any] | None = None,  # by the id of what they stand for: used as they are
    swapped: Mapping[str, nn.Module] | None = None,  # what stands for modules, by their names
) -> nn.Module:
    """Copy a model with all that its attributes hold, functions included.

    A deep copy shares functions with the original. Those that lead to what was copied, through closures,
    defaults, ``__wrapped__`` or partial arguments, are made again around the copies; methods of what is
    swapped are those of its stand-in, and weak references are to the copies. Tensors that were computed with
    gradients are copied without their history. Weights of what is swapped are never copied.

    Raises:
        PlanError: something cannot be copied, or keeps a module or a weight of the original; the message
            names it.
    """
    new = swapped or {}
    old = {name: model.get_submodule(name) for name in new}
    weights = _weights(model, old)
    # deepcopy takes what is in here for copies that it has already made
    memo: dict[int, Any] = {key: value for key, value in (made or {}).items() if key not in weights}
    memo |= {id(old[name]): module for name, module in new.items()}
    stay = {key: parameter for name in new for key, parameter in _kept(old[name], new[name])}
    memo |= stay
    try:
        with _WithoutHistory():
            result: nn.Module = copy.deepcopy(model, memo)
            _Functions(model, result, memo, {id(new[name]): type(old[name]) for name in new}).make()
    except PlanError:
        raise
    except Exception as error:  # whatever the attributes' own ways of being copied raise
        raise PlanError(f"the model cannot be copied: {error}") from error
    kept = next((name for key, name in weights.items() if key in memo and key not in stay), None)
    if kept is not None:
        raise PlanError(
            f"layer {kept!r}: a list, an object or a function keeps its parameters too, and would use them "
            "as they were: ignore the layer"
        )
    return result


def _kept(old: nn.Module, new: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """List the parameters, such as biases, that a stand-in has of its own, by the ids of the original's."""
    theirs = dict(new.named_parameters(recurse=False))
    for name, parameter in old.named_parameters(recurse=False):
        if name in theirs and theirs[name].shape == parameter.shape:
            yield id(parameter), theirs[name]


def _weights(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return the names of modules by the ids of the parameters that they alone have."""
    inside = {id(part) for module in modules.values() for part in module.modules()}
    others = [module for module in model.modules() if id(module) not in inside]
    shared = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    found = {id(p): name for name, module in modules.items() for p in module.parameters()}
    return {key: name for key, name in found.items() if key not in shared}


class _WithoutHistory(TorchFunctionMode):
    """Copies tensors that were computed from others, which torch refuses to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


class _Functions:
    """Goes through all that was copied, and mends what still leads to the original."""

    def __init__(
        self,
        model: nn.Module,
        result: nn.Module,
        memo: dict[int, Any],  # of the deep copy: id of an original -> its copy
        swapped: dict[int, type[nn.Module]],  # id of a stand-in -> the original's class
    ) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._names |= {id(module): name for name, module in result.named_modules()}
        self._memo, self._swapped = memo, swapped
        self._new: set[int] = set()  # ids of copies
        self._clean: set[int] = set()  # ids of what leads to no original
        self._made: dict[int, Any] = {}  # function or cell -> its copy
        self._held: list[Any] = []  # keeps ids from being used again

    def make(self) -> None:
        """Mend what containers and objects hold; what functions hold is copied meanwhile, and mended too."""
        seen = {id(self._memo)}  # where deepcopy keeps the originals
        while fresh := self._memo.keys() - seen:
            seen |= fresh
            self._new |= {id(self._memo[key]) for key in fresh}
            for key in fresh:
                self._mend_inside(self._memo[key])

    def _mend_inside(self, value: Any) -> None:
        if isinstance(value, dict):
            self._mend_items(value, list(value.items()))
        elif isinstance(value, list | deque):
            self._mend_items(value, list(enumerate(value)))
        elif type(value) is set:
            mended = {self._mended(part) for part in value}
            value.clear()
            value.update(mended)
        if not isinstance(
            value, (*_PLAIN, FunctionType, MethodType, BuiltinFunctionType, torch.jit.ScriptModule)
        ):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):
                self._mend_items(attributes, list(attributes.items()))

    def _mend_items(self, holder: Any, items: list[tuple[Any, Any]]) -> None:
        for key, part in items:
            mended = self._mended(part)
            if mended is not part:
                holder[key] = mended

    def _mended(self, value: Any) -> Any:
        """Return what stands for a value in the copy; the value itself where it leads to no original."""
        if isinstance(value, (*_PLAIN, Tensor, nn.Module)):
            return value
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return self._method(value)
        if isinstance(value, functools.partial):
            return self._partial(value)
        if isinstance(value, weakref.ref) and type(value) is weakref.ref:
            target = self._memo.get(id(value()))
            return value if target is None else weakref.ref(target)
        if isinstance(value, tuple):
            parts = [self._mended(part) for part in value]
            if all(a is b for a, b in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if callable(value) and (name := self._leads_to(value)) is not None:
            raise PlanError(
                f"{name} is kept by a {type(value).__module__}.{type(value).__name__}, "
                "which cannot be made again around a copy: make it a method"
            )
        return value

    def _method(self, method: MethodType) -> Any:
        owner, function = self._copy(method.__self__), method.__func__
        kind = self._swapped.get(id(owner))
        name = function.__name__
        if (
            kind
            and getattr(kind, name, None) is function
            and getattr(type(owner), name, None) is not function
        ):
            if not hasattr(owner, name):
                raise PlanError(
                    f"layer {self._names.get(id(owner))!r}: its method {name!r} is kept by an attribute, and "
                    f"{type(owner).__name__}, which takes its place, has none: ignore the layer"
                )
            return getattr(owner, name)
        mended = self._mended(function)
        same = owner is method.__self__ and mended is function
        return method if same else MethodType(mended, owner)

    def _partial(self, value: functools.partial[Any]) -> Any:
        held = (value.func, *value.args, *value.keywords.values(), *vars(value).values())
        function, *mended = [self._mended(part) for part in held]
        if all(a is b for a, b in zip((function, *mended), held, strict=True)):
            return value
        count = len(value.args)
        made = type(value)(
            function, *mended[:count], **dict(zip(value.keywords, mended[count:], strict=False))
        )
        vars(made).update(zip(vars(value), mended[count + len(value.keywords) :], strict=True))
        return made

    def _function(self, function: FunctionType) -> Any:
        """Make a function again around the copies, if it leads to any original."""
        if id(function) in self._made:
            return self._made[id(function)]
        if self._leads_to(function) is None:
            return function
        cells = tuple(self._cell(cell) for cell in function.__closure__ or ())
        made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self._made[id(function)] = made
        self._held.append(function)
        for cell, new in zip(function.__closure__ or (), cells, strict=True):
            if not _is_empty(cell) and _is_empty(new):
                new.cell_contents = self._copy(cell.cell_contents)
        made.__defaults__ = self._copy(function.__defaults__)
        made.__kwdefaults__ = self._copy(function.__kwdefaults__)
        made.__dict__.update(self._attributes(function))
        for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
            setattr(made, name, getattr(function, name))
        return made

    def _attributes(self, function: FunctionType) -> dict[str, Any]:
        """Return the attributes of a function that is made again."""
        inner: Any = function
        while isinstance(inner, FunctionType) and hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        # `functools.wraps` of a module gives a function all that the module has.
        theirs = vars(inner) if isinstance(inner, nn.Module) else {}
        known = vars(self._copy(inner)) if theirs else {}
        return {
            key: known.get(key) if key in theirs and theirs[key] is part else self._copy(part)
            for key, part in vars(function).items()
        }

    def _cell(self, cell: CellType) -> CellType:
        """Return the cell that stands for one; functions that share a variable still do."""
        self._held.append(cell)
        made: CellType = self._made.setdefault(id(cell), CellType())
        return made

    def _copy(self, value: Any) -> Any:
        """Copy what a function or method holds: containers, tensors, and what leads to any original."""
        if isinstance(value, _PLAIN) or id(value) in self._new:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, FunctionType):
            return self._function(value)
        if not isinstance(value, (*_CONTAINERS, Tensor)) and self._leads_to(value) is None:
            return value
        made = copy.deepcopy(value, self._memo)
        self._new.add(id(made))
        self._held.append(made)
        return self._mended(made)

    def _leads_to(self, value: Any) -> str | None:
        """Say what of the original can be reached from a value; None where nothing of it is."""
        waiting, seen = [value], dict[int, Any]()
        while waiting and len(seen) < _MOST:
            part = waiting.pop()
            known = id(part) in seen or id(part) in self._clean or id(part) in self._new
            if isinstance(part, _PLAIN) or (known and id(part) not in self._memo):
                continue
            if id(part) in self._memo:
                name = self._names.get(id(part))
                return f"a {type(part).__name__}" if name is None else f"module {name!r}"
            seen[id(part)] = part
            waiting.extend(_inside(part))
        self._clean |= seen.keys()
        self._held.append(seen)
        return None


def _is_empty(cell: CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _inside(value: Any) -> Iterator[Any]:
    """List what a value holds."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell))
        yield from (value.__defaults__, value.__kwdefaults__, vars(value))
    elif isinstance(value, MethodType | BuiltinFunctionType):
        yield value.__self__
        yield getattr(value, "__func__", None)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords, vars(value))
    elif type(value) is weakref.ref:
        yield value()
    elif not isinstance(value, Tensor):
        yield getattr(value, "__dict__", None)
        yield getattr(value, "__wrapped__", None)
