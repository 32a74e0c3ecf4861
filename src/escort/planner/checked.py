"""Dataclasses made of values from a file: whether each field has the type that it says, in a range of some sense."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial, reduce
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_MOST_CHARACTERS = 1 << 14
_MOST_ITEMS = 1 << 14
_MOST_INTEGER = (1 << 31) - 1

_Test = Callable[[Any], bool]


def check_fields(value: Any) -> None:
    """Checks a dataclass and those in it.

    Integers are from 0 to 2^31 - 1, floats finite and not negative but in fields whose metadata say "signed", texts
    have up to 16,384 characters, tuples and dicts as many items. What a dict says nothing of is a scalar.

    Raises:
        ValueError: naming the field, and what it holds.
    """
    for name, is_right in _tests(type(value)):  # type: ignore[arg-type]
        if not is_right(getattr(value, name)):
            raise ValueError(f"{name} cannot be {repr(getattr(value, name))[:100]}")


@lru_cache
def _tests(kind: Any) -> list[tuple[str, _Test]]:
    """What tells whether each field of a class is right, made once: a plan has hundreds of them."""
    hints = get_type_hints(kind)
    return [
        (field.name, _is_finite if field.metadata.get("signed") else _test(hints[field.name])) for field in fields(kind)
    ]


def _test(kind: Any) -> _Test:
    """What tells whether a value is of a type, as annotations write it."""
    if is_dataclass(kind):
        return partial(_is_checked, kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        words = frozenset(parts)
        return lambda value: type(value) is str and value in words
    if origin is UnionType:
        return reduce(lambda first, other: lambda value: first(value) or other(value), map(_test, parts))
    if origin is tuple and parts[-1] is Ellipsis:
        of_each = _test(parts[0])
        return lambda value: type(value) is tuple and len(value) <= _MOST_ITEMS and all(map(of_each, value))
    if origin is tuple:
        tests = [*map(_test, parts)]
        return lambda value: (
            type(value) is tuple
            and len(value) == len(tests)
            and all(test(item) for test, item in zip(tests, value, strict=True))
        )
    if origin is dict:
        of_key, of_item = map(_test, parts)
        return lambda value: (
            type(value) is dict
            and len(value) <= _MOST_ITEMS
            and all(of_key(key) and of_item(item) for key, item in value.items())
        )
    return _SCALARS.get(kind, _is_scalar)


def _is_checked(kind: Any, value: Any) -> bool:
    if type(value) is not kind:
        return False
    check_fields(value)
    return True


def _is_finite(value: Any) -> bool:
    return (isinstance(value, float) or type(value) is int) and math.isfinite(value)


def _is_float(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_CHARACTERS  # torch's version, say, has a type of its own


#: What tells whether a value is of a plain type.
_SCALARS: dict[Any, _Test] = {
    float: _is_float,
    str: _is_text,
    int: lambda value: type(value) is int and 0 <= value <= _MOST_INTEGER,
    bool: lambda value: type(value) is bool,
    NoneType: lambda value: value is None,
}


def _is_scalar(value: Any) -> bool:
    """Whether a value is of one of them, whichever that is."""
    return any(test(value) for test in _SCALARS.values())
