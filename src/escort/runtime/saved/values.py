"""Arguments of layers and steps as JSON: plain values, and references to the values of a program."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from escort.problem import torch_name
from escort.runtime.saved.limits import INTEGER_BITS, MAX_DEPTH, MAX_NAME, MAX_TEXT
from escort.runtime.templates import Slot, named_tuple

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*", re.ASCII)
#: kind of tensor option -> its values by name.
_OPTIONS = {
    cls.__name__: {torch_name(value): value for value in vars(torch).values() if isinstance(value, cls)}
    for cls in (torch.dtype, torch.memory_format, torch.layout)
}


def encode(value: Any) -> Any:
    """A value as JSON. Raises ValueError for what is no number, text, tensor option, slot or container of them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Slot):
        return {"value": value.number}
    if value is ...:
        return {"ellipsis": None}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {type(value).__name__: torch_name(value)}
    return _encode_container(value)


def _encode_container(value: Any) -> Any:
    if isinstance(value, list):  # fx has lists of its own
        return [encode(item) for item in value]
    if type(value) in (tuple, torch.Size):
        return {"size" if isinstance(value, torch.Size) else "tuple": [encode(item) for item in value]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        labels = {"name": type(value).__name__, "fields": list(value._fields)}
        return {"named_tuple": {**labels, "values": [encode(item) for item in value]}}
    if type(value) in (dict, OrderedDict) and all(isinstance(key, str) for key in value):
        return {"dict" if type(value) is dict else "ordered": [[key, encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(item) for item in (value.start, value.stop, value.step)]}
    raise ValueError(f"{value!r} of type {type(value).__name__} cannot be saved")


def decode(data: Any, depth: int = MAX_DEPTH) -> Any:
    """The value behind :func:`encode`. Raises ValueError, KeyError or TypeError for anything else."""
    if depth < 0:
        raise ValueError(f"containers lie more than {MAX_DEPTH} deep in each other")
    if type(data) is int and data.bit_length() >= INTEGER_BITS:
        raise ValueError(f"an integer has more than {INTEGER_BITS} bits")
    if type(data) is str:
        return _text(data, MAX_TEXT)
    if not isinstance(data, dict | list):
        return data
    if isinstance(data, list):
        return [decode(item, depth - 1) for item in data]
    ((kind, content),) = data.items()
    if kind not in _KINDS:
        raise ValueError(f"{kind!r} is no kind of value")
    return _KINDS[kind](content, depth - 1)


def _text(data: Any, most: int) -> str:
    if type(data) is not str or len(data) > most:
        raise ValueError(f"a text of at most {most} characters is expected")
    return data


def _list(content: Any, depth: int) -> list[Any]:
    if type(content) is not list:
        raise TypeError(f"a list is expected, got {type(content).__name__}")
    return [decode(item, depth) for item in content]


def _slot(content: Any, depth: int) -> Slot:
    if type(content) is not int:
        raise TypeError(f"the number of a value is an integer, not {content!r}")
    return Slot(content)


def _size(content: Any, depth: int) -> torch.Size:
    sizes = _list(content, depth)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a size holds integers")
    return torch.Size(sizes)


def _pairs(content: Any, depth: int) -> dict[str, Any]:
    if type(content) is not list or len({key for key, _ in content}) != len(content):
        raise ValueError("a dict is a list of pairs whose keys differ")
    return {_text(key, MAX_NAME): decode(item, depth) for key, item in content}


def _slice(content: Any, depth: int) -> slice:
    start, stop, step = _list(content, depth)
    return slice(start, stop, step)


def _named_tuple(content: Any, depth: int) -> Any:
    name, fields, values = content["name"], content["fields"], _list(content["values"], depth)
    for label in (name, *fields):
        if type(label) is not str or len(label) > MAX_NAME or not _FIELD.fullmatch(label):
            raise ValueError(f"{str(label)[:MAX_NAME]!r} cannot name a tuple or a field of it")
    if len(set(fields)) != len(fields):
        raise ValueError("two fields of a tuple have one name")
    return named_tuple(name, tuple(fields))(*values)


def _float(content: Any, depth: int) -> float:
    if content not in ("inf", "-inf", "nan"):
        raise ValueError(f"{content!r} is no number")
    return float(content)


def _device(content: Any, depth: int) -> torch.device:
    if type(content) is not str or not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", content, re.ASCII):
        raise ValueError(f"{content!r} is no device")
    return torch.device(content)


def _option(kind: str) -> Callable[[Any, int], Any]:
    return lambda content, depth: _OPTIONS[kind][content]


_KINDS: dict[str, Callable[[Any, int], Any]] = {
    "value": _slot,
    "tuple": lambda content, depth: tuple(_list(content, depth)),
    "size": _size,
    "dict": _pairs,
    "ordered": lambda content, depth: OrderedDict(_pairs(content, depth)),
    "named_tuple": _named_tuple,
    "slice": _slice,
    "float": _float,
    "ellipsis": lambda content, depth: ...,
    "device": _device,
    **{kind: _option(kind) for kind in _OPTIONS},
}
