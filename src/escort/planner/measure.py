"""From a search to a plan: prepare each candidate, validate it against the reference, time those that are right."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from escort import reference
from escort.cuda.capture import runs
from escort.cuda.compiler import Variant
from escort.cuda.kernel import kernel
from escort.methods import Config, Method, Prepared, dense_for
from escort.planner import cores, timing
from escort.planner.machine import Machine
from escort.planner.plan import Candidate, Layer, Plan, Planned
from escort.planner.search import Search, Tried, not_tried
from escort.planner.timing import Timer
from escort.problem import Problem

#: A candidate whose first runs take this many times as long as the fastest one's is not timed further.
_HOPELESS = 1.6
#: A candidate that takes so many times the fastest's time after some rounds on a GPU, whose times repeat, has lost.
_BEATEN = 1.15
#: What takes long to try is tried where the same without that takes up to so many times the fastest's time, and chosen
#: where it then takes less than this share of it: each process that loads the network tries it again.
_NEARLY, _WORTH_TRYING = 1.3, 0.97
#: How many times the least of a candidate's times their median may be: beyond that, something else ran meanwhile.
_SCATTER = 2.0
#: The share of a CPU's time that others may take while a layer is measured. Where threads wait for cores that others
#: have, each call of a method may take a slice of the scheduler longer, as steadily as if that were its time.
_BUSY = cores.BUSY
#: Microseconds that a network on a CPU takes longer for a layer that no native program calls, besides the layer's own
#: time: Python calls it, and hands over to the native steps behind it (docs/notes/cpu.md).
_HAND_OVER_US = 10.0
#: Bytes of inputs beyond which caches keep nothing of them from layer to layer on a CPU.
_MOST_REWRITTEN = 32 << 20
#: So many microseconds of a first run on a GPU may be waiting for a busy host, which the replay of a graph does not do.
_HOST_US = 150.0
#: Inputs of a race on a GPU at most: a pass through so many fills a lap. Where more would fit twice the L2 cache, maps
#: are so small that a network finds them in that cache.
_MOST_INPUTS = 256
#: Bytes of a GPU's memory that the candidates of layers to come may take.
_MOST_AHEAD_BYTES = 2 << 30
#: Seconds after which only the first config of each method is still tried.
_SEARCH_S = 20.0

#: An input of a layer, and the residual that it takes besides.
_Input = tuple[torch.Tensor, torch.Tensor | None]


class Allowance:
    """What candidates that are prepared ahead may take of a device's memory, all layers together.

    On a GPU it is what torch allocates there from now on, whoever asks for it.
    """

    def __init__(self, device: str) -> None:
        self._device, self._end = device, math.inf
        if device != "cpu":
            self._end = torch.cuda.memory_allocated(device) + _MOST_AHEAD_BYTES

    @property
    def is_left(self) -> bool:
        """Whether another candidate may stay; on a CPU, where only what compiles is prepared ahead, any may."""
        return math.isinf(self._end) or torch.cuda.memory_allocated(self._device) < self._end


class LateError(RuntimeError):
    """There is no time left to compile a candidate for the layer's filter."""


class Ahead(dict[tuple[str, Config], Prepared]):
    """A layer's candidates that were prepared before it is measured, by method and config. Taking one removes it.

    Once the allowance is used up, what is prepared is let go of at once: its kernel is compiled, which takes long. Once
    the time for compiling for filters is over, nothing more is compiled for this one, and `was_late` says so.
    """

    def __init__(self, allowance: Allowance | None = None, limit: cores.Limit | None = None) -> None:
        super().__init__()
        self._allowance, self._limit = allowance, limit
        self._begun: set[tuple[str, Config]] = set()
        self.was_late = False

    def afresh(self) -> Ahead:
        """The same with nothing prepared, for a layer that is searched after all."""
        return Ahead(limit=self._limit)

    def prepare(self, layer: Layer, method: Method, config: Config) -> None:
        if (method.name, config) in self or self._is_late(method, config):
            return
        self._begun.add((method.name, config))
        if method.compiles_per_filter and self._limit is not None:
            self._limit.begin()
        with suppress(ImportError, RuntimeError, ValueError):  # what fails will say so when it is tried
            prepared = _prepared(layer, method, config)
            if self._allowance is None or self._allowance.is_left:
                self[method.name, config] = prepared

    def take(self, layer: Layer, method: Method, config: Config) -> Prepared:
        """The candidate, prepared now if it was not before.

        Raises what :meth:`Method.prepare` raises, and LateError where no time is left to compile it.
        """
        if self._is_late(method, config):
            self.was_late = True
            raise LateError("the time for compiling was over before its turn; pass more seconds as effort")
        return self.pop((method.name, config), None) or _prepared(layer, method, config)

    def _is_late(self, method: Method, config: Config) -> bool:
        if self._limit is None or not method.compiles_per_filter or (method.name, config) in self._begun:
            return False
        return self._limit.is_over


