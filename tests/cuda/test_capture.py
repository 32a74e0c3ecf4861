"""A capture leaves torch and other threads as they were, also where it fails."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escort.cuda import capture, driver
from escort.cuda.capture import Runs


class Device:
    """The driver and torch's allocator, noting what is asked of them. Any call of the driver may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.fails: str | None = None
        self.exec: str | int = "exec"
        modes = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread", CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
        flags = SimpleNamespace(CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH=1)
        api = SimpleNamespace(
            CUstreamCaptureMode=modes, CUgraphInstantiate_flags=flags, cuGraphLaunch=lambda *args: (self.launch(*args),)
        )
        monkeypatch.setattr(driver, "api", lambda: api)
        monkeypatch.setattr(driver, "call", self.call)
        monkeypatch.setattr(driver, "DriverError", RuntimeError)
        monkeypatch.setattr(driver, "device", lambda index: SimpleNamespace(current=nullcontext))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        for name, noted in {
            "_cuda_beginAllocateCurrentStreamToPool": "take",
            "_cuda_endAllocateToPool": "end",
            "_cuda_releasePool": "release",
        }.items():
            monkeypatch.setattr(torch._C, name, partial(self.note, noted), raising=False)

    def note(self, what: str, device: int, pool: str) -> None:
        assert (device, pool) == (0, "pool")
        self.log.append(what)

    def call(self, name: str, *args: Any) -> Any:
        self.log.append(name.removeprefix("cu"))
        if name == self.fails:
            raise RuntimeError(f"{name} failed")
        if name == "cuStreamBeginCapture":
            assert args == (7, "thread") and not gc.isenabled()
        return {"cuStreamEndCapture": "graph", "cuGraphInstantiate": self.exec}.get(name, args[0])

    def launch(self, graph: str, stream: int) -> int:
        self.log.append(f"{graph} on {stream}")
        return 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


STREAM: Any = SimpleNamespace(cuda_stream=7)


def test_a_graph_is_launched_and_freed(device: Device) -> None:
    graph = capture.Graph(lambda: device.log.append("calls"), STREAM, "pool")
    made = ["take", "StreamBeginCapture", "calls", "StreamEndCapture", "GraphInstantiate", "GraphDestroy", "end"]
    assert device.log == made and gc.isenabled()
    graph.replay(3)
    assert device.log[len(made) :] == ["exec on 3"]
    del graph
    exchange = "ThreadExchangeStreamCaptureMode"
    assert device.log[len(made) + 1 :] == [exchange, "GraphExecDestroy", exchange, "release"]


def test_a_graph_is_launched_with_its_input(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is asked by its functions' addresses, and whatever it refuses is said, with nothing launched."""
    log, refused, captured = list[tuple[Any, ...]](), dict[str, int](), 0

    def noted(name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if name == "cuStreamIsCapturing":
                ctypes.c_int.from_address(args[1]).value = captured
            log.append((name, *args))
            return refused.get(name, 0)

        return call

    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    functions = {
        "cuGraphLaunch": ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer)(noted("cuGraphLaunch")),
        "cuMemcpyDtoDAsync": ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, size, pointer)(
            noted("cuMemcpyDtoDAsync")
        ),
        "cuStreamIsCapturing": ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer)(noted("cuStreamIsCapturing")),
    }
    monkeypatch.setattr(driver, "address", lambda name: ctypes.cast(functions[name], pointer).value)
    device.exec = 11
    graph, x = capture.Graph(lambda: None, STREAM, "pool"), torch.zeros(3)
    launch = graph.with_input(64, 12)
    assert launch(7, x) == 0 and log[0][:2] == ("cuStreamIsCapturing", 7)
    assert log[1:] == [("cuMemcpyDtoDAsync", 64, x.data_ptr(), 12, 7), ("cuGraphLaunch", 11, 7)]
    for name, others in (("cuGraphLaunch", 2), ("cuMemcpyDtoDAsync", 1), ("cuStreamIsCapturing", 0)):
        log.clear()
        refused[name] = 201
        assert launch(7, x) == 201 and len(log) == others + 1
    refused.clear()
    log.clear()
    captured = 1
    assert launch(7, x) == -1 and len(log) == 1


def fail() -> None:
    raise ValueError("the calls failed")


@pytest.mark.parametrize("fails", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", None])
@pytest.mark.parametrize("calls", [lambda: None, fail])
def test_torchs_allocator_goes_on_whatever_fails(device: Device, fails: str | None, calls: Callable[[], None]) -> None:
    device.fails = fails
    failing = fails is not None or calls is fail
    for _ in range(2):
        device.log.clear()
        with pytest.raises((RuntimeError, ValueError)) if failing else nullcontext():
            capture.Graph(calls, STREAM, "pool")
        assert device.log[0] == "take" and device.log.count("end") == device.log.count("release") == 1
        assert gc.isenabled()
        if fails == "cuGraphInstantiate" and calls is not fail:
            assert "GraphDestroy" in device.log


def test_an_error_in_a_line() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB. GPU 0 has 140 GiB.\nAnd so on.")
    assert capture.in_a_line(error) == "out of device memory: Tried to allocate 9 TiB"
    assert capture.in_a_line(RuntimeError("one\ntwo")) == "one" and capture.in_a_line(ValueError()) == "ValueError"


def test_captures_wait_for_runs_and_runs_for_captures() -> None:
    runs, log = Runs(), list[str]()
    begun, end, is_stopped, finish = (threading.Event() for _ in range(4))

    def run() -> None:
        with runs:
            log.append("first run")
            begun.set()
            end.wait()
            with runs:  # of a network within a network
                log.append("inner run")
        is_stopped.wait()
        with runs:
            log.append("second run")

    runner = threading.Thread(target=run)
    runner.start()
    begun.wait()

    def stop() -> None:
        with runs, runs.stopped():  # its own call does not hold it up
            log.append("capture")
            is_stopped.set()
            finish.wait(0.2)
            log.append("captured")

    stopper = threading.Thread(target=stop)
    stopper.start()
    end.set()
    runner.join()
    stopper.join()
    assert log == ["first run", "inner run", "capture", "captured", "second run"]


def test_an_interrupt_while_runs_wait_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, interrupts = Runs(), list[BaseException]()

    def interrupted() -> None:
        raise KeyboardInterrupt

    def enter() -> None:
        try:
            runs.__enter__()
        except KeyboardInterrupt as error:
            interrupts.append(error)

    def enter_in_a_thread() -> None:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    monkeypatch.setattr(runs._changed, "wait", interrupted)
    enter_in_a_thread()
    with pytest.raises(KeyboardInterrupt), runs.stopped():  # it waits for the other thread's call
        pass
    enter_in_a_thread()
    assert not interrupts and runs._count == 2  # nothing is stopped any more
    runs._count = 0
    with runs.stopped():
        enter_in_a_thread()
    assert len(interrupts) == 1 and runs._count == 0


def test_an_interrupt_at_the_end_of_entering_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()

    class Interrupted(threading.Condition):
        is_due = True

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            if self.is_due:
                Interrupted.is_due = False
                raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_changed", Interrupted())
    with pytest.raises(KeyboardInterrupt), runs:
        pass
    assert runs._count == runs._own.depth == 0


def test_what_is_captured_may_hold_calls() -> None:
    runs, finished = Runs(), threading.Event()

    def capture() -> None:
        with runs.stopped(), runs:
            pass
        with runs:
            finished.set()

    threading.Thread(target=capture, daemon=True).start()
    assert finished.wait(5.0) and runs._count == 0
