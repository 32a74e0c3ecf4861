"""Dataclasses made of values from a file: whether each field has the type that it says, in a range of some sense."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_MOST_CHARACTERS = 1 << 10
_MOST_ITEMS = 1 << 10
_MOST_INTEGER = (1 << 31) - 1


def check_fields(value: Any) -> None:
    """Checks a dataclass and those in it.

    Integers are from 0 to 2^31 - 1, floats finite and not negative, texts have up to 1,024 characters, tuples and
    dicts as many items.

    Raises:
        ValueError: naming the field, and what it holds.
    """
    hints = _hints(type(value))  # type: ignore[arg-type]
    for name in (field.name for field in fields(value)):
        if not _is(getattr(value, name), hints[name]):
            raise ValueError(f"{name} cannot be {repr(getattr(value, name))[:100]}")


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a class's fields: evaluating annotations takes longer than all checks."""
    return get_type_hints(kind)


def _is(value: Any, kind: Any) -> bool:
    if is_dataclass(kind):
        if type(value) is kind:
            check_fields(value)
        return type(value) is kind
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return type(value) is str and value in parts
    if origin is UnionType:
        return any(_is(value, part) for part in parts)
    if origin is tuple:
        if type(value) is not tuple or len(value) > _MOST_ITEMS:
            return False
        of_each = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(of_each) == len(value) and all(map(_is, value, of_each))
    if origin is dict:
        return type(value) is dict and len(value) <= _MOST_ITEMS and all(type(key) is str for key in value)
    return _is_scalar(value, kind)


def _is_scalar(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and value >= 0 and math.isfinite(value)
    if type(value) is not kind:
        return False
    if kind is int:
        return 0 <= value <= _MOST_INTEGER
    return len(value) <= _MOST_CHARACTERS if kind is str else kind in (bool, NoneType)
