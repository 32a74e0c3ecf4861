"""One captured graph: inputs are copied to where it reads them, it is replayed, and its outputs are copied out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from escort.layers.runners import kept_by_graph
from escort.runtime.lanes import Gpu, Lane, spanned_bytes
from escort.runtime.templates import Slot, filled, leaves, mapped

#: How far the outputs of a padded batch may be from those of the batch alone, relatively: libraries may choose other
#: kernels for it, which round otherwise. Products in float32 may be those of TF32.
_SAME, _SAME_IN_16_BITS = 1e-2, 7.5e-2
_PLAIN = (bool, int, float, complex, str, type(None), torch.Size, torch.dtype, torch.device)


class NotCapturedError(RuntimeError):
    """What calls of one kind do cannot be captured, which shows in what they write or return."""


class NotPaddedError(NotCapturedError):
    """Calls on a padded batch do not give what they give on the batch alone."""


@dataclass
class Call:
    """A call of a program: its arguments, and those among them that are tensors.

    Attributes:
        samples: what the tensors' batch is to be padded to; None where it stays.
    """

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    samples: int | None = None
    tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = [x for x in (*self.inputs, *self.named.values()) if isinstance(x, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in the places of these."""
        others = iter(tensors)
        inputs = tuple([next(others) if isinstance(x, Tensor) else x for x in self.inputs])
        return inputs, {name: next(others) if isinstance(x, Tensor) else x for name, x in self.named.items()}


