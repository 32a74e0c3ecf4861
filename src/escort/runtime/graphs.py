"""CUDA graphs of a network: which calls replay one, when one is captured, and how long it is kept."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from escort.cuda.capture import in_a_line, runs, turn
from escort.layers.counters import Counters
from escort.layers.observed import watched
from escort.layers.runners import Leaving
from escort.runtime.capture import not_capturable
from escort.runtime.kinds import Kind, is_plain, kind_of, like, settings
from escort.runtime.lanes import Gpu
from escort.runtime.replay import Call, Captured, NotCapturedError, NotPaddedError
from escort.runtime.watch import Watch

#: For which batches there are graphs: for each that comes; for powers of two, to which others are padded; for none.
Policy = Literal["exact", "buckets", "off"]

_log = logging.getLogger(__name__)
_MOST_GRAPHS, _MOST_KINDS = 512, 4096
_MOST_WANTED = 1 << 16
_MEMORY_SHARE = 8  # of the GPU's memory, by default
_MOST_DRIVER_BYTES = 1 << 26  # what a graph may be said to cost besides: others take memory meanwhile
_NO_OUTPUT = object()

Run = Callable[..., Any]


@dataclass
class _Uses:
    """How many calls of a kind came since it was last captured, and how many are wanted for the next time.

    Each time that a graph had to go, or memory was short, twice as many are: what comes and goes would be captured
    again and again. Where a capture fails for good, no number is enough.

    Attributes:
        alone: whether the next graph gets a pool of its own: in a shared one it took more memory than there may be.
    """

    count: int = 0
    wanted: float = 2
    alone: bool = False

    def later(self, *, alone: bool = False) -> _Uses:
        return _Uses(0, min(2 * self.wanted, _MOST_WANTED), self.alone or alone)


@dataclass
class _Bound:
    """The graphs of a program as it is at present, on the GPU where it is.

    Attributes:
        reason: why there are none, as long as the program stays as it is.
        mixing: why batches are not padded.
        captured: the graphs, by kind of call and number of the lane.
        again: those whose calls may be launched before anything else is looked at, by stream and tensor, with the
            settings that they were captured under.
        failed: the kinds that could not be captured, and why.
        spoilt: the pools in which a capture failed.
    """

    watch: Watch
    gpu: Gpu
    reason: str | None
    mixing: str | None
    captured: dict[Kind, Captured] = field(default_factory=dict)
    again: dict[Kind, tuple[Captured, Kind]] = field(default_factory=dict)
    failed: dict[Kind, str] = field(default_factory=dict)
    uses: dict[Kind, _Uses] = field(default_factory=dict)
    spoilt: set[Any] = field(default_factory=set)


class Graphs:
    """The CUDA graphs of a converted network. A call that replays one takes the host microseconds, not milliseconds.

    The second call of a kind (its sizes, types and strides, on a stream) captures, and those after it replay. Whatever
    is not known to be safe runs step by step, and a network that was changed is noticed in the next call. All graphs of
    a stream share their memory, which is as much as the largest of them needs. Where graphs take more than
    `limit_bytes`, those go that were not used for the longest time.

    Attributes:
        policy: "exact", for each size that comes; "buckets", for batches of powers of two, to which others are padded
            with zeros where samples do not mix; "off".
        limit_bytes: the most memory of all graphs; None for an eighth of the GPU's.
    """

    def __init__(
        self, mixing: Callable[[nn.Module], str | None], policy: Policy = "exact", limit_bytes: int | None = None
    ) -> None:
        """`mixing` says why the samples of a network's batch cannot be run apart from each other, if they cannot."""
        self._mixing, self._policy, self.limit_bytes = mixing, policy, limit_bytes
        self._bound: _Bound | None = None
        self._binding = threading.RLock()
        self._leaving = Leaving()
        self._clock = itertools.count(1)
        self._counts: Counter[str] = Counter()
        self._eager = Counters()

    def __reduce__(self) -> Any:
        """For copies and pickle: graphs belong to one network."""
        return Graphs, (self._mixing, self._policy, self.limit_bytes)

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"there is no policy {policy!r}; there are {', '.join(get_args(Policy))}")
        self._policy = policy
        self.clear()

    def clear(self) -> None:
        """Lets go of all graphs, and of what is known of the calls that could not be captured."""
        with self._binding:
            bound, self._bound = self._bound, None
            for graph in [] if bound is None else list(bound.captured.values()):  # another thread may add one
                self._drop(graph)

    def _drop(self, graph: Captured) -> None:
        self._counts["replays"] += graph.replays
        if graph.kept:
            self._leaving.add(graph.kept)

    def stats(self) -> dict[str, Any]:
        """What became of the calls so far.

        Returns:
            "captures", "replays" and "evictions": how many there were. "graphs" and "bytes": how many graphs there are,
            and the memory that they take. "eager": how many calls replayed none, by reason. "failed": why those
            captures failed that did.
        """
        bound = self._bound
        graphs = [] if bound is None else list(bound.captured.values())
        return {
            "captures": self._counts["captures"],
            "replays": self._counts["replays"] + sum(graph.replays for graph in graphs),
            "evictions": self._counts["evictions"],
            "graphs": len(graphs),
            "bytes": _bytes(graphs, bound.gpu.reserved()) if bound is not None and graphs else 0,
            "eager": self._eager(),
            "failed": [] if bound is None else list(dict.fromkeys(bound.failed.values())),
        }

    def call(self, network: nn.Module, run: Run, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The output of a call that nothing traces or transforms, by a graph of the network or by `run`."""
        output = self._again(network, inputs[0]) if len(inputs) == 1 and not named else _NO_OUTPUT
        if output is _NO_OUTPUT:
            output = self._by_graph(network, inputs, named)
        if output is not _NO_OUTPUT:
            return output
        with runs:
            return run(*inputs, **named)

    def capture(self, network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Makes the graph of a call that was made before, even where that failed."""
        if self._bound is not None and not self._bound.watch.holds():
            self.clear()  # what was written before that call, it has laid out anew
        bound = self._bind(network)
        mixing = bound.mixing
        self._by_graph(network, inputs, named, at_once=True)
        if bound.mixing != mixing:
            self._by_graph(network, inputs, named, at_once=True)  # without padding

    def _again(self, network: nn.Module, x: Any) -> Any:
        """What a call gives that is like one before. A GPU that waits for Python does nothing, so it is launched first.

        What else may have changed is looked at while the GPU is at work. Nothing of the caller was written by then: if
        anything has, the output is _NO_OUTPUT, and such calls take the long way until one has replayed there.
        """
        bound = self._bound
        if bound is None or bound.watch.network is not network or type(x) is not torch.Tensor:
            return _NO_OUTPUT
        gpu, is_strided = bound.gpu, x.layout is torch.strided
        stream = gpu.stream()
        known = bound.again.get(like(x, stream)) if is_strided and gpu.is_current() else None
        if known is None:
            return _NO_OUTPUT
        graph, captured_under = known
        with graph.lane.lock:
            if not graph.launch(x, stream):
                return _NO_OUTPUT
            holds = self._unusual(gpu) is None and settings() == captured_under and is_plain(x) and bound.watch.holds()
            if not holds:
                bound.again.clear()
                return _NO_OUTPUT
            graph.used, graph.replays = next(self._clock), graph.replays + 1
            output = graph.copy_out([x])
        self._leaving.let_go()
        return output

    def _by_graph(
        self, network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], *, at_once: bool = False
    ) -> Any:
        """What a graph makes of a call; _NO_OUTPUT where there is none, for a reason that is counted."""
        bound = self._bound
        if bound is None or bound.watch.network is not network:
            bound = self._bind(network)
        reason = bound.reason or self._unusual(bound.gpu)
        if reason is not None:
            return self._left(reason)
        call = Call(inputs, named)
        kind = kind_of(call, bound.gpu.index, pads=self._policy == "buckets" and bound.mixing is None)
        if isinstance(kind, str):
            return self._left(kind)
        kind = (*kind, bound.gpu.lane().number)
        graph = bound.captured.get(kind)
        if graph is not None:
            output = self._replayed(bound, graph, call)
            if graph.can_launch and not call.named and len(call.inputs) == 1:
                alike = like(call.tensors[0], bound.gpu.stream())
                bound.again[alike] = graph, kind[:2]
                if bound.captured.get(kind) is not graph:  # another thread has let it go meanwhile
                    bound.again.pop(alike, None)
            return output
        return self._missed(bound, kind, call, at_once)

    def _left(self, reason: str) -> Any:
        self._leaving.let_go()
        self._eager.count(reason)
        return _NO_OUTPUT

    def _bind(self, network: nn.Module) -> _Bound:
        """Begins anew with a network, as it is now."""
        with self._binding:  # threads that call it for the first time at once share their graphs
            bound = self._bound
            if bound is not None and bound.watch.network is network:
                return bound
            self.clear()
            tensors = itertools.chain(network.parameters(), network.buffers())
            gpu = Gpu(next((tensor.device for tensor in tensors), torch.device("cuda")))
            mixing = self._mixing(network) if self._policy == "buckets" else None
            bound = self._bound = _Bound(Watch(network), gpu, gpu.unusable() or not_capturable(network), mixing)
            return bound

    def _unusual(self, gpu: Gpu) -> str | None:
        """Why calls are not replayed at the moment."""
        if self._policy == "off":
            return "graphs are switched off"
        if not gpu.is_current():
            return "another GPU is the current one"
        if gpu.is_each_threads():
            return "the current stream is another one in each thread"
        if gpu.is_capturing():
            return "the caller captures a graph"
        return watched(gpu.device.type)

    def _replayed(self, bound: _Bound, graph: Captured, call: Call) -> Any:
        self._leaving.let_go()
        graph.used = next(self._clock)
        stream = bound.gpu.stream()
        with graph.lane.lock:
            graph.lane.enter(stream)
            try:
                graph.copy_in(call.tensors)
                graph.replay(stream)
                # This takes as long as many kernels, and the GPU is at work meanwhile. What it reads is kept.
                holds = bound.watch.holds()
                output = graph.copy_out(call.tensors) if holds else None
            finally:
                graph.lane.leave(stream)
        return output if holds else self._changed()

    def _changed(self) -> Any:
        self.clear()
        return self._left("the network was changed since the last call")

    def _missed(self, bound: _Bound, kind: Kind, call: Call, at_once: bool) -> Any:
        """Captures a call, if it is time to."""
        if not bound.watch.holds():
            return self._changed()
        if not at_once:
            if len(bound.uses) > _MOST_KINDS:
                bound.uses.clear()
            uses = bound.uses.setdefault(kind, _Uses())
            uses.count += 1
            if uses.count < uses.wanted:
                return self._left(bound.failed.get(kind, "a size that is new"))
        if not turn.acquire(blocking=at_once):
            return self._left("another capture is under way")
        try:
            graph = bound.captured.get(kind)  # another thread may have been faster
            if graph is not None:
                return self._replayed(bound, graph, call)
            with runs.stopped():
                return self._first(bound, kind, call)
        finally:
            turn.release()

    def _first(self, bound: _Bound, kind: Kind, call: Call) -> Any:
        """The output of a call that is captured. No other thread captures meanwhile."""
        gpu, lane = bound.gpu, bound.gpu.lane()
        pools = [graph.pool for graph in bound.captured.values() if graph.lane is lane]
        uses = bound.uses.setdefault(kind, _Uses())
        pool = None if uses.alone else next((pool for pool in pools if pool not in bound.spoilt), None)
        is_alone, pool = pool is None, gpu.new_pool() if pool is None else pool
        before = gpu.taken()
        try:
            graph = Captured(bound.watch.network, call, gpu, lane, pool)
        except NotPaddedError as error:
            bound.mixing = str(error)
            _log.warning("batches are not padded, each size has a CUDA graph of its own: %s", error)
            return self._left("batches are not padded from now on")
        except NotCapturedError as error:
            return self._failed(bound, kind, call, f"not captured: {error}")
        except RuntimeError as error:
            bound.spoilt.add(pool)
            # There may be more memory another time.
            later = uses.later() if isinstance(error, torch.OutOfMemoryError) else None
            return self._failed(bound, kind, call, f"not captured: {in_a_line(error)}", later=later)
        self._counts["captures"] += 1
        output = self._replayed(bound, graph, call)
        graph.driver_bytes = min(max(gpu.taken() - before, 0), _MOST_DRIVER_BYTES)
        if bound.failed.pop(kind, None) is not None:
            bound.uses[kind] = _Uses(alone=uses.alone)
        is_large = _bytes([graph], gpu.reserved()) > self._limit(gpu)
        if is_large and is_alone:
            self._drop(graph)
            self._counts["evictions"] += 1
            return self._failed(bound, kind, call, "its graph takes more than `graphs.limit_bytes`", output)
        bound.captured[kind] = graph
        self._make_room(bound)
        if is_large:  # the others may be why
            bound.uses.setdefault(kind, _Uses()).alone = True
        return output

    def _failed(
        self,
        bound: _Bound,
        kind: Kind,
        call: Call,
        reason: str,
        output: Any = _NO_OUTPUT,
        *,
        later: _Uses | None = None,
    ) -> Any:
        """Notes why calls of a kind replay nothing: for good, or until there were as many uses as `later` says."""
        if len(bound.failed) > _MOST_KINDS:
            bound.failed.clear()
        bound.failed[kind], bound.uses[kind] = reason, later or _Uses(wanted=math.inf)
        shapes = ", ".join(str(tuple(x.shape)) for x in call.tensors)
        again = f"after {later.wanted:.0f} more calls" if later else "by warmup, or when the network is changed"
        _log.warning("calls of shape %s do not replay a CUDA graph: %s; it is tried again %s", shapes, reason, again)
        return self._left(reason) if output is _NO_OUTPUT else output

    def _make_room(self, bound: _Bound) -> None:
        """Lets go of the graphs that were not used for the longest time, as long as there are too many."""
        captured, sizes = bound.captured, bound.gpu.reserved()
        limit = self._limit(bound.gpu)
        while len(captured) > _MOST_GRAPHS or _bytes(captured.values(), sizes) > limit:
            oldest = min(captured, key=lambda kind: captured[kind].used)
            self._drop(captured.pop(oldest))
            bound.again.clear()
            self._counts["evictions"] += 1
            bound.uses[oldest] = bound.uses.get(oldest, _Uses()).later()

    def _limit(self, gpu: Gpu) -> int:
        return gpu.memory() // _MEMORY_SHARE if self.limit_bytes is None else self.limit_bytes


def _bytes(graphs: Iterable[Captured], sizes: Mapping[Any, int]) -> int:
    """The memory that graphs take: that of their pools, of the sizes given, and what the driver has for each."""
    graphs = list(graphs)
    pools = {graph.pool for graph in graphs}
    return sum(sizes.get(pool, 0) for pool in pools) + sum(graph.driver_bytes for graph in graphs)
