"""What modules keep beside tensors of their own (`get_extra_state`), as JSON and tensors, and back."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrcompress.types import PlanError
from lrcompress.types.plain import parsed, shown

_DEEPEST = 16  # levels of containers; each is up to three of JSON
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class State:
    """The extra state of one module, as JSON holds it.

    A list is a list; what JSON lacks is an object with one field: ``{"tensor": name}``, ``{"tuple": [...]}``,
    ``{"float": "inf"}`` and ``{"dict": [[key, value], ...]}``, whose keys keep their types.
    """

    module: str
    value: Any

    @classmethod
    def of(cls, module: str, value: Any) -> tuple[State, dict[str, Tensor]]:
        """Return a state and the tensors in it, named after the module.

        Raises:
            PlanError: it holds something else than numbers, text, None, tensors, lists, tuples and dicts.
        """
        tensors: dict[str, Tensor] = {}
        base = ".".join(filter(None, (module, "_extra_state")))
        try:
            plain = _encoded(value, base, tensors, _DEEPEST)
            parsed(json.dumps(plain, allow_nan=False))
        except ValueError as error:
            raise PlanError(f"module {module!r}: its extra state cannot be saved: {error}") from None
        return cls(module, plain), tensors

    @classmethod
    def from_plain(cls, plain: Any) -> State:
        """Read what a file holds.

        Raises:
            PlanError: it is no state.
        """
        if not (isinstance(plain, dict) and plain.keys() == {"module", "value"}):
            raise PlanError(f"an extra state must have a module and a value, got {shown(plain)}")
        if not isinstance(plain["module"], str):
            raise PlanError(f"an extra state must name its module, got {shown(plain['module'])}")
        state = cls(plain["module"], plain["value"])
        for _ in state.names():  # all of it is read
            pass
        return state

    def names(self) -> Iterator[str]:
        """List the tensors that the state holds."""
        yield from _names(self.value, self.module)

    def decoded(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the state with its tensors."""
        return _decoded(self.value, tensors)


def _encoded(value: Any, path: str, tensors: dict[str, Tensor], levels: int) -> Any:
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return {"float": str(value)}
    if kind in _SCALARS:
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if levels == 0:
        raise ValueError(f"it must nest at most {_DEEPEST} deep")
    if kind in (list, tuple):
        parts = [_encoded(part, f"{path}[{i}]", tensors, levels - 1) for i, part in enumerate(value)]
        return parts if kind is list else {"tuple": parts}
    if kind in (dict, OrderedDict):
        if not all(type(key) in _SCALARS for key in value):
            raise ValueError(f"a key of a dict must be a number or text, got {shown(list(value))}")
        parts = [_encoded(part, f"{path}[{key!r}]", tensors, levels - 1) for key, part in value.items()]
        return {"dict": [[_encoded(key, path, {}, 0), part] for key, part in zip(value, parts, strict=True)]}
    raise ValueError(f"it holds a {kind.__module__}.{kind.__name__}, neither tensor nor JSON")


def _names(value: Any, module: str) -> Iterator[str]:
    """List the tensors of a value that was read, all of which is looked at."""
    if isinstance(value, list):
        for part in value:
            yield from _names(part, module)
    elif isinstance(value, dict):
        (tag, content), *more = value.items() if value else [("", None)]
        if tag == "tensor" and isinstance(content, str) and not more:
            yield content
        elif tag == "tuple" and isinstance(content, list) and not more:
            yield from _names(content, module)
        elif tag == "dict" and isinstance(content, list) and not more and all(map(_is_item, content)):
            yield from _names([part for _, part in content], module)
        elif not (tag == "float" and content in ("inf", "-inf", "nan") and not more):
            raise PlanError(f"the extra state of module {shown(module)} holds {shown(value)}")


def _is_item(pair: Any) -> bool:
    if not (isinstance(pair, list) and len(pair) == 2):
        return False
    key = pair[0]
    return type(key) in _SCALARS or key in ({"float": "inf"}, {"float": "-inf"}, {"float": "nan"})


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "float":
        return float(content)
    if tag == "tuple":
        return tuple(_decoded(part, tensors) for part in content)
    return {_decoded(key, tensors): _decoded(part, tensors) for key, part in content}
