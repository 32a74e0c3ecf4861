"""The only timer.

On the CPU a time is the median of calls with the threads that torch has, in blocks of consecutive calls that take turns
(:func:`race`).

On a GPU a time is device time: the median over replays of a CUDA graph, divided by the calls in it. A contestant (what
is timed) is captured after warm-up. Its graph is a lap, as many calls as fill a millisecond, so that neither the host
nor the start of the graph counts. The graphs take turns. :func:`example_inputs` makes so many inputs that with their
outputs they are twice the size of the L2 cache. A graph runs through all of them, so that no call reads what the one
before has just read or written. What cannot be captured is timed by calls one after the other, and says so
(:class:`Timing`). What a caller without graphs sees is the host's time (:func:`race_on_host`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import median
from typing import Any, Literal

import torch

from escort.cuda.capture import in_a_line, runs, turn
from escort.problem import Problem

_LAP_US = 1000.0  # device time between two events, which are good for about half a microsecond
_MOST_PASSES = 1024  # of a lap, whatever they take
_WARM_S = 0.05  # of replays before the first that counts, for the clocks to rise
_WARM_FOR_S = 0.5  # that they are taken to stay high behind the last replay
_MOST_INPUTS = 1024  # of one problem
_FIRST_CALLS = 3  # in which a network may record a CUDA graph of its own
_BURST, _BURST_US = 10, 20_000.0  # calls of a turn that are waited for one by one, or as many as take so long
_LEAST_BURST = 2
#: On the CPU: seconds of the calls that lead a turn, where threads of other contestants may spin (OpenMP's do so for 4
#: to 9 ms) and where they do not, and of those that are timed; calls that are timed in a turn, and rounds, at least.
_SPINNING_S, _LEAD_S, _BLOCK_S, _LEAST_CALLS, _LEAST_ROUNDS = 0.010, 0.0005, 0.002, 3, 2
_LEAST_GPU_ROUNDS = 3  # of graphs on a GPU
_PIPELINE_US, _LEAST_PIPELINED = 10_000.0, 10  # time and calls of a turn whose last call alone is waited for

#: How a time was taken: by calls on the CPU, by replays of a CUDA graph, or by calls between CUDA events, whose times
#: include the GPU's waiting for the host.
Timer = Literal["calls", "graph", "events"]
Call = Callable[[], object]
Contestant = Call | Sequence[Call]  # a call, or the same call on each of several inputs


def race(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int = 4,
    pools: Sequence[object] = (),
    budget_s: float = 1.0,
    narrowing: bool = False,
    before: Call = lambda: None,
    seen: Callable[[Sequence[Sequence[float]]], object] = lambda seconds: None,
) -> list[float]:
    """The median time of each of several calls in microseconds, as loops of their own would find it.

    For work on the CPU. The contestants take turns, so that a machine's moods hit all alike. A turn is a block of
    calls, and those that lead it are not timed: they bring its weights and maps back into the caches. Where threads of
    the one before may wait for work by spinning, they go on until those have gone to sleep.

    Args:
        rounds: of one turn each.
        pools: for each contestant what its threads belong to, such as its method; by default one for each. Those of
            one pool lie together in `runs`, as only the first of them waits for other threads.
        budget_s: seconds after which no further round starts once there were two.
        narrowing: whether those that are behind start in no further round: by half of the fastest's time after two
            rounds, by a third after three, and so on. The others get more rounds for it.
        before: is called ahead of each call, and not timed.
        seen: is called with the seconds of all timed calls of each, at the end.
    """
    pools = pools or range(len(runs))
    seconds: list[list[float]] = [[] for _ in runs]
    begin, pool, racing = time.perf_counter(), None, list(range(len(runs)))
    for past_rounds in range(rounds):
        if past_rounds >= _LEAST_ROUNDS:
            if narrowing:
                most_s = (1 + 1 / past_rounds) * min(median(seconds[index]) for index in racing)
                racing = [index for index in racing if median(seconds[index]) <= most_s]
            if (narrowing and len(racing) == 1) or time.perf_counter() - begin > budget_s:
                break
        for index in racing:
            _block(runs[index], 1, _LEAD_S if pools[index] == pool else _SPINNING_S, before)
            seconds[index] += _block(runs[index], _LEAST_CALLS, _BLOCK_S, before)
            pool = pools[index]
    seen(seconds)
    return [median(its_seconds) * 1e6 for its_seconds in seconds]


def _block(run: Call, calls: int, block_s: float, before: Call = lambda: None) -> list[float]:
    """The seconds of each of so many consecutive calls at least, for so long at least."""
    seconds: list[float] = []
    begin = end = time.perf_counter()
    while len(seconds) < calls or end - begin < block_s:
        before()
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        seconds.append(end - start)
    return seconds


def glance_us(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """A rough time of a call that ran before, in microseconds: the least of a few.

    On a GPU it includes waiting for the host.
    """
    if torch.device(device).type != "cpu":
        with torch.cuda.device(device):
            return min(_elapsed_us([run] * 4))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1e6


@dataclass(frozen=True)
class Timing:
    """What became of a contestant.

    Attributes:
        time_us: median time of a call in microseconds; None where it cannot run.
        timer: on a GPU "events" where it was not captured.
        reason: why it cannot run, or why it was not captured although it was to be.
    """

    time_us: float | None
    timer: Timer = "graph"
    reason: str | None = None


def race_on_gpu(
    runs: Sequence[Contestant],
    device: torch.device | str,
    *,
    rounds: int = 9,
    budget_s: float = 1.0,
    capture: bool = True,
    drop: float = math.inf,
) -> list[Timing]:
    """The device time of each of several calls, taken in turn.

    A contestant that runs out of device memory, or that the device refuses, is out with a reason; the others go on.

    Args:
        runs: the contestants. Each is called on `device` and torch's current stream, all calls that it holds in turn.
        rounds: of one turn each.
        budget_s: seconds after which no further round starts once there were three.
        capture: False to time calls as a user without CUDA graphs would see them.
        drop: a contestant that takes so many times the fastest's time after three rounds starts in no further one.

    Raises:
        RuntimeError: where a contestant leaves the device unusable to this process.
    """
    device = torch.device(device)
    laps: list[_Lap | Timing] = []
    with turn, torch.cuda.device(device):
        caller, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(caller)
        with torch.cuda.stream(side):
            # Graphs that never run at the same time can share their memory, as no result outlives its graph.
            pool = torch.cuda.graph_pool_handle()
            for run in runs:
                try:
                    laps.append(_lap([run] if callable(run) else run, pool if capture else None))
                except RuntimeError as error:
                    laps.append(Timing(None, reason=survived(error)))
                if laps[-1].reason:  # a capture that failed may have left the pool unusable
                    pool = torch.cuda.graph_pool_handle()
            times = _take_turns([lap for lap in laps if isinstance(lap, _Lap)], rounds, budget_s, drop)
        caller.wait_stream(side)
    medians = iter(times)
    return [lap if isinstance(lap, Timing) else Timing(next(medians), lap.timer, lap.reason) for lap in laps]


@dataclass
class _Lap:
    """A contestant made ready: `start` launches `calls` calls on the current stream."""

    start: Callable[[], object]
    calls: int
    timer: Timer = "events"
    reason: str | None = None


def race_on_host(
    runs: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    pipelined: bool = False,
    rounds: int = 9,
    budget_s: float = 1.0,
) -> list[float]:
    """The median time of each of several calls by the clock of the host that calls a GPU, in microseconds.

    Each call is waited for, so that its time is what passes until its result is there. Pipelined, calls follow one
    another and only the last is waited for; the time of one is then the host's or the GPU's, whichever is longer.

    Args:
        runs: the contestants, called on torch's current stream of `device`. They take turns of several calls.
        rounds: of one turn each.
        budget_s: seconds after which no further round starts once there were three.
    """

    def in_a_row(run: Callable[[], object], calls: int) -> None:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()

    with turn, torch.cuda.device(device):  # waiting for the device would end the capture of another thread
        counts, longest_us = [], 1.0
        for run in runs:
            in_a_row(run, _FIRST_CALLS)
            start = time.perf_counter()
            in_a_row(run, _FIRST_CALLS)
            call_us = (time.perf_counter() - start) * 1e6 / _FIRST_CALLS
            longest_us = max(longest_us, call_us)
            counts.append(max(_LEAST_PIPELINED, math.ceil(_PIPELINE_US / max(call_us, 1.0))) if pipelined else 1)
        turns = [partial(in_a_row, run, calls) for run, calls in zip(runs, counts, strict=True)]
        burst = min(_BURST, max(_LEAST_BURST, round(_BURST_US / longest_us)))
        times_us = _in_turn(turns, rounds, 1 if pipelined else burst, budget_s)
    return [time_us / calls for time_us, calls in zip(times_us, counts, strict=True)]


def _in_turn(turns: Sequence[Callable[[], object]], rounds: int, burst: int, budget_s: float) -> list[float]:
    """The median time of each of several calls in microseconds, so many at a time; of several, one more leads them."""
    seconds: list[list[float]] = [[] for _ in turns]
    begin = time.perf_counter()
    for past_rounds in range(rounds):
        if past_rounds >= 3 and time.perf_counter() - begin > budget_s:
            break
        for run, its_seconds in zip(turns, seconds, strict=True):
            its_seconds += _block(run, burst + 1, 0.0)[1:] if burst > 1 else _block(run, 1, 0.0)
    return [median(its_seconds) * 1e6 for its_seconds in seconds]


def _lap(runs: Sequence[Callable[[], object]], pool: Any) -> _Lap:
    """Warms up and captures, where `pool` is not None."""

    def calls(passes: int) -> Callable[[], object]:
        def start() -> None:
            for _ in range(passes):
                outputs = [run() for run in runs]  # alive together, so that each call writes to memory of its own
                del outputs

        return start

    for _ in range(2):  # algorithms are chosen, workspaces allocated
        runs[0]()
    reason = None
    if pool is not None:
        try:
            return _captured_lap(calls, len(runs), pool)
        except RuntimeError as error:
            reason = f"not captured: {survived(error)}"
    passes = _passes(1, _elapsed_us([calls(1)])[0])
    return _Lap(calls(passes), passes * len(runs), reason=reason)


def _captured_lap(calls: Callable[[int], Callable[[], object]], inputs: int, pool: Any) -> _Lap:
    """As many passes through all inputs as fill a lap. The start of a short graph takes longer than its passes do."""
    graph, passes = _captured(calls(1), pool), 1
    for _ in range(2):
        graph.replay()
        enough = min(_passes(passes, _elapsed_us([graph.replay])[0]), _MOST_PASSES)
        if enough < 2 * passes:
            break
        graph, passes = _captured(calls(enough), pool), enough
    return _Lap(graph.replay, passes * inputs, "graph")


def _passes(passes: int, elapsed_us: float) -> int:
    """How many passes fill a lap, if `passes` of them took `elapsed_us`."""
    return max(1, math.ceil(passes * _LAP_US / max(elapsed_us, 1.0)))


def _captured(calls: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """The calls as a graph, whose memory comes from the pool. Calls of converted networks wait meanwhile."""
    with runs.stopped():
        return _capture(calls, pool)


def _capture(calls: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    random = torch.cuda.default_generators[torch.cuda.current_device()]
    state = random.clone_state()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        calls()
    except BaseException:
        with suppress(RuntimeError):
            _end(graph, pool)
        random.graphsafe_set_state(state)  # else the generator would refuse every later call
        raise
    _end(graph, pool)
    return graph


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        # Torch leaves its allocator in the capture that failed, which would end the next one too.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise


def _take_turns(laps: Sequence[_Lap], rounds: int, budget_s: float, drop: float) -> list[float]:
    """The median time of a call in each lap, in microseconds."""
    if not laps:
        return []
    begin, device = time.perf_counter(), torch.cuda.current_device()
    warm_s = _WARM_S if begin - _last_replay_s.get(device, -math.inf) > _WARM_FOR_S else 0.0
    while time.perf_counter() - begin < warm_s:
        _elapsed_us([lap.start for lap in laps])
    times_us: list[list[float]] = [[] for _ in laps]
    racing, begin = list(range(len(laps))), time.perf_counter()
    for past_rounds in range(rounds):
        if past_rounds >= _LEAST_GPU_ROUNDS:
            if time.perf_counter() - begin > budget_s:
                break
            medians = [median(times) / lap.calls for lap, times in zip(laps, times_us, strict=True)]
            racing = [index for index in racing if medians[index] <= drop * min(medians)]
        for index, time_us in zip(racing, _elapsed_us([laps[index].start for index in racing]), strict=True):
            times_us[index].append(time_us)
    _last_replay_s[device] = time.perf_counter()
    return [median(times) / lap.calls for lap, times in zip(laps, times_us, strict=True)]


def _elapsed_us(starts: Sequence[Callable[[], object]]) -> list[float]:
    """The device time of each of several launches in a row, in microseconds."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in starts]
    for start, (begin, end) in zip(starts, marks, strict=True):
        begin.record()
        start()
        end.record()
    torch.cuda.current_stream().synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in marks]


