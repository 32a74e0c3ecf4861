"""Arguments and outputs of a program: plain values in which a :class:`Slot` stands for a computed one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any


@dataclass(frozen=True)
class Slot:
    """The value of that number, counted through a program's inputs and then its steps."""

    number: int

    def __repr__(self) -> str:
        return f"%{self.number}"


def filled(template: Any, values: list[Any]) -> Any:
    """A template with values in the place of its slots."""
    return mapped(template, lambda leaf: values[leaf.number] if type(leaf) is Slot else leaf)


def mapped(template: Any, function: Callable[[Any], Any]) -> Any:
    """A template with ``function(leaf)`` in the place of each slot and each plain value."""
    kind = type(template)
    if kind is list:
        return [mapped(item, function) for item in template]
    if kind is tuple:
        return tuple([mapped(item, function) for item in template])
    if kind is dict or kind is OrderedDict:
        return kind([(key, mapped(item, function)) for key, item in template.items()])
    if kind is slice:
        return slice(*[mapped(item, function) for item in (template.start, template.stop, template.step)])
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return kind(*[mapped(item, function) for item in template])
    return function(template)


def leaves(template: Any) -> Iterator[Any]:
    """The slots and plain values of a template, in order."""
    if isinstance(template, (list, tuple)):
        for item in template:
            yield from leaves(item)
    elif isinstance(template, dict):
        for item in template.values():
            yield from leaves(item)
    elif isinstance(template, slice):
        yield from leaves((template.start, template.stop, template.step))
    else:
        yield template


def slots_in(template: Any) -> list[Slot]:
    return [leaf for leaf in leaves(template) if isinstance(leaf, Slot)]


@cache
def named_tuple(name: str, fields: tuple[str, ...]) -> type[tuple[Any, ...]]:
    """A class like that of ``collections.namedtuple``, which would write its names into source."""

    def new(cls: Any, *values: Any) -> Any:
        if len(values) != len(fields):
            raise TypeError(f"{name} has the fields {fields}, got {len(values)} values")
        return tuple.__new__(cls, values)

    def listed(self: Any) -> str:
        return f"{name}({', '.join(f'{field}={value!r}' for field, value in zip(fields, self, strict=True))})"

    members: dict[str, Any] = {field: property(itemgetter(i)) for i, field in enumerate(fields)}
    members |= {
        "__slots__": (),
        "_fields": fields,
        "__new__": new,
        "_make": classmethod(lambda cls, values: cls(*values)),
        "_asdict": lambda self: dict(zip(fields, self, strict=True)),
        "__repr__": listed,
        "__reduce__": lambda self: (_named, (name, fields, tuple(self))),
    }
    return type(name, (tuple,), members)


def _named(name: str, fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    """For pickle, which finds no class of that name."""
    return named_tuple(name, fields)(*values)
