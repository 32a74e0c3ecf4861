"""A program run on tensors without memory, before anything real runs: what it would make is known, and bounded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from escort.layers import SparseConv2d
from escort.layers.counters import Counters
from escort.problem import Problem
from escort.runtime.program import Bound, Program
from escort.runtime.saved.builders import is_own
from escort.runtime.saved.limits import MAX_CALLS, MAX_NUMBERS
from escort.runtime.saved.operations import Plain, check_call, check_value
from escort.runtime.saved.problems import check_problem, check_together
from escort.runtime.steps import REQUIRED, Input, Step
from escort.runtime.templates import filled, leaves


@dataclass
class Work:
    """What running a program once takes.

    Attributes:
        at_a_time: numbers in the tensors of all values that are needed at a time, at most.
        written: numbers in the results of all operators.
        flop: floating-point operations of products and convolutions; of sparse ones those of their nonzeros.
        is_bounded: whether that is all. It is not where steps compute with what a module of the model's own gives.
    """

    at_a_time: int = 0
    written: int = 0
    flop: int = 0
    is_bounded: bool = True


#: In the place of a value that a module of the model's own gives, or that is computed with one.
_UNKNOWN = object()


def rehearse(program: Program, device: torch.device) -> Work:
    """Runs a program on the example that its inputs are like. Steps that give no tensor are checked from now on.

    Modules of the model's own are not run, since their code may do anything. What is computed with their results is not
    run either; as it may be no tensor, it is checked from now on.

    Raises:
        ValueError: naming the step that cannot run, or that makes more than a network does.
    """
    listing, bound, counted = program.listing, Bound(program), _Counted()
    steps = list(listing.steps)
    problems: list[Problem] = []
    with torch.no_grad(), _without_fused_attention(), FakeTensorMode(allow_non_fake_inputs=True), counted:
        values = bound.values.copy()
        values[: len(listing.inputs)] = [_example(given, device) for given in listing.inputs]
        held = {number: _numbers(values[number]) for number in range(len(listing.inputs))}
        for i, (table, key, arguments, template, result, last_reads) in enumerate(bound.steps):
            step = steps[i]
            try:
                args, kwargs = ([values[j] for j in arguments], {}) if template is None else filled(template, values)
                if _is_unknown(step, table[key], (args, kwargs)):
                    counted.work.is_bounded = False
                    values[result] = _UNKNOWN
                else:
                    problems += _check_call(step.target, table[key], args, kwargs)
                    values[result] = check_value(table[key](*args, **kwargs))
            except Exception as error:
                raise ValueError(f"step %{result} = {str(step)[:100]}: {_first_line(error)}") from error
            is_tensor = isinstance(values[result], Tensor)
            if step.kind == "call" and not is_tensor and not isinstance(step.target, Plain):
                steps[i] = replace(step, target=Plain(step.target))
            held[result] = _numbers(values[result])
            counted.work.at_a_time = max(counted.work.at_a_time, sum(held.values()))
            for read in last_reads:
                values[read] = None
                held.pop(read, None)
    check_together(problems)
    for layer in program.modules():
        if isinstance(layer, SparseConv2d):
            layer.counters = Counters()  # a rehearsal is no call
    program.listing = replace(listing, steps=tuple(steps))
    program._bound = None
    return counted.work


def _is_unknown(step: Step, called: Any, arguments: Any) -> bool:
    """Whether what a step gives is known only where the model's own code runs."""
    return (step.kind == "layer" and is_own(called)) or any(leaf is _UNKNOWN for leaf in leaves(arguments))


def _numbers(value: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _check_call(target: Any, called: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Problem]:
    """What a sparse convolution is asked for, if it is one.

    Raises:
        ValueError: for a call that would cost more than networks do, whatever it is that it makes.
    """
    if not isinstance(called, SparseConv2d):
        check_call(target, tuple(args), kwargs)
        return []
    batch, channels, height, width = args[0].shape
    if channels != called.in_channels:
        raise ValueError(f"the layer takes {called.in_channels} channels, got {channels}")
    problem = called.problem(batch, height, width)  # it lays out tables for the size that it is called with
    check_problem(problem)
    return [problem]


def _example(given: Input, device: torch.device) -> Any:
    if given.like is not None:
        shape, dtype = given.like
        return torch.empty(shape, dtype=dtype, device=device)
    if given.fixed is not REQUIRED:
        return given.fixed
    if given.default is not REQUIRED:
        return given.default
    if given.name.startswith("*"):
        return {} if given.name.startswith("**") else ()
    raise ValueError(f"what its input {given.name} is like is not known; convert the model with an example of it")


class _Counted(TorchDispatchMode):
    """Raises ValueError where torch's operators are called too often, or make too large a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.work = 0, Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise ValueError(f"the network calls torch's operators more than {MAX_CALLS} times")
        result = _normed(*args[:5]) if _normalises(func, args) else func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.work.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                numbers = math.prod(leaf.shape)
                self.work.written += numbers
                if numbers > MAX_NUMBERS:
                    raise ValueError(f"a tensor of shape {tuple(leaf.shape)} has more than {MAX_NUMBERS} numbers")
        return result


def _normalises(func: Any, args: Sequence[Any]) -> bool:
    """Whether a call is a batch norm by constant statistics."""
    return func is torch.ops.aten.native_batch_norm.default and not args[5]


def _normed(x: Tensor, *by_channel: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What a batch norm gives for x (N, C, ...), each of the others (C,): torch takes milliseconds to find that out."""
    for tensor in by_channel:
        if tensor is not None and tensor.shape != x.shape[1:2]:
            raise ValueError(f"a batch norm of {tuple(tensor.shape)} channels gets an input of shape {tuple(x.shape)}")
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Attention by operators that tensors without memory go through."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
