"""What runs a sparse convolution: the choice of a runner for an input size, and the cache that holds runners."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from escort.cuda.capture import wait_for_gpus
from escort.filter import SparseFilter
from escort.layers.counters import ANOTHER_SIZE, Counters
from escort.methods import Method, Prepared, by_name, for_device
from escort.planner.plan import Plan
from escort.problem import Problem

_log = logging.getLogger(__name__)
#: Seconds that a call may take to compile a kernel for an input size that was not planned.
_PATIENCE_S = 1.0
#: Seconds after which no kernel reads the tables of a runner that nobody calls any more; how many are kept so long
#: before the GPU is waited for instead.
_GRACE_S, _MOST_LEAVING = 10.0, 64

Entry = TypeVar("Entry")


class Leaving:
    """What nobody calls any more, kept for a while: a kernel that was launched on another stream may still read it.

    On CPUs nothing is kept, as a call ends with its work. Where there are too many, the GPUs in use are waited for, and
    the older half goes: a thread that had found one of these before it was taken out has launched it by now. Where
    nothing may wait, since a graph is captured, all stay.
    """

    def __init__(self) -> None:
        self._until: deque[tuple[float, object]] = deque()

    def add(self, entry: object) -> None:
        if torch.cuda.is_initialized():
            self._until.append((time.monotonic() + _GRACE_S, entry))
            if len(self._until) > _MOST_LEAVING:
                self._wait()

    def let_go(self) -> None:
        """Lets go of what has been kept for long enough."""
        if self._until:
            now = time.monotonic()
            with suppress(IndexError):  # other threads may let go of the same meanwhile
                while self._until[0][0] < now:
                    self._until.popleft()

    def _wait(self) -> None:
        """Lets go of the older half once no kernel that was launched before runs any more."""
        older: list[tuple[float, object]] = []
        with suppress(IndexError):  # other threads may let go of the same meanwhile
            for _ in range(len(self._until) // 2):
                older.append(self._until.popleft())
        waited = False
        with suppress(RuntimeError):  # somebody else captures a graph
            waited = wait_for_gpus()
        if not waited:
            self._until.extendleft(reversed(older))


class RunnerCache(OrderedDict[Hashable, Entry]):
    """Runners by the kind of call that they are for, at most so many: the oldest makes room for another.

    The key of a call holds ``x.shape[1:]``, ``x.dtype``, ``x.device`` and whether there is a residual.

    Args:
        most: how many there are.
        before: the cache whose place it takes. What was kept there is kept here, its runners for a while.
    """

    def __init__(self, most: int, before: RunnerCache[Entry] | None = None) -> None:
        super().__init__()
        self.most = most
        self._kept: dict[int, Entry] = {} if before is None else before._kept
        self._leaving = Leaving()
        if before is not None:
            self._leaving, before._leaving = before._leaving, self._leaving
            self._leaving.let_go()
            self._leaving.add(before)  # as a whole: another thread may be adding to it

    def add(self, key: Hashable, entry: Entry) -> None:
        """Remembers an entry. Where another thread was faster, it is kept for a while, as its caller may launch it."""
        known = self.setdefault(key, entry)
        self._leaving.let_go()
        if known is not entry:
            self._leaving.add(entry)
        if len(self) > self.most:
            self._leaving.add(self.popitem(last=False)[1])

    def keep(self, entry: Entry) -> None:
        """Keeps an entry whose tables a CUDA graph reads from now on.

        It lives as long as this cache and those that take its place, or as what :func:`kept_by_graph` gave.
        """
        kept = getattr(_capturing, "kept", None)
        (self._kept if kept is None else kept)[id(entry)] = entry


_capturing = threading.local()


@contextmanager
def kept_by_graph() -> Iterator[dict[int, Any]]:
    """Collects what the calling thread captures meanwhile, for whoever holds the graph to keep alive as long."""
    kept: dict[int, Any] = {}
    _capturing.kept = kept
    try:
        yield kept
    finally:
        del _capturing.kept


@dataclass(frozen=True)
class Choice:
    """What a plan chose, and the problem that it was chosen for.

    Attributes:
        method: name of the method.
        config: its Config as JSON values.
    """

    problem: Problem
    method: str
    config: dict[str, Any]

    @classmethod
    def of(cls, plan: Plan) -> Choice:
        return cls(plan.problem, plan.method, plan.config)

    def to_json(self) -> str:
        """The choice as a text, the same for the same choice; :meth:`from_json` reads it back."""
        fields = {"problem": self.problem.to_json(), "method": self.method, "config": self.config}
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Choice:
        fields = json.loads(text)
        return cls(**{**fields, "problem": Problem.from_json(fields["problem"])})


def check_not_capturing(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph is captured on that device: what follows allocates and waits."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph cannot be captured from the first call on this input size; call it once"
                )


def prepare(
    problem: Problem,
    sparse_filter: SparseFilter,
    bias: torch.Tensor | None,
    choice: Choice,
    name: str = "a convolution",
    counters: Counters | None = None,
    slope: torch.Tensor | None = None,
) -> Prepared:
    """The chosen method and config, complete on its device when this returns: any stream may call it.

    An input size that the config does not fit runs by the method's own first choice for it, and what takes a method
    long to try in a first call is tried for the planned size alone. A size that the method
    refuses runs by the first other method that takes it. A size that was not planned, and that takes long to compile
    for or cannot be compiled for here, runs by another method as well, with a warning: a call must not take minutes.

    Args:
        problem: what to run; its batch and input size need not be those of the choice.
        bias: (K,) on any device, or None.
        name: what the warning and the log call the layer.
        counters: of the layer; they count what does not go as planned.
        slope: (K,) on any device, where the activation is "prelu".

    Raises:
        ValueError: where no method takes the problem.
        ImportError: where the planned size needs a kernel that is not compiled yet, and there is no compiler.
    """
    counters = counters or Counters()
    if problem.device_type == "cpu":
        return _prepare(problem, sparse_filter, bias, slope, choice, name, counters)
    bias, slope = (None if tensor is None else tensor.cpu() for tensor in (bias, slope))

    def on_device() -> Prepared:
        with torch.cuda.device(problem.device):
            prepared = _prepare(problem, sparse_filter, bias, slope, choice, name, counters)
            torch.cuda.current_stream().synchronize()
            return prepared

    # On a thread of its own: torch.compile(mode="reduce-overhead") lends the calling thread a pool of memory that
    # nothing may keep.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_device).result()


def _prepare(
    problem: Problem,
    sparse_filter: SparseFilter,
    bias: torch.Tensor | None,
    slope: torch.Tensor | None,
    choice: Choice,
    name: str,
    counters: Counters,
) -> Prepared:
    """What :func:`prepare` returns, made on the calling thread."""
    chosen = by_name(choice.method, problem.device)
    others = [method for method in for_device(problem.device) if method is not chosen]
    others.sort(key=lambda method: method.compiles_per_filter)  # what takes minutes, last
    # The chosen method is tried by the chosen config and then, as the others are, by its own first one.
    attempts = [(chosen, True), (chosen, False), *((method, False) for method in others)]
    planned, size = ((p.height, p.width) for p in (choice.problem, problem))
    if planned != size:
        counters.count(ANOTHER_SIZE)
        _log.info("layer %s, planned for inputs of %s, is laid out for those of %s", name, planned, size)
    hindrance = None  # to compiling the chosen kernel for a size that was not planned
    if planned != size and _compile_s(chosen, problem, sparse_filter, choice) > _PATIENCE_S:
        hindrance = f"compiling a {chosen.name} kernel for that size takes long"
        attempts.sort(key=lambda attempt: attempt[0].compiles_per_filter)
    refusal: Exception | None = None
    for method, by_choice in attempts:
        try:
            if reason := method.unsupported(problem):
                raise ValueError(reason)
            config = method.config_type(**choice.config) if by_choice else method.configs(problem, sparse_filter)[0]
            if planned != size or not by_choice:
                config = method.without_trying(config)
            prepared = method.prepare(problem, sparse_filter, bias, config, slope)
        except ImportError as error:
            if planned == size:
                raise
            refusal, hindrance = refusal or error, hindrance or str(error)
            continue
        except ValueError as error:
            refusal = refusal or error
            continue
        if not (method is chosen and by_choice):
            runs_by = f"its first config of {method.name}" if method is chosen else method.name
            reason = str(refusal or hindrance)
            counters.count(f"run by {runs_by}: {reason}")
            _log.warning("layer %s, on inputs of %s, is run by %s instead of its plan: %s", name, size, runs_by, reason)
        if hindrance and method is not chosen:
            warnings.warn(
                f"layer {name}, {problem.in_channels} to {problem.out_channels} channels, was planned for inputs of "
                f"{planned}; those of {size} run by {method.name}, as {hindrance}: convert the model with such an "
                "example if they matter",
                stacklevel=2,
            )
        return prepared
    assert refusal is not None
    raise refusal


def _compile_s(method: Method, problem: Problem, sparse_filter: SparseFilter, choice: Choice) -> float:
    """About how many seconds of one core it takes until the choice can run; infinite where it does not fit."""
    if not method.compiles_per_filter:
        return 0.0
    try:
        return method.compile_s(problem, sparse_filter, method.config_type(**choice.config))
    except ValueError:
        return math.inf