class Captured:
    """The graph of calls of one kind.

    A call of `copy_in`, `replay` and `copy_out` in turn is one of the program. What they use belongs to the lane, whose
    lock is held from the first to the last.

    Attributes:
        lane, pool: what it shares its memory with. It owns none of it: between two calls nothing in it matters.
        used: when it was called last, by a clock of those who hold it.
        driver_bytes: what the driver took for it, as far as that was seen.
        replays: how often it was.
        kept: the runners of layers whose tables it reads.
    """

    def __init__(self, network: nn.Module, call: Call, gpu: Gpu, lane: Lane, pool: Any) -> None:
        """Runs the program twice, once for what libraries do in a first call, and once captured.

        Where batches are padded, it runs twice more before that, to see that what they are padded with does not matter.

        Raises:
            NotCapturedError: where the program writes to its inputs, or its outputs share memory.
            NotPaddedError: where samples mix, or the batch is not the first axis of each output.
            RuntimeError: where something fails in the capture, or there is no memory for it.
        """
        self.lane, self.pool, self.used, self.driver_bytes, self.replays = lane, pool, 0, 0, 0
        self._samples = call.samples
        with torch.inference_mode(False), torch.no_grad():
            inputs = [_like(x, call.samples) for x in call.tensors]
            _fill(inputs, call.tensors)
            self._run(network, call, inputs)
            if call.samples is not None:
                self._check_padding(network, call, inputs)
            del inputs
            made: list[Any] = []

            def calls() -> None:
                inputs = [_like(x, call.samples) for x in call.tensors]
                made.extend((inputs, self._run(network, call, inputs)))

            with kept_by_graph() as self.kept:
                self._graph = gpu.capture(calls, lane, pool)
            self._take(network, gpu, *made)

    def _run(self, network: nn.Module, call: Call, tensors: list[Tensor]) -> Any:
        """What the program makes of these tensors. Raises NotCapturedError where it writes to them."""
        before = [x._version for x in tensors]
        inputs, named = call.with_tensors(tensors)
        output = network(*inputs, **named)
        if [x._version for x in tensors] != before:
            raise NotCapturedError("it writes to its input")
        return output

    def _check_padding(self, network: nn.Module, call: Call, places: list[Tensor]) -> None:
        """Compares what the program makes of a padded batch and of the batch alone, as broadcasting may mix samples.

        Raises:
            NotPaddedError: where they are apart.
        """
        (x,), (place,) = call.tensors, places
        samples = len(place) // 2 + 1  # the fewest that are padded to so many
        if samples >= len(place):
            return  # one sample, or two: none is padded to them
        part = _like(x[:samples], None).copy_(x[:samples])
        _fill(places, [part])
        if place.is_floating_point():
            place[samples:].fill_(1.0)  # what is there must not matter, and a network is warmed up with zeros
        whole, alone = (
            [leaf for leaf in leaves(self._run(network, call, [given])) if isinstance(leaf, Tensor)]
            for given in (place, part)
        )
        for padded, expected in zip(whole, alone, strict=True):
            if not padded.ndim or len(padded) != len(place) or padded[:samples].shape != expected.shape:
                raise NotPaddedError("the batch is not the first axis of what it returns")
            bound = _SAME_IN_16_BITS if 2 in (x.itemsize, expected.itemsize) else _SAME
            if not _is_close(padded[:samples], expected, bound):
                raise NotPaddedError("samples mix where tensors are broadcast")

    def _take(self, network: nn.Module, gpu: Gpu, inputs: list[Tensor], output: Any) -> None:
        """Notes where inputs and outputs lie, and lets go of their memory."""
        own = {_storage(x) for x in (*network.parameters(), *network.buffers()) if x.numel()}
        taken = {_storage(x): "a view of its input" for x in inputs if x.numel()}
        taken |= dict.fromkeys(own, "a tensor that it keeps")
        slots = {id(x): Slot(number) for number, x in enumerate(inputs)}
        outputs: list[Tensor] = []

        def noted(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                if not isinstance(leaf, _PLAIN):
                    raise NotCapturedError(f"it returns a {type(leaf).__name__}")
                return leaf
            if id(leaf) not in slots:
                self._check_output(leaf, inputs, taken)
                slots[id(leaf)] = Slot(len(inputs) + len(outputs))
                outputs.append(leaf)
            return slots[id(leaf)]

        self._template = mapped(output, noted)
        # A batch of another size than the graph's is padded, and a number might be that of the padded one.
        if self._samples is not None and not all(isinstance(leaf, Slot) for leaf in leaves(self._template)):
            raise NotPaddedError("it returns what is no tensor")
        self._inputs_at = [gpu.at(x) for x in inputs]
        self._outputs_at = [gpu.at(x) for x in outputs]
        self._launch: Callable[[int, Tensor], int] | None = None
        if len(inputs) == 1 and self._samples is None and not self.lane.is_shared and _has_no_gaps(inputs[0]):
            self._launch = gpu.launcher(self._graph, self._inputs_at[0])

    def _check_output(self, leaf: Tensor, inputs: list[Tensor], taken: dict[int, str]) -> None:
        """Raises NotCapturedError for an output that a copy could not stand for."""
        if type(leaf) is not Tensor or (inputs and leaf.device != inputs[0].device):
            raise NotCapturedError(f"it returns a {type(leaf).__name__} on {leaf.device}")
        if self._samples is not None and (not leaf.ndim or len(leaf) != self._samples):
            raise NotPaddedError("the batch is not the first axis of what it returns")
        if not leaf.numel():
            return
        if torch._debug_has_internal_overlap(leaf) == 1:
            raise NotCapturedError("elements of what it returns share their memory")
        if (storage := _storage(leaf)) in taken:
            raise NotCapturedError(f"it returns {taken[storage]}")
        taken[storage] = "two views of one tensor"

    @property
    def can_launch(self) -> bool:
        """Whether `launch` is there for its calls: of one tensor without gaps, on a stream that has its lane alone."""
        return self._launch is not None

    def launch(self, x: Tensor, stream: int) -> bool:
        """Copies an input to where the graph reads it, and replays; False, and nothing is done, where that cannot be.

        The input lies as those do that the graph is for. What else holds is for the caller to know.
        """
        return self._launch is not None and not self._launch(stream, x)

    def copy_in(self, tensors: list[Tensor]) -> None:
        """Copies the inputs to where the graph reads them."""
        if self._samples is not None:
            _fill(self._inputs_at, tensors)
            return
        for there, x in zip(self._inputs_at, tensors, strict=True):
            there.copy_(x)

    def replay(self, stream: int) -> None:
        """Launches the graph on a stream, given by its address."""
        self._graph.replay(stream)
        self.replays += 1

    def copy_out(self, tensors: list[Tensor]) -> Any:
        """What the program returns: tensors of the caller's own, and the caller's tensors where it returns these."""
        values = list(tensors)
        for there in self._outputs_at:
            part = there if self._samples is None else there[: len(tensors[0])]
            out = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=part.device)
            values.append(out.copy_(part))
        template = self._template
        return values[template.number] if type(template) is Slot else filled(template, values)


def _fill(places: list[Tensor], tensors: list[Tensor]) -> None:
    """Copies tensors to where there is room for them, and zeros to the samples that they lack."""
    for place, x in zip(places, tensors, strict=True):
        if place.shape == x.shape:
            place.copy_(x)
        else:
            place[: len(x)].copy_(x)
            place[len(x) :].zero_()


def _is_close(a: Tensor, b: Tensor, bound: float) -> bool:
    """Whether tensors are relatively as close as a bound says, infinities aside."""
    a, b = (x.nan_to_num().to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
    return bool((a - b).norm() <= bound * b.norm())


def _has_no_gaps(x: Tensor) -> bool:
    """Whether a tensor has elements, which fill the memory from the first to the last of them."""
    return x.numel() > 0 and spanned_bytes(x) == x.numel() * x.itemsize


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _like(x: Tensor, samples: int | None) -> Tensor:
    """A new tensor for numbers like those of another, with that many samples; their values are to be copied to it."""
    if samples is None:
        if torch._debug_has_internal_overlap(x) == 1:
            raise NotCapturedError("elements of its input share their memory")
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    is_channels_last = x.ndim == 4 and not x.is_contiguous()
    memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty((samples, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format)
