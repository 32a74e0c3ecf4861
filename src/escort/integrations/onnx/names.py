"""Paths for modules and tensors, and names for results, out of those of a file."""

from __future__ import annotations

import keyword
import re
from itertools import chain, count

#: What a quantizer puts behind the name of a weight.
_QUANTIZED = re.compile(r"(_quantized|_DequantizeLinear_Output|_dequantized|_QuantizeLinear_Output)+$")
_PARAMETER = re.compile(r"\.(weight|bias|scale|gamma|running_mean|kernel|weights)$")
_MAX_PART, _MAX_PATH = 100, 600


def identifier(name: str) -> str:
    """A name as one of Python: a name of a file may hold any character, and torch.fx writes names into source."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:_MAX_PART]
    if plain == "self" or keyword.iskeyword(plain):  # what torch.fx calls the module
        return f"{plain}_"
    return f"_{plain}" if not plain or plain[0].isdigit() else plain


def module_path(weight: str | None, node: str, operator: str, scope: str) -> str:
    """The path of a module: that of its weight, if it has one, else that of its node.

    ``layer1.0.conv1.weight`` is of ``layer1.0.conv1``, and so is the node ``/layer1/layer1.0/conv1/Conv``, as torch
    calls it: what is a part of a module comes behind it with the module's name again.

    Args:
        weight: the name of the weight.
        node: the name of the node, or of its result where it has none.
        operator: what the node computes.
        scope: the path of the module that the exporter says the node is of, "" where it does not.
    """
    if weight is not None:
        weight = _QUANTIZED.sub("", weight)
        if _PARAMETER.search(weight):
            return _path(_PARAMETER.sub("", weight))
    if scope:
        return _path(scope)
    scopes = [part for part in node.split("/") if part]
    if len(scopes) > 1 and re.fullmatch(rf"{operator}(_\d+)?", scopes[-1]):
        scopes.pop()
    inner = [part for part, behind in zip(scopes, [*scopes[1:], ""], strict=True) if not behind.startswith(f"{part}.")]
    return _path("/".join(inner))


def tensor_path(name: str) -> str:
    """The path of a tensor that is no module's."""
    return _path(name)


def _path(name: str) -> str:
    """The name's parts between dots, slashes and colons, each of them letters, digits and underscores.

    A part that is a word of Python's gets an underscore, as torch.fx writes paths into source.
    """
    parts = (re.sub(r"[^A-Za-z0-9_]+", "_", part).strip("_")[:_MAX_PART] for part in re.split(r"[./:]+", name))
    parts = (f"{part}_" if keyword.iskeyword(part) else part for part in parts)
    return ".".join(filter(None, parts))[:_MAX_PATH].strip(".") or "unnamed"


class Paths:
    """Paths that are taken. None of them leads into another."""

    def __init__(self, reserved: set[str]) -> None:
        self._reserved = reserved
        self._taken: set[str] = set()
        self._inner: set[str] = set()  # what stands around them

    def take(self, path: str) -> str:
        """The path, or one like it that is free."""
        head, dot, rest = path.partition(".")
        path = f"{head}_{dot}{rest}" if head in self._reserved else path
        if any(outer in self._taken for outer in _around(path)):
            path = path.replace(".", "_")
        free = (name for name in chain([path], (f"{path}_{number}" for number in count(1))) if self._is_free(name))
        self._taken.add(path := next(free))
        self._inner.update(_around(path))
        return path

    def _is_free(self, path: str) -> bool:
        return path not in self._taken and path not in self._inner and path not in self._reserved


def _around(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
