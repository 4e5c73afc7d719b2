"""Dataclasses as plain data and as JSON, and back, whatever the text holds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import reprlib
import types
import typing
from typing import Any

from lrcompress.types.errors import CompressionError, PlanError

LONGEST_JSON = 64 << 20  # characters: a plan takes some kB a layer
_DEEPEST = 64  # what is written here nests 8 deep
# Of a whole number: products of several still fit a float, and no network has so many of anything.
LARGEST = 2**100


def parsed(text: str | bytes) -> Any:
    """Read JSON as RFC 8259 has it: no nan or infinity, no name twice, no half characters, and not endless.

    Raises:
        ValueError: it is not that.
    """
    if len(text) > LONGEST_JSON:
        raise ValueError(f"JSON must have at most {LONGEST_JSON} characters, got {len(text)}")
    if isinstance(text, bytes):
        text = text.decode()
    if _depth(text) > _DEEPEST:
        raise ValueError(f"JSON must nest at most {_DEEPEST} deep")
    value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_float=_finite)
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character is no text: it could not be written anywhere
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _depth(text: str) -> int:
    """Return how deep brackets nest; found before parsing, which needs stack for each level."""
    unescaped = text.replace("\\\\", "").replace('\\"', "")
    brackets = re.sub(r"[^][{}]+", "", re.sub(r'"[^"]*"?', "", unescaped))
    return max(itertools.accumulate(1 if each in "[{" else -1 for each in brackets), default=0)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a name twice: {shown([name for name, _ in pairs])}")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{shown(digits)} is too large a number")
    return value


def shown(value: object) -> str:
    """Return a repr that is short whatever the value."""
    return reprlib.repr(value)


def to_plain(value: Any) -> Any:
    """Return a dataclass as dicts, lists, strings and finite numbers; nan becomes None.

    Raises:
        PlanError: a number is infinite.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        raise PlanError(f"a plan cannot hold {value}")
    return None if isinstance(value, float) and math.isnan(value) else value


def from_plain(kind: Any, value: Any, where: str = "plan") -> Any:
    """Build a value of the type ``kind`` from plain data, the inverse of ``to_plain``.

    Raises:
        PlanError: a field is missing, unknown or of another type, or a number is beyond any network's; the
            message names it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        if value is None and len(members) < len(arguments):
            return None
        member = float if isinstance(value, float) and float in members else members[-1]
        return from_plain(member, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(from_plain(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        fields = _fields(kind)
        if fields.keys() != value.keys():
            lacks, adds = (
                [name for name in one if name not in other]
                for one, other in ((fields, value), (value, fields))
            )
            raise PlanError(f"{where} must have its fields and no others: lacks {lacks}, adds {shown(adds)}")
        try:
            return kind(**{name: from_plain(fields[name], value[name], f"{where}.{name}") for name in fields})
        except CompressionError as error:
            raise PlanError(f"{where}: {error}") from None
    if kind is float and value is None:
        return math.nan
    if kind in (int, float) and isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise PlanError(f"{where} must be at most 2**100, got {shown(value)}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise PlanError(f"{where} must be {kind}, got {shown(value)}")


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
