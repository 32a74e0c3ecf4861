"""Programs on CPUs without Python between their steps: which calls run so, and how long a form of them serves.

Whatever is not known to be the same natively runs step by step, as it does elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from escort.layers import SparseConv2d
from escort.layers.counters import Counters
from escort.layers.observed import watched
from escort.layers.runners import RunnerCache
from escort.runtime.loop import BoundStep, run_steps
from escort.runtime.native.batching import Batching
from escort.runtime.native.form import Form, record, unknown
from escort.runtime.native.lowering import settings
from escort.runtime.native.segment import is_plain
from escort.runtime.steps import Listing, Step
from escort.runtime.watch import Watch

_MOST_KINDS, _MOST_WAITING = 64, 1 << 16  # layers keep tables for as many sizes
_SCALARS = frozenset((bool, int, float, str, type(None)))
_is_grad_enabled = torch.is_grad_enabled


class _Made:
    """The forms of a program as it is at present, by kind of call.

    Attributes:
        steps: the program's, as they were bound.
        parameters: what native steps read, and what others may ask gradients of.
    """

    def __init__(self, network: nn.Module, listing: Listing, steps: Sequence[BoundStep]) -> None:
        self.steps = steps
        native = [step for step in listing.steps if step.kind == "layer" and unknown(network, step) is None]
        layers = [network.get_submodule(step.target) for step in native]
        self.parameters = [p for layer in layers if type(layer) is not SparseConv2d for p in layer.parameters()]
        for layer in layers:
            if isinstance(layer, SparseConv2d):
                layer.follow()
        self._watch = Watch(network, dict.fromkeys((network, *_around(network, native), *layers)))
        self._with_settings = [layer for layer in layers if settings(layer)]
        self._settings = [settings(layer) for layer in self._with_settings]
        self._attributes = [vars(layer) for layer in layers]
        self.forms: RunnerCache[Form] = RunnerCache(_MOST_KINDS)

    def holds(self) -> bool:
        """Whether the program is as it was, and its layers run their own code by the same settings."""
        if any(["forward" in attributes for attributes in self._attributes]):
            return False
        return self._watch.holds() and [settings(layer) for layer in self._with_settings] == self._settings


def _around(network: nn.Module, steps: Sequence[Step]) -> Iterator[nn.Module]:
    """What the layers of steps lie in."""
    for step in steps:
        parts = step.target.split(".")
        yield from (network.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))


class Native:
    """The native forms of a program.

    The first call of a kind (the sizes, strides and types of its inputs) makes a form, which serves those after it. A
    program that was changed is noticed in the next call. Where it is changed again and again, more and more calls run
    step by step before there is another form.

    Attributes:
        enabled: whether calls run natively at all.
        batching: how the samples of a batch go through segments.
    """

    def __init__(self, enabled: bool = True, batching: Batching | None = None) -> None:
        self.enabled, self.batching = enabled, batching or Batching()
        self._made: _Made | None = None
        self._wait = self._next_wait = 0  # calls until another form is made
        self._counters = Counters()

    def __reduce__(self) -> Any:
        """For copies and pickle: forms belong to one program."""
        return Native, (self.enabled, self.batching)

    def run(
        self,
        network: nn.Module,
        listing: Listing,
        steps: Sequence[BoundStep],
        values: list[Any],
        unobserved: Callable[[], Sequence[BoundStep]],
    ) -> None:
        """Runs a call that nothing observes: its inputs are in the values, and its results will be.

        Args:
            unobserved: gives the steps as they run one by one.
        """
        reason = self._natively(network, listing, steps, values) if self.enabled else "it is switched off"
        if reason is not None:
            self._counters.count(reason)
            run_steps(unobserved(), values)

    def _natively(
        self, network: nn.Module, listing: Listing, steps: Sequence[BoundStep], values: list[Any]
    ) -> str | None:
        """Runs a call by its form; why there is none, and nothing has been run."""
        kind = _kind(values[: len(listing.inputs)])
        if kind is None:
            return "an input is neither a plain tensor on the CPU nor a number"
        if reason := watched("cpu"):
            return reason
        made = self._made
        if made is not None and not (made.steps is steps and made.holds()):
            made = self._made = None
            self._wait, self._next_wait = self._next_wait, min(max(2 * self._next_wait, 1), _MOST_WAITING)
        if made is None:
            if self._wait:
                self._wait -= 1
                return "the network is changed again and again"
            made = self._made = _Made(network, listing, steps)
        if _is_grad_enabled() and any(parameter.requires_grad for parameter in made.parameters):
            return "a parameter needs a gradient"
        batching = self.batching
        kind = (batching, *kind)
        form = made.forms.get(kind)
        if form is None:
            made.forms.add(kind, record(network, listing, steps, values, batching))
        elif not form.run(values):
            self._counters.count("a tensor was not as in the call before")
        return None

    def stats(self) -> dict[str, Any]:
        """What became of the calls so far.

        Returns:
            "forms": for each kind of call that has one, how many "steps" run natively in how many "segments", as how
            many "instructions", in how many "bytes" of memory for a chunk beside inputs and outputs, in how many
            "chunks" of the batch, and the "reasons" why others do not, by number of the step. "eager": how many calls
            ran step by step, by reason.
        """
        made = self._made
        forms = [] if made is None else [form for form in list(made.forms.values()) if isinstance(form, Form)]
        return {"forms": [form.stats() for form in forms], "eager": self._counters()}


def _kind(inputs: Sequence[Any]) -> tuple[Hashable, ...] | None:
    """What a form is made for; None for calls that have none."""
    parts: list[Any] = []
    for x in inputs:
        if isinstance(x, Tensor):
            if not is_plain(x):
                return None
            parts += x.dtype, x.shape, x.stride()
        elif type(x) in _SCALARS:
            parts += type(x), x
        else:
            return None
    return tuple(parts)
