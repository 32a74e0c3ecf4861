"""The timer: turns, medians, what happens to a contestant that fails. No speed is asserted here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escort.cuda.capture import runs, turn
from escort.planner import timing
from escort.planner.timing import Timing
from escort.problem import Epilogue, Problem


class Clock:
    """A clock that only work moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now_s)

    def work(self, name: str, seconds: float, disturbed_s: float = 0.0) -> Callable[[], None]:
        """A call that takes longer while it is less than 8 ms since another one's call."""
        begin = -1.0

        def run() -> None:
            nonlocal begin
            if not self.calls or self.calls[-1] != name:
                begin = self.now_s
            self.calls.append(name)
            self.now_s += seconds + (disturbed_s if self.now_s - begin < 0.008 else 0.0)

        return run


def test_race_takes_turns_of_consecutive_calls_that_others_do_not_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    a, b = clock.work("a", 1e-3, 5e-3), clock.work("b", 2e-3, 1e-3)
    seen: list[list[float]] = []
    assert timing.race([a, b], rounds=3, seen=seen.extend) == pytest.approx([1000.0, 2000.0])
    assert [max(seconds) for seconds in seen] == pytest.approx([1e-3, 2e-3])
    turns = [name for name, before in zip(clock.calls, ["", *clock.calls], strict=False) if name != before]
    assert turns == ["a", "b"] * 3
    assert all(len(seconds) == 9 for seconds in seen)