#: When each device was last kept busy with laps, by time.perf_counter.
_last_replay_s: dict[int, float] = {}


@lru_cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Graphs are captured on a stream of their own; one per device, as libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def survived(error: Exception) -> str:
    """What failed, in a line, on a device that lives on. Memory that torch keeps unused is given back.

    Raises:
        RuntimeError: where the device is lost to this process.
    """
    with turn:  # a capture of another thread would end by either
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise RuntimeError(f"the device is lost to this process, start another: {error}") from lost
        torch.cuda.empty_cache()
    return in_a_line(error)


def example_inputs(
    problem: Problem, *, seed: int = 0, most: int = _MOST_INPUTS
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Random inputs of a problem, each with a residual where the problem has one, of at least one sample.

    On a GPU there are so many that the L2 cache cannot hold them, but not more than `most`.
    """
    generator = torch.Generator(problem.device).manual_seed(seed)
    shapes = [(max(problem.batch, 1), *shape[1:]) for shape in (problem.input_shape, problem.output_shape)]

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=problem.storage, device=problem.device)
        return values.contiguous(memory_format=problem.torch_memory_format)

    count = 1
    if problem.device_type == "cuda" and most > 1:
        tensors = shapes + shapes[1:] * problem.epilogue.residual
        count = min(_input_count(problem.device, sum(map(math.prod, tensors)) * problem.storage.itemsize), most)
    return [(draw(shapes[0]), draw(shapes[1]) if problem.epilogue.residual else None) for _ in range(count)]


def _input_count(device: str, size: int) -> int:
    """How many inputs of `size` bytes, outputs included, are twice the L2 cache, in an eighth of the free memory."""
    wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    affordable = torch.cuda.mem_get_info(device)[0] // 8
    return min(max(1, min(math.ceil(wanted / size), affordable // size)), _MOST_INPUTS)