def kernels_of(layer: Layer, method: Method, config: Config) -> Sequence[Variant]:
    """The kernels that a candidate is prepared of; none where it cannot be, as it will say itself."""
    try:
        return method.kernels(layer.problem, config)
    except (ImportError, RuntimeError, ValueError):
        return ()


def compile_kernel(layer: Layer, variant: Variant) -> None:
    """Compiles a kernel and loads it on the layer's GPU, where a candidate will find it. A failure shows there."""
    with suppress(ImportError, RuntimeError, ValueError):
        kernel(variant.source, variant.defines, torch.device(layer.problem.device), native=variant.native)


def _prepared(layer: Layer, method: Method, config: Config) -> Prepared:
    """A candidate of which a converted layer may be made: outside of that, tensors of inference mode are refused."""
    with torch.inference_mode(False):
        return layer.prepare(method, config)


def measure(layer: Layer, search: Search, budget_s: float, ahead: Ahead) -> Planned:
    """The plan of a layer: every candidate with its time or a reason, and the right one that a network runs fastest.

    Args:
        budget_s: seconds after which timing stops, once there were a few rounds per candidate.

    Raises:
        ValueError: where no candidate is left; the message holds each one's reason.
        torch.OutOfMemoryError: where the device cannot even hold the problem's input.
    """
    problem, settled, watch = layer.problem, list(search.refused), cores.Watch()
    with torch.inference_mode():
        inputs = timing.example_inputs(problem, most=_MOST_INPUTS)
        trial = _Trial(layer, inputs[0])
        runnable = _first_runs(layer, search.tried, ahead, trial, settled)
        limit_us = _limit_us(problem, runnable)
        calls_s: list[Sequence[float]] = []
        contenders = [first for first in runnable if first.time_us <= limit_us]
        raced = _race(problem, contenders, inputs, budget_s, calls_s.extend)
        late = _first_runs(layer, _worth_trying(search, raced), ahead, trial, settled)
        if late:
            fastest = min(zip(raced, contenders, strict=True), key=lambda pair: pair[0].time_us or math.inf)[1]
            raced += _race(problem, [fastest, *late], inputs, budget_s, calls_s.extend)[1:]
        settled += raced
    timer: Timer = "calls" if problem.device_type == "cpu" else "events"
    hopeless = [first for first in runnable if first.time_us > limit_us]
    settled += [replace(first.candidate, time_us=first.time_us, timer=timer) for first in hopeless]
    timed = [candidate for candidate in settled if candidate.time_us is not None]
    if not timed:
        reasons = "; ".join(f"{c.method}: {c.reason}" for c in settled)
        raise ValueError(f"no method can run {problem}, leave it out with skip: {reasons}")
    runnable += late
    best = _best(timed, runnable)
    assert best.config is not None
    choice = best.method, best.config
    prepared = next(run.prepared for run in runnable if run.choice == choice)
    is_busy = problem.device_type == "cpu" and watch.others_share() > _BUSY
    is_steady = not is_busy and not any(
        median(seconds) > _SCATTER * min(seconds)
        for candidate, seconds in zip(raced, calls_s, strict=False)  # on a GPU, whose own time is taken, none was seen
        if candidate is best or candidate.method == dense_for(problem.device).name
    )
    machine = Machine.here(problem.device)
    plan = Plan(problem, best.method, best.config, tuple(settled), machine, is_steady=is_steady)
    return Planned(plan, prepared)


