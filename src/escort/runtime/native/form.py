"""The native form of calls of one kind: segments of native steps, and the steps between them as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from escort.cuda.capture import in_a_line
from escort.runtime.effects import Layers, is_view, name_of, writes
from escort.runtime.loop import BoundStep, run_steps
from escort.runtime.native.batching import Batching
from escort.runtime.native.call import Draft, NotNativeError
from escort.runtime.native.lowering import OPERATIONS, empty_result, has_operation, keeps_shape, lower_layer
from escort.runtime.native.operations import Operations
from escort.runtime.native.segment import Like, Segment, is_plain
from escort.runtime.native.values import Storage, Value
from escort.runtime.stand_in import runs_more
from escort.runtime.steps import Listing, Step
from escort.runtime.templates import Slot, leaves, mapped, slots_in

# Functions of shapes and plain numbers: what they give is the same in all calls of a kind.
_OF_SHAPES = frozenset(
    """
    _assert add and_ ceil dim dtype eq floor floordiv ge getitem gt itemsize le lt mod mul ndim ndimension ne neg
    not_ numel or_ pos pow shape size sqrt sub sym_size truediv
    """.split()
)


class _Found:
    """The layers of a network that were looked for: a look-up by path takes microseconds."""

    def __init__(self, network: nn.Module) -> None:
        self.get_submodule = cache(network.get_submodule)


def unknown(network: Layers, step: Step) -> str | None:
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
            "chunks": max((segment.chunks for segment in self.segments), default=1),
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


def record(
    network: nn.Module, listing: Listing, steps: Sequence[BoundStep], values: list[Any], batching: Batching
) -> Form:
    """Makes the form of calls of a kind, and runs the first of them by it.

    Args:
        network: the program with these steps.
        values: with the inputs; the results are written to them.
        batching: how the samples of a batch go through its segments.
    """
    return _Recorder(network, listing, steps, values, batching).form()


class _Recorder:
    """Makes segments of steps by running them on tensors without memory, and runs each segment when it is complete.

    Attributes:
        metas: tensors without memory for those values that are tensors, by number.
        constants: values that are the same in all calls of a kind, by number.
        places: what the segment makes, by number.
        outside: what it reads of what was there before.
    """

    def __init__(
        self,
        network: nn.Module,
        listing: Listing,
        steps: Sequence[BoundStep],
        values: list[Any],
        batching: Batching,
    ) -> None:
        self._network, self._listing, self._steps, self._values = _Found(network), listing, steps, values
        self._batching = batching
        self._first = len(listing.inputs)
        self._metas: dict[int, Any] = {}
        self._constants: dict[int, Any] = {}
        for number in range(self._first):
            self._note(number)
            if not isinstance(values[number], Tensor):
                self._constants[number] = values[number]
        self._parts: list[Segment | list[BoundStep]] = []
        self._reasons: dict[int, str] = {}
        self._begin()

    def _begin(self) -> None:
        self._draft = Draft()
        self._natives: list[int] = []  # steps of the segment, by number of their value
        self._places: dict[int, Any] = {}
        self._outside: dict[int, Value] = {}

    def _note(self, number: int) -> None:
        """Notes a value that is there, where it is a plain tensor."""
        x = self._values[number]
        if is_plain(x):
            self._metas[number] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    def form(self) -> Form:
        for number, (step, bound) in enumerate(zip(self._listing.steps, self._steps, strict=True), self._first):
            try:
                self._add(number, step, bound)
                self._natives.append(number)
            except NotNativeError as error:
                self._reasons[number - self._first] = str(error)
                self._end()
                self._add_steps([bound])
                run_steps([bound], self._values)
                self._note(number)
        self._end()
        return Form(self._parts, self._reasons)

    def _add(self, number: int, step: Step, bound: BoundStep) -> None:
        """Puts a step into the segment. Raises NotNativeError where it cannot be."""
        if step.kind == "tensor":
            run_steps([bound], self._values)
            self._note(number)
            return
        if reason := unknown(self._network, step):
            raise NotNativeError(reason)
        args, kwargs = mapped(step.args, self._meta), mapped(step.kwargs, self._meta)
        result = self._result(step, args, kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in leaves(result)):
            if step.kind == "layer" or name_of(step) not in _OF_SHAPES:
                raise NotNativeError("gives what is no tensor")
            for slot in slots_in((step.args, step.kwargs)):
                self._place(slot)  # which has it checked in each call
            self._constants[number] = self._places[number] = result
            return
        for leaf in leaves([args, kwargs]):
            if isinstance(leaf, Tensor) and leaf.dtype is not torch.float32:
                raise NotNativeError(f"computes with {leaf.dtype}")
        place_args, place_kwargs = mapped(step.args, self._place), mapped(step.kwargs, self._place)
        place = self._view(step, place_args, args, result)
        if place is None:
            place = self._made(step, place_args, place_kwargs, result)
        self._places[number], self._metas[number] = place, result

    def _meta(self, leaf: Any) -> Any:
        """What a step is run on in the place of a slot."""
        if not isinstance(leaf, Slot):
            return leaf
        for known in (self._metas, self._constants):
            if leaf.number in known:
                return known[leaf.number]
        raise NotNativeError("computes with what no step is known to make")

    def _place(self, leaf: Any) -> Any:
        """The value, or what is plain, in the place of a slot."""
        if not isinstance(leaf, Slot):
            return leaf
        number = leaf.number
        for known in (self._places, self._constants, self._outside):
            if number in known:
                return known[number]
        x = self._metas[number]
        self._outside[number] = Value(Storage.of(tuple(x.shape), number), 0, tuple(x.shape), x.stride())
        return self._outside[number]

    def _result(self, step: Step, args: Any, kwargs: Any) -> Any:
        """The result of a step without memory. What torch refuses is left to it."""
        if self._is_like_its_input(step, args):
            return args[0] if writes(self._network, step) else torch.empty_like(args[0])
        try:
            if step.kind == "call":
                return step.target(*args, **kwargs)
            return empty_result(self._network.get_submodule(step.target), *args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise NotNativeError(f"cannot be run without memory: {in_a_line(error)}") from error

    def _is_like_its_input(self, step: Step, args: Any) -> bool:
        """Whether the result has the shape of the first argument: torch takes up to a millisecond to find that out."""
        if not args or not isinstance(args[0], Tensor) or not args[0].is_contiguous():
            return False
        return keeps_shape(self._network.get_submodule(step.target) if step.kind == "layer" else name_of(step))

    def _view(self, step: Step, places: Any, args: Any, result: Any) -> Any:
        """The result as views of the first argument, or None where it is none."""
        if not args or not is_view(self._network, step) or writes(self._network, step):
            return None
        if isinstance(places[0], (tuple, list)):
            return places[0][places[1]]  # a piece
        x, place = args[0], places[0]
        pieces = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        if not isinstance(place, Value) or any(
            piece.untyped_storage()._cdata != x.untyped_storage()._cdata for piece in pieces
        ):
            return None

        def viewed(piece: Any) -> Any:
            _check_result(piece)
            offset = place.offset + piece.storage_offset() - x.storage_offset()
            return Value(place.storage, offset, tuple(piece.shape), piece.stride())

        return mapped(result, viewed)

    def _made(self, step: Step, args: Any, kwargs: Any, result: Any) -> Any:
        """The result by instructions."""
        _check_result(result)
        target = None
        if writes(self._network, step):
            target = args[0]
            if not isinstance(target, Value) or target.storage.source is not None:
                raise NotNativeError("writes to a tensor that others see")
        elif not result.is_contiguous():
            raise NotNativeError("gives a tensor that is not contiguous")
        lowered = Operations(tuple(result.shape), target, Draft(joined=self._draft.joined))
        try:
            value = self._function(step)(lowered, *args, **kwargs)
        except TypeError as error:
            raise NotNativeError(f"is called with arguments that are not known: {in_a_line(error)}") from error
        self._draft.add(lowered.draft)
        return value

    def _function(self, step: Step) -> Callable[..., Value]:
        if step.kind == "layer":
            layer = self._network.get_submodule(step.target)
            return lambda lowered, *args, **kwargs: lower_layer(lowered, layer, *args, **kwargs)
        name = _operator(name_of(step))
        if name not in OPERATIONS:
            raise NotNativeError("copies its input, and no native operation does so")
        return OPERATIONS[name]

    def _end(self) -> None:
        """Ends the segment, and runs it."""
        numbers = self._natives
        if numbers:
            steps = [self._steps[number - self._first] for number in numbers]
            if self._draft.instructions:
                segment = self._segment(numbers, steps)
                self._parts.append(segment)
                if not segment.run(self._values):
                    run_steps(steps, self._values)
            else:
                self._add_steps(steps)
                run_steps(steps, self._values)
            for number in numbers:
                self._metas.pop(number, None)
                self._note(number)
            if any(number >= self._first for number in self._outside) and not self._draft.instructions:
                # Nothing checks that these tensors are the same each time, on whose shapes the constants depend.
                self._constants = {n: value for n, value in self._constants.items() if n not in numbers}
        self._begin()

    def _add_steps(self, steps: Sequence[BoundStep]) -> None:
        if self._parts and isinstance(self._parts[-1], list):
            self._parts[-1] += steps
        else:
            self._parts.append(list(steps))

    def _segment(self, numbers: Sequence[int], steps: Sequence[BoundStep]) -> Segment:
        reads = [self._steps[n - self._first] for n in numbers if self._listing.steps[n - self._first].kind == "tensor"]
        gone = {i for step in steps for i in step[-1]}
        results = {number: place for number, place in self._places.items() if number not in gone}
        outside = {number: Like.of(self._values[number]) for number in self._outside}
        return Segment(steps, self._draft, outside, results, reads, self._batching)


def _check_result(result: Any) -> None:
    if type(result) is not Tensor or result.dtype is not torch.float32:
        raise NotNativeError(f"gives {getattr(result, 'dtype', type(result).__name__)}")
    if not result.numel():
        raise NotNativeError("gives an empty tensor")
