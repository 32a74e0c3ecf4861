"""A program as JSON. Reading it back runs nothing that it names, and turns nothing into source."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from escort.problem import torch_name
from escort.runtime.program import Program
from escort.runtime.saved.errors import naming
from escort.runtime.saved.limits import MAX_DEPTH, MAX_NAME, MAX_NUMBERS, MAX_OPERANDS, MAX_PATH, MAX_STEPS
from escort.runtime.saved.operations import OPERATIONS, check_step, named
from escort.runtime.saved.values import decode, encode
from escort.runtime.steps import REQUIRED, Input, Listing, Step
from escort.runtime.templates import leaves, slots_in

# Names are labels and nothing else. These are free of quotes and control characters, so that messages can show them.
_LABEL = re.compile(r"(?!__)[\w+\-:/@ ]+")
_MOST_DIMENSIONS = 16
_DTYPES = {torch_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def describe_program(program: Program) -> dict[str, Any]:
    """A program's listing. Its layers are described apart.

    Raises:
        ValueError: naming the step that cannot be saved, and the remedy.
    """
    listing = program.listing
    if len(listing.steps) > MAX_STEPS:
        raise ValueError(f"a program of {len(listing.steps)} steps cannot be saved: {MAX_STEPS} are the limit")
    steps = []
    for number, step in enumerate(listing.steps, len(listing.inputs)):
        with naming(f"step %{number} = {_shortened(str(step))}"):
            steps.append(_describe_step(step))
    inputs = [_describe_input(given) for given in listing.inputs]
    return {"inputs": inputs, "steps": steps, "output": encode(listing.output)}


def _describe_input(given: Input) -> dict[str, Any]:
    _check_label(given.name.lstrip("*"))
    record: dict[str, Any] = {"name": given.name}
    if given.default is not REQUIRED:
        record["default"] = encode(given.default)
    if given.fixed is not REQUIRED:
        record["fixed"] = encode(given.fixed)
    if given.like is not None:
        shape, dtype = given.like
        record |= {"shape": list(shape), "dtype": torch_name(dtype)}
    return record


def _describe_step(step: Step) -> dict[str, Any]:
    target, args = step.target, step.args
    if step.kind == "call":
        target, args = named(step)
        check_step(OPERATIONS[target], args, step.kwargs)
    else:
        check_path(target)
    record: dict[str, Any] = {step.kind: target}
    if step.kind != "tensor":
        record["args"] = [encode(value) for value in args]
    if step.kwargs:
        record["kwargs"] = {key: encode(value) for key, value in step.kwargs.items()}
    _build_step(record)  # within all limits
    return record


def build_program(record: Mapping[str, Any], owned: Callable[[Listing], dict[str, Any]]) -> Program:
    """The program behind :func:`describe_program`.

    Args:
        owned: gives the layers and tensors that a listing names, by path.

    Raises:
        ValueError, KeyError, TypeError: naming what makes no program, or is beyond a limit.
    """
    listing = build_listing(record)
    return Program(listing, owned(listing))


def build_listing(record: Mapping[str, Any]) -> Listing:
    """The listing of a program. Raises ValueError, KeyError or TypeError as :func:`build_program` does."""
    if not isinstance(record["steps"], list) or len(record["steps"]) > MAX_STEPS:
        raise ValueError(f"a program has at most {MAX_STEPS} steps")
    if not isinstance(record["inputs"], list) or len(record["inputs"]) > MAX_OPERANDS:
        raise ValueError(f"a program has at most {MAX_OPERANDS} inputs")
    inputs = [_build_input(given) for given in record["inputs"]]
    if len({given.name for given in inputs}) != len(inputs):
        raise ValueError("two inputs have one name")
    steps = []
    for number, step in enumerate(record["steps"], len(inputs)):
        with naming(f"step %{number}"):
            steps.append(_build_step(step))
    output = _bounded(decode(record["output"]))
    return Listing(tuple(inputs), tuple(steps), output)


def _build_input(record: Mapping[str, Any]) -> Input:
    name = record["name"]
    _check_label(name[1:].removeprefix("*") if isinstance(name, str) and name.startswith("*") else name)
    if unknown := record.keys() - {"name", "default", "fixed", "shape", "dtype"}:
        raise ValueError(f"an input has no {sorted(unknown)[0]!r}")
    default, fixed = (_bounded(decode(record[key])) if key in record else REQUIRED for key in ("default", "fixed"))
    if slots_in((default, fixed)):
        raise ValueError("a default is a plain value")
    if "shape" not in record:
        return Input(name, default, fixed=fixed)
    if fixed is not REQUIRED:
        raise ValueError("an input that is fixed is no tensor")
    shape = record["shape"]
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(size) is int and 0 <= size <= MAX_NUMBERS for size in shape)
        or math.prod(shape) > MAX_NUMBERS
    ):
        raise ValueError(f"no network takes an input of shape {_shortened(str(shape))}")
    return Input(name, default, (torch.Size(shape), _DTYPES[record["dtype"]]))


def _build_step(record: Mapping[str, Any]) -> Step:
    (kind,) = record.keys() - {"args", "kwargs"}
    target = record[kind]
    if kind == "tensor":
        if len(record) > 1:
            raise ValueError("what reads a tensor has no arguments")
        check_path(target)
        return Step("tensor", target)
    if kind not in ("layer", "call"):
        raise ValueError(f"{kind!r} is no kind of step")
    if not isinstance(record["args"], list):
        raise TypeError("arguments are a list")
    args = tuple(decode(value, MAX_DEPTH) for value in record["args"])
    kwargs = {key: decode(value, MAX_DEPTH) for key, value in record.get("kwargs", {}).items()}
    for key in kwargs:
        if not key.isidentifier() or not key.isascii() or key.startswith("_") or len(key) > MAX_NAME:
            raise ValueError("a keyword is an identifier")
    _bounded((args, kwargs))
    if kind == "layer":
        check_path(target)
        return Step("layer", target, args, kwargs)
    if target not in OPERATIONS:
        raise ValueError(f"a call of {_shortened(str(target))} is not among those that a saved program may make")
    check_step(OPERATIONS[target], args, kwargs)
    return Step("call", OPERATIONS[target], args, kwargs)


def _bounded(template: Any) -> Any:
    for count, _ in enumerate(leaves(template), 1):
        if count > MAX_OPERANDS:
            raise ValueError(f"more than {MAX_OPERANDS} values stand in one place")
    return template


def check_path(path: Any) -> None:
    """Raises ValueError unless this can name a layer or a tensor of a network."""
    if not isinstance(path, str) or len(path) > MAX_PATH or not all(map(_is_label, path.split("."))):
        raise ValueError(f"{_shortened(repr(path))} cannot name a layer or tensor of a saved network; rename it")


def _check_label(text: Any) -> None:
    if not _is_label(text):
        raise ValueError(f"{_shortened(repr(text))} cannot name an input; rename it")


def _is_label(text: Any) -> bool:
    return isinstance(text, str) and len(text) <= MAX_NAME and _LABEL.fullmatch(text) is not None


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."