def check(layer: Layer, plan: Plan, method: Method, ahead: Ahead) -> Planned | None:
    """The plan of an equal layer as this one's: its choice is prepared and validated on this filter, and not timed.

    Args:
        method: the plan's.

    Returns:
        The plan with the error of the choice here, and the choice as prepared; None where it cannot be prepared, or
        computes wrong.
    """
    config = method.config_type(**plan.config)
    try:
        with torch.inference_mode():
            trial = _Trial(layer, timing.example_inputs(layer.problem, most=1)[0])
            prepared = ahead.take(layer, method, config)
            with runs:
                error = trial.error(prepared)
    except (ImportError, RuntimeError, ValueError) as failure:
        if layer.problem.device_type == "cuda":
            timing.survived(failure)
        return None
    if not error <= trial.bound:
        return None
    candidates = [
        replace(_with_notes(candidate, prepared), rel_error=error)
        if (candidate.method, candidate.config) == (plan.method, plan.config)
        else candidate
        for candidate in plan.candidates
    ]
    times_from = "equal layer" if plan.times_from == "measured" else plan.times_from
    plan = replace(plan, problem=layer.problem, candidates=tuple(candidates), times_from=times_from)
    return Planned(plan, prepared)


@dataclass(frozen=True)
class _FirstRun:
    """A candidate that ran and is right.

    Attributes:
        time_us: a rough time of a call in microseconds.
        tries: whether its first call took long to try something.
    """

    candidate: Candidate
    prepared: Prepared
    time_us: float
    tries: bool = False

    @property
    def choice(self) -> tuple[str, dict[str, Any] | None]:
        return self.candidate.method, self.candidate.config


class _Trial:
    """A layer's example, and what its output must be on the first and the last sample.

    The last one is checked because tables that depend on the batch go wrong at its end.
    """

    def __init__(self, layer: Layer, example: _Input) -> None:
        self.problem, self.example = layer.problem, example
        x, residual = example
        self.samples = sorted({0, len(x) - 1})
        some_residual = None if residual is None else residual[self.samples]
        weight = layer.sparse_filter.to_dense()
        self.expected = reference.conv2d(layer.problem, x[self.samples], weight, layer.bias, some_residual, layer.slope)
        self.bound = reference.ERROR_BOUND[layer.problem.precision]

    def error(self, run: Prepared) -> float:
        """The relative error of a call; not finite where the output is not."""
        return reference.compare(run(*self.example)[self.samples], self.expected)

    def glance_us(self, run: Prepared) -> float:
        """A rough time of a call that ran before."""
        return timing.glance_us(partial(run, *self.example), self.problem.device)


def _first_runs(layer: Layer, tried: Tried, ahead: Ahead, trial: _Trial, settled: list[Candidate]) -> list[_FirstRun]:
    """The candidates that ran once and are right. What became of the others goes to `settled`."""
    runnable, searched_s = list[_FirstRun](), 0.0
    for method, configs in tried:
        with _preparing(layer, method, configs, ahead) as prepare_each:
            for index, (config, prepare) in enumerate(zip(configs, prepare_each, strict=True)):
                # What is compiled for the filter is tried however long that took: it has a budget of its own.
                if index and searched_s > _SEARCH_S and not method.compiles_per_filter:
                    settled.append(not_tried(method, len(configs) - index))
                    break
                outcome, seconds = _first_run(method, config, prepare, trial)
                searched_s += seconds
                if isinstance(outcome, _FirstRun):
                    runnable.append(outcome)
                else:
                    settled.append(outcome)
    return runnable


def _worth_trying(search: Search, raced: Sequence[Candidate]) -> Tried:
    """What takes long to try of a search, where the same without that is nearly the fastest in a race."""
    times_us = {(c.method, str(c.config)): c.time_us for c in raced if c.time_us is not None}
    most_us = _NEARLY * min(times_us.values(), default=0.0)
    return tuple(
        (method, (config,))
        for method, config, plain in search.late
        if times_us.get((method.name, str(asdict(plain))), math.inf) <= most_us
    )


@contextmanager
def _preparing(
    layer: Layer, method: Method, configs: Sequence[Config], ahead: Ahead
) -> Iterator[Sequence[Callable[[], Prepared]]]:
    """What gives each config its runner, or raises. On a GPU all are prepared at once: each may compile a kernel."""
    jobs = [partial(ahead.take, layer, method, config) for config in configs]
    if layer.problem.device_type == "cpu":
        yield jobs
        return
    with cores.threads() as pool:
        yield [future.result for future in [pool.submit(job) for job in jobs]]


