"""Arguments of layers and of calls as JSON: plain values, and references to the nodes of a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

#: kind of tensor option -> its values by name.
_OPTIONS = {
    cls.__name__: {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, cls)}
    for cls in (torch.dtype, torch.memory_format, torch.layout)
}


def encode(value: Any) -> Any:
    """An argument as JSON. Raises ValueError for what is no number, text, tensor option or node."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float):
        return {"float": str(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"size" if isinstance(value, torch.Size) else "tuple": [encode(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [encode(item) for item in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": None}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise ValueError(f"{value!r} of type {type(value).__name__} cannot be saved")


def decode(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The argument behind :func:`encode`. Raises ValueError, KeyError or TypeError for anything else."""
    if isinstance(data, int) and abs(data) >= 2**63:
        raise ValueError("an integer exceeds 64 bits")
    if not isinstance(data, dict | list):
        return data
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    ((kind, content),) = data.items()
    if kind == "node":
        return nodes[content]
    if kind == "dict":
        if not all(isinstance(key, str) for key in content):
            raise ValueError("the keys of a dict are text")
        return {key: decode(item, nodes) for key, item in content.items()}
    if kind == "tuple":
        return tuple(decode(content, nodes))
    if kind == "size":
        return torch.Size(decode(content, nodes))
    if kind == "slice":
        return slice(*decode(content, nodes))
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "ellipsis":
        return ...
    if kind == "device":
        return torch.device(content)
    if kind in _OPTIONS:
        return _OPTIONS[kind][content]
    raise ValueError(f"{kind!r} is no kind of argument")
