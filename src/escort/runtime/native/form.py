"""The native form of calls of one kind: segments of native steps, and the steps between them as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from escort.runtime.effects import is_view, name_of, writes
from escort.runtime.loop import BoundStep, run_steps
from escort.runtime.native.call import Draft, NotNativeError, storage_of
from escort.runtime.native.lowering import OPERATIONS, Operations, has_operation, lower_layer
from escort.runtime.native.segment import Like, Segment, is_plain
from escort.runtime.native.values import Value
from escort.runtime.stand_in import runs_more
from escort.runtime.steps import Listing, Step
from escort.runtime.templates import Slot, filled, leaves, mapped, slots_in

# Functions of shapes and plain numbers: what they give is the same in all calls of a kind.
_OF_SHAPES = frozenset(
    """
    _assert add and_ ceil dim dtype device eq floor floordiv ge getitem gt itemsize le lt mod mul ndim ndimension ne neg
    not_ numel or_ pos pow shape size sqrt sub sym_size truediv
    """.split()
)


def unknown(network: nn.Module, step: Step) -> str | None:
    """Why no step of this kind runs natively, whatever the sizes are; None where it may."""
    if step.kind == "tensor":
        return None
    if step.kind == "layer":
        layer = network.get_submodule(step.target)
        if not (has_operation(layer) or is_view(network, step)):
            method = getattr(getattr(layer, "plan", None), "method", None)
            return f"is run by method {method}" if method else f"is a {type(layer).__name__}"
        return "runs code besides its own, such as a hook" if runs_more(layer) else None
    try:
        name = name_of(step)
    except ValueError:
        return "is no operation of torch that is known"
    is_known = name.rstrip("_") in OPERATIONS or _operator(name) in OPERATIONS or name in _OF_SHAPES
    return None if is_known or is_view(network, step) else f"there is no native {name}"


def _operator(name: str) -> str:
    """The name of an operator in place without what says so."""
    return name[1:] if name in ("iadd", "isub", "imul", "itruediv") else name.rstrip("_")


class Form:
    """What runs calls of one kind.

    Attributes:
        segments: those that run natively.
        reasons: why steps do not, by number of the step.
    """

    def __init__(self, parts: Sequence[Segment | Sequence[BoundStep]], reasons: Mapping[int, str]) -> None:
        self._parts = parts
        self.segments = [part for part in parts if isinstance(part, Segment)]
        self.reasons = reasons

    def stats(self) -> dict[str, Any]:
        """See :meth:`escort.runtime.native.Native.stats`."""
        return {
            "steps": sum(len(segment.steps) for segment in self.segments),
            "segments": len(self.segments),
            "instructions": sum(segment.instructions for segment in self.segments),
            "bytes": 4 * max((segment.arena_size for segment in self.segments), default=0),
            "reasons": dict(self.reasons),
        }

    def run(self, values: list[Any]) -> bool:
        """Runs a call, whose inputs are in the values.

        Returns:
            False where a tensor was not as in the call that the form was made of, so that the rest ran step by step.
        """
        is_as_before = True
        for part in self._parts:
            if not isinstance(part, Segment):
                run_steps(part, values)
                continue
            is_as_before = is_as_before and part.run(values)
            if not is_as_before:
                run_steps(part.steps, values)
        return is_as_before


def record(network: nn.Module, listing: Listing, steps: Sequence[BoundStep], values: list[Any]) -> Form:
    """Runs a call step by step, and makes the form of calls of its kind.

    Args:
        network: the program with these steps.
        values: with the inputs; the results are written to them.
    """
    return _Recorder(network, listing, steps, values).form()


class _Recorder:
    """Notes what each step is given and gives.

    Attributes:
        likes: what the tensors are like that are values, by number.
        constants: values that are the same in all calls of a kind.
    """

    def __init__(self, network: nn.Module, listing: Listing, steps: Sequence[BoundStep], values: list[Any]) -> None:
        self._network, self._listing, self._steps, self._values = network, listing, steps, values
        self._first = len(listing.inputs)
        self._likes: dict[int, Like] = {}
        self._constants: dict[int, Any] = {}
        for number in range(self._first):
            self._note(number, values[number], is_constant=True)
        self._parts: list[Segment | list[BoundStep]] = []
        self._reasons: dict[int, str] = {}
        self._begin()

    def _begin(self) -> None:
        """Begins a segment."""
        self._draft = Draft()
        self._natives: list[int] = []  # steps of the segment, by number of their value
        self._places: dict[int, Any] = {}  # what it makes
        self._outside: dict[int, Like] = {}
        self._outer: dict[int, Value] = {}

    def _note(self, number: int, value: Any, *, is_constant: bool) -> None:
        if isinstance(value, Tensor):
            if is_plain(value):
                self._likes[number] = Like.of(value)
        elif is_constant and not any(isinstance(leaf, Tensor) for leaf in leaves(value)):
            self._constants[number] = value

    def form(self) -> Form:
        for number, (step, bound) in enumerate(zip(self._listing.steps, self._steps, strict=True), self._first):
            args, kwargs, result = self._run(bound)
            try:
                self._lower(number, step, (args, kwargs), result)
                self._natives.append(number)
            except NotNativeError as error:
                self._reasons[number - self._first] = str(error)
                self._end()
                self._add_steps([bound])
                self._note(number, result, is_constant=False)
            del args, kwargs, result
        self._end()
        return Form(self._parts, self._reasons)

    def _run(self, bound: BoundStep) -> tuple[Any, Any, Any]:
        """Runs a step; its arguments and its result."""
        table, key, arguments, template, number, last_reads = bound
        values = self._values
        args, kwargs = ([values[i] for i in arguments], {}) if template is None else filled(template, values)
        result = values[number] = table[key](*args, **kwargs)
        for i in last_reads:
            values[i] = None
        return args, kwargs, result

    def _lower(self, number: int, step: Step, given: tuple[Any, Any], result: Any) -> None:
        """Puts a step into the segment. Raises NotNativeError where it cannot be."""
        if step.kind == "tensor":
            self._note(number, result, is_constant=False)
            return
        if reason := unknown(self._network, step):
            raise NotNativeError(reason)
        if self._is_of_shapes(step, result):
            for slot in slots_in((step.args, step.kwargs)):
                if slot.number in self._likes and slot.number not in self._places:
                    self._outside[slot.number] = self._likes[slot.number]
            self._constants[number] = self._places[number] = result
            return
        args, kwargs = mapped(step.args, self._place), mapped(step.kwargs, self._place)
        viewed = self._view(step, args, given, result)
        if viewed is None:
            viewed = self._made(step, args, kwargs, result)
        self._places[number] = viewed

    def _is_of_shapes(self, step: Step, result: Any) -> bool:
        """Whether a step computes with shapes and plain numbers alone."""
        if step.kind != "call" or any(isinstance(leaf, Tensor) for leaf in leaves(result)):
            return False
        return name_of(step) in _OF_SHAPES and all(
            slot.number in self._constants or slot.number in self._likes or self._is_value(slot.number)
            for slot in slots_in((step.args, step.kwargs))
        )

    def _is_value(self, number: int) -> bool:
        return isinstance(self._places.get(number), Value)

    def _place(self, leaf: Any) -> Any:
        """A value, or what is plain, in the place of a slot."""
        if not isinstance(leaf, Slot):
            return leaf
        number = leaf.number
        if number in self._places:
            return self._places[number]
        if number in self._constants:
            return self._constants[number]
        if number not in self._likes:
            raise NotNativeError("computes with what no step of the network is known to make")
        if number not in self._outer:
            like = self._likes[number]
            if like.dtype is not torch.float32 or not math.prod(like.shape):
                raise NotNativeError(f"computes with {like.dtype} of shape {tuple(like.shape)}")
            self._outer[number] = storage_of(number, tuple(like.shape), like.strides)
        self._outside[number] = self._likes[number]
        return self._outer[number]

    def _view(self, step: Step, args: Any, given: tuple[Any, Any], result: Any) -> Any:
        """The result as views of the first argument, or None where it is none."""
        if not args or not is_view(self._network, step):
            return None
        if isinstance(args[0], (tuple, list)) and step.kind == "call" and name_of(step) == "getitem":
            return args[0][args[1]]  # a piece
        x, place = given[0][0], args[0]
        pieces = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        if not isinstance(place, Value) or not pieces or writes(self._network, step):
            return None
        if any(piece.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for piece in pieces):
            return None

        def viewed(piece: Any) -> Any:
            if piece.dtype is not torch.float32 or not piece.numel():
                raise NotNativeError("gives a tensor of another type, or an empty one")
            offset = place.offset + piece.storage_offset() - x.storage_offset()
            return Value(place.storage, offset, tuple(piece.shape), piece.stride())

        return mapped(result, viewed)

    def _made(self, step: Step, args: Any, kwargs: Any, result: Any) -> Any:
        """The result by instructions."""
        if type(result) is not Tensor or not is_plain(result) or result.dtype is not torch.float32:
            raise NotNativeError(f"gives a {type(result).__name__} that is not plain float32")
        if not result.numel():
            raise NotNativeError("gives an empty tensor")
        target = None
        if writes(self._network, step):
            target = args[0]
            if not isinstance(target, Value) or target.storage.source is not None:
                raise NotNativeError("writes to a tensor that others see")
        elif not result.is_contiguous():
            raise NotNativeError("gives a tensor that is not contiguous")
        lowered = Operations(tuple(result.shape), target)
        function = (
            partial(lower_layer, lowered, self._network.get_submodule(step.target)) if step.kind == "layer" else None
        )
        if function is None:
            name = _operator(name_of(step))
            if name not in OPERATIONS:
                raise NotNativeError("copies its input, and no native operation does")
            function = partial(OPERATIONS[name], lowered)
        try:
            value = function(*args, **kwargs)
        except TypeError as error:
            raise NotNativeError(f"is called with arguments that are not known: {error}") from error
        self._draft.add(lowered.draft)
        return value

    def _end(self) -> None:
        """Ends the segment."""
        numbers = self._natives
        if numbers:
            steps = [self._steps[number - self._first] for number in numbers]
            if self._draft.instructions:
                self._parts.append(self._segment(numbers, steps))
            else:
                self._add_steps(steps)
                if any(number >= self._first for number in self._outside):
                    # Nothing checks that these tensors are the same each time, on whose shapes the constants depend.
                    self._constants = {n: value for n, value in self._constants.items() if n not in numbers}
            for number in numbers:
                self._note_result(number)
        self._begin()

    def _add_steps(self, steps: Sequence[BoundStep]) -> None:
        if self._parts and isinstance(self._parts[-1], list):
            self._parts[-1] += steps
        else:
            self._parts.append(list(steps))

    def _segment(self, numbers: Sequence[int], steps: Sequence[BoundStep]) -> Segment:
        reads = [self._steps[n - self._first] for n in numbers if self._listing.steps[n - self._first].kind == "tensor"]
        results = {number: self._places[number] for number in self._read_behind(numbers) if number in self._places}
        return Segment(steps, self._draft, self._outside, results, reads)

    def _read_behind(self, numbers: Sequence[int]) -> Iterator[int]:
        """Of the results of these steps those that are read by later ones, or are returned."""
        gone = {i for number in numbers for i in self._steps[number - self._first][-1]}
        return (number for number in numbers if number not in gone)

    def _note_result(self, number: int) -> None:
        """What later segments may rely on: a result of this one comes to them as a tensor."""
        place = self._places.get(number)
        if isinstance(place, Value):
            self._likes[number] = Like(torch.Size(place.shape), place.strides, torch.float32)