def _first_run(
    method: Method, config: Config, prepare: Callable[[], Prepared], trial: _Trial
) -> tuple[_FirstRun | Candidate, float]:
    """What became of a candidate, and the seconds that trying it took, without compiling for the filter."""
    outcome: _FirstRun | Candidate
    candidate, begin = Candidate(method.name, asdict(config)), time.perf_counter()
    try:
        prepared = prepare()
        if method.compiles_per_filter:
            begin = time.perf_counter()
        candidate = _with_notes(candidate, prepared)
        with runs:  # a first run may empty torch's cache, which torch refuses while a graph is captured
            error = trial.error(prepared)
        candidate = replace(candidate, rel_error=error if math.isfinite(error) else None)
        if error <= trial.bound:
            tries = method.without_trying(config) != config
            outcome = _FirstRun(candidate, prepared, trial.glance_us(prepared), tries)
        else:
            outcome = replace(candidate, reason=f"relative error {error:.1e} exceeds {trial.bound:.0e}")
    except LateError as late:
        outcome = replace(candidate, reason=str(late))
    except (ImportError, RuntimeError, ValueError) as failure:
        if trial.problem.device_type == "cpu":
            raise
        outcome = replace(candidate, reason=timing.survived(failure))
    return outcome, time.perf_counter() - begin


def _with_notes(candidate: Candidate, prepared: Prepared) -> Candidate:
    """A candidate with what preparing it tells of it."""
    if binary := prepared.binary:
        candidate = replace(candidate, compile_s=binary.compile_s, code_bytes=len(binary.cubin))
    return replace(candidate, remainder_share=prepared.notes.get("remainder_share"))


def _best(timed: Sequence[Candidate], runnable: Sequence[_FirstRun]) -> Candidate:
    """The candidate with which a network takes least: one that a native program calls spares it the hand-over.

    What takes long to try has to gain something by it.
    """
    native = [first.choice for first in runnable if first.prepared.op is not None]
    trying = [first.choice for first in runnable if first.tries]

    def in_a_network_us(candidate: Candidate) -> float:
        choice = candidate.method, candidate.config
        time_us = (candidate.time_us or 0.0) / (_WORTH_TRYING if choice in trying else 1.0)
        return time_us + (0.0 if choice in native else _HAND_OVER_US)

    return min(timed, key=in_a_network_us)


def _limit_us(problem: Problem, runnable: Sequence[_FirstRun]) -> float:
    """The rough time beyond which a candidate is hopeless."""
    best_us = min((first.time_us for first in runnable), default=0.0)
    return max(_HOPELESS * best_us, best_us + (_HOST_US if problem.device_type == "cuda" else _HAND_OVER_US))


def rewriting(tensors: Sequence[torch.Tensor]) -> Callable[[], object]:
    """What writes a layer's inputs anew, by all threads, as the layer before it does in a network.

    A thread then finds in its cache what it wrote itself. Who reads much that others wrote takes longer in a network
    than in a loop of its own, where each thread keeps a copy of all that it reads.
    """
    if torch.get_num_threads() == 1 or sum(tensor.nbytes for tensor in tensors) > _MOST_REWRITTEN:
        return lambda: None
    values = [tensor.clone() for tensor in tensors]
    return lambda: [tensor.copy_(value) for tensor, value in zip(tensors, values, strict=True)]


def _race(
    problem: Problem,
    contenders: Sequence[_FirstRun],
    inputs: Sequence[_Input],
    budget_s: float,
    seen: Callable[[Sequence[Sequence[float]]], object],
) -> list[Candidate]:
    """The contenders with their times; on a CPU `seen` is told the seconds of all calls."""
    candidates = [contender.candidate for contender in contenders]
    if problem.device_type == "cpu":
        runs = [partial(contender.prepared.run, *inputs[0]) for contender in contenders]
        pools = [candidate.method for candidate in candidates]
        before = rewriting([tensor for tensor in inputs[0] if tensor is not None])
        times = timing.race(runs, pools=pools, budget_s=budget_s, before=before, seen=seen)
        return [replace(candidate, time_us=time_us) for candidate, time_us in zip(candidates, times, strict=True)]
    rotations = [[partial(contender.prepared.run, *example) for example in inputs] for contender in contenders]
    timings = timing.race_on_gpu(rotations, problem.device, rounds=7, budget_s=budget_s, drop=_BEATEN)
    return [
        replace(candidate, time_us=t.time_us, timer=t.timer, reason=t.reason if t.time_us is None else None)
        for candidate, t in zip(candidates, timings, strict=True)
    ]