def test_what_is_done_before_each_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times_us = timing.race([clock.work("a", 1e-3)], rounds=2, before=clock.work("before", 5e-3))
    assert times_us == pytest.approx([1000.0]) and clock.calls[::2] == ["before"] * (len(clock.calls) // 2)


def test_only_the_first_of_a_pool_waits_for_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    runs = [clock.work(name, 1e-3) for name in "abc"]
    timing.race(runs, rounds=2, pools=["direct", "direct", "dense"])
    counts = [clock.calls.count(name) for name in "abc"]
    assert counts == [2 * (10 + 3), 2 * (1 + 3), 2 * (10 + 3)]


def test_a_race_ends_when_its_budget_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timing.race([clock.work("a", 1.0)], rounds=9, budget_s=1.0)
    assert len(clock.calls) == 2 * (1 + 3)


def test_a_race_that_narrows_leaves_the_close_ones_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times_s = {"a": 0.010, "b": 0.0116, "c": 0.013, "d": 0.0155}
    runs = [clock.work(name, time_s) for name, time_s in times_s.items()]
    assert timing.race(runs, rounds=7, narrowing=True) == pytest.approx([1e6 * time_s for time_s in times_s.values()])
    assert [clock.calls.count(name) // (1 + 3) for name in times_s] == [7, 7, 4, 2]
    timing.race(runs[::3], rounds=9, narrowing=True)
    assert clock.calls.count("a") == (7 + 2) * (1 + 3)  # alone from then on


class Device:
    """A GPU made of a clock: work takes device time when it runs, and none while it is captured into a graph."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.graph: Graph | None = None
        self.replays: list[Graph] = []
        self.ended: list[Any] = []
        self.restored: list[Any] = []

    def work(self, device_us: float, host_us: float = 0.0) -> Callable[[], None]:
        """A call that takes so long on the device, or on the host that feeds it if that is longer."""

        def run() -> None:
            if self.graph is None:
                self.now_us += max(device_us, host_us)
            else:
                self.graph.recorded_us += device_us

        return run

    def elapsed_us(self, starts: list[Callable[[], object]]) -> list[float]:
        times = []
        for start in starts:
            begin = self.now_us
            start()
            times.append(self.now_us - begin)
        return times


class Graph:
    """What torch.cuda.CUDAGraph does, on the clock."""

    device: Device

    def __init__(self) -> None:
        self.recorded_us = 0.0
        self.failing = False

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert self.device.graph is None
        self.device.graph = self

    def capture_end(self) -> None:
        self.device.graph = None
        if self.failing:
            raise RuntimeError("the capture was invalidated")

    def replay(self) -> None:
        assert self.device.graph is None
        self.device.now_us += self.recorded_us
        self.device.replays.append(self)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(Graph, "device", device, raising=False)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    random = SimpleNamespace(clone_state=lambda: "state", graphsafe_set_state=device.restored.append)
    for name, value in {
        "device": nullcontext,
        "stream": nullcontext,
        "current_stream": lambda: stream,
        "current_device": lambda: 0,
        "graph_pool_handle": object,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "CUDAGraph": Graph,
        "default_generators": (random,),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: device.ended.append(pool), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: None, raising=False)
    monkeypatch.setattr(timing, "_side_stream", lambda index: stream)
    monkeypatch.setattr(timing, "_elapsed_us", device.elapsed_us)
    monkeypatch.setattr(timing, "_WARM_S", 0.0)
    monkeypatch.setattr(timing, "_last_replay_s", {})
    return device


def test_device_times_are_per_call_of_a_replayed_graph(device: Device) -> None:
    timings = timing.race_on_gpu([device.work(5.0), device.work(20.0), device.work(7000.0)], "cuda:0")
    assert timings == [Timing(5.0), Timing(20.0), Timing(7000.0)]
    assert [graph.recorded_us for graph in device.replays[-3:]] == [1000.0, 1000.0, 7000.0]


def test_graphs_take_turns(device: Device) -> None:
    timing.race_on_gpu([device.work(400.0), device.work(600.0)], "cuda:0", rounds=4)
    first, second = device.replays[-2:]
    assert device.replays[-8:] == [first, second] * 4


def test_who_is_beaten_after_some_rounds_is_timed_no_further(device: Device) -> None:
    timings = timing.race_on_gpu([device.work(time_us) for time_us in (500.0, 550.0, 600.0)], "cuda:0", drop=1.15)
    assert timings == [Timing(500.0), Timing(550.0), Timing(600.0)]
    counts = [device.replays.count(graph) for graph in device.replays[-2:]]
    assert counts == [counts[0]] * 2 and len(device.replays[-9 * 2 - 3 :]) - 9 * 2 == 3
    assert len(set(device.replays[-6 * 2 :])) == 2, "two go on"


def test_a_host_that_is_slow_does_not_shorten_the_graph(device: Device) -> None:
    assert timing.race_on_gpu([device.work(5.0, host_us=250.0)], "cuda:0") == [Timing(5.0)]
    assert device.replays[-1].recorded_us == 1000.0


def test_without_capture_the_host_counts(device: Device) -> None:
    timings = timing.race_on_gpu([device.work(5.0, host_us=50.0)], "cuda:0", capture=False)
    assert timings == [Timing(50.0, "events")] and not device.replays


class Host:
    """The clock of a host that launches work on a GPU without waiting for it."""

    def __init__(self) -> None:
        self.now_us = self.done_us = 0.0
        self.calls: list[str] = []

    def work(self, name: str, host_us: float, device_us: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now_us += host_us
            self.done_us = max(self.done_us, self.now_us) + device_us

        return run

    def synchronize(self) -> None:
        self.now_us = max(self.now_us, self.done_us)


@pytest.fixture
def host(device: Device, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(torch.cuda, "synchronize", host.synchronize)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: host.now_us / 1e6))
    return host


def test_calls_that_are_waited_for_take_the_hosts_time_and_the_devices(host: Host) -> None:
    runs = [host.work("a", 50.0, 200.0), host.work("b", 300.0, 20.0)]
    assert timing.race_on_host(runs, "cuda:0", rounds=4) == pytest.approx([250.0, 320.0])
    turn = 1 + timing._BURST  # one that is not timed leads each
    assert host.calls == ["a"] * 6 + ["b"] * 6 + (["a"] * turn + ["b"] * turn) * 4
    host.calls.clear()
    timing.race_on_host([host.work("slow", 9000.0, 0.0)], "cuda:0", rounds=4)
    assert host.calls == ["slow"] * (6 + 4 * 3), "few of slow calls are enough"


def test_pipelined_calls_take_the_longer_of_both(host: Host) -> None:
    runs = [host.work("a", 50.0, 200.0), host.work("b", 300.0, 20.0), host.work("c", 10.0, 9000.0)]
    times_us = timing.race_on_host(runs, "cuda:0", pipelined=True, rounds=3)
    assert times_us == pytest.approx([200.0, 300.0, 9000.0], rel=0.01)
    assert host.calls[-10:] == ["c"] * 10, "a turn is so many calls at least"


def test_all_inputs_are_called_equally_often(device: Device) -> None:
    calls = [0, 0, 0]
    work = device.work(10.0)

    def run(index: int) -> None:
        calls[index] += 1
        work()

    (result,) = timing.race_on_gpu([[lambda i=i: run(i) for i in range(3)]], "cuda:0")
    assert result == Timing(10.0)
    assert calls[0] - 2 == calls[1] == calls[2] > 30  # two to warm up


def test_one_out_of_memory_does_not_end_the_race(device: Device) -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB. GPU 0 has 140 GiB.\nAnd so on.")

    timings = timing.race_on_gpu([device.work(5.0), run, device.work(6.0)], "cuda:0")
    assert timings == [Timing(5.0), Timing(None, reason="out of device memory: Tried to allocate 9 TiB"), Timing(6.0)]


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(device: Device) -> None:
    work = device.work(5.0, host_us=8.0)

    def synchronizes() -> None:
        if device.graph is not None:
            device.graph.failing = True
            raise RuntimeError("operation not permitted when stream is capturing")
        work()

    timings = timing.race_on_gpu([synchronizes, device.work(6.0)], "cuda:0")
    reason = "not captured: operation not permitted when stream is capturing"
    assert timings == [Timing(8.0, "events", reason), Timing(6.0)]
    assert len(device.ended) == 1  # torch's allocator learns that the failed capture is over
    assert device.restored == ["state"]  # and its random numbers leave it


def test_a_lost_device_is_said_to_be_lost(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="lost to this process.*illegal"):
        timing.race_on_gpu([lost], "cuda:0")


def is_free_elsewhere() -> bool:
    """Whether another thread could begin a capture now."""

    def begin() -> bool:
        is_free = turn.acquire(blocking=False)
        if is_free:
            turn.release()
        return is_free

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(begin).result()


def test_a_device_that_is_waited_for_is_in_no_capture(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[bool] = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: free.append(is_free_elsewhere()))
    assert timing.survived(RuntimeError("out of\nluck")) == "out of"
    assert free == [False, False] and is_free_elsewhere()


def test_no_network_is_called_elsewhere_during_a_capture(device: Device) -> None:
    stopped: list[tuple[bool, bool]] = []

    def run() -> None:
        with runs:  # a converted network calls its layers within it
            stopped.append((device.graph is not None, runs._is_stopped))

    (timed,) = timing.race_on_gpu([run], "cuda:0", rounds=1)
    assert timed.timer == "graph" and {True, False} == {captured for captured, _ in stopped}
    assert all(captured is is_stopped for captured, is_stopped in stopped) and not runs._is_stopped


def test_a_budget_leaves_three_rounds(device: Device) -> None:
    timing.race_on_gpu([device.work(1000.0)], "cuda:0", rounds=50, budget_s=0.0)
    assert len([graph for graph in device.replays if graph is device.replays[-1]]) == 2 + 3  # two before the race


def test_clocks_rise_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_WARM_S", 0.02)
    counts = []
    for _ in range(2):
        device.replays.clear()
        timing.race_on_gpu([device.work(1000.0)], "cuda:0", rounds=3)
        counts.append(len(device.replays))
    assert counts[0] > 50 and counts[1] == 2 + 3


def test_nobody_races(device: Device) -> None:
    assert timing.race_on_gpu([], "cuda:0") == []


def test_inputs_have_at_least_one_sample() -> None:
    problem = Problem(0, 3, 8, 8, 4, (3, 3), epilogue=Epilogue(residual=True))
    ((x, residual),) = timing.example_inputs(problem)
    assert x.shape == (1, 3, 8, 8) and residual is not None and residual.shape == (1, 4, 6, 6)
    ((again, _),) = timing.example_inputs(problem)
    assert torch.equal(x, again)


@pytest.mark.parametrize(
    ("size", "free", "sets"),
    [
        (1 << 20, 1 << 40, 120),  # twice the cache
        (50 << 20, 1 << 40, 3),
        (200 << 20, 1 << 40, 1),
        (10 << 20, 240 << 20, 3),  # an eighth of what is free
        (10 << 20, 1 << 20, 1),
        (100, 1 << 40, 1024),
    ],
)
def test_inputs_outgrow_the_cache_but_not_the_memory(
    monkeypatch: pytest.MonkeyPatch, size: int, free: int, sets: int
) -> None:
    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    assert timing._input_count("cuda:0", size) == sets
