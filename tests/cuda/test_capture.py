"""A capture leaves torch and other threads as they were, also where it fails."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escort.cuda import capture
from escort.cuda.capture import Runs, captured


class Graph:
    """torch.cuda.CUDAGraph, of which any part may fail."""

    fails: str | None = None

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def _do(self, what: str) -> None:
        self.log.append(what)
        if self.fails == what:
            raise RuntimeError(f"{what} failed")

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and not gc.isenabled()
        self._do("begin")

    def capture_end(self) -> None:
        self._do("end")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    generator = SimpleNamespace(graphsafe_get_state=lambda: "own state", clone_state=lambda: "lent state")
    generator.graphsafe_set_state = log.append
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(log))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: log.append("give up"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: None, raising=False)
    monkeypatch.setattr(capture, "_never_ended", [])
    return log


def fail() -> None:
    raise ValueError("the calls failed")


@pytest.mark.parametrize(
    ("fails", "calls", "message", "expected"),
    [
        (None, lambda: None, None, "lent state, begin, own state, end"),
        (None, fail, "the calls failed", "lent state, begin, own state, end"),
        ("begin", lambda: None, "begin failed", "lent state, begin, give up, own state"),
        ("end", lambda: None, "end failed", "lent state, begin, own state, end, give up"),
        ("end", fail, "the calls failed", "lent state, begin, own state, end, give up"),
    ],
)
def test_whatever_fails_is_ended(
    monkeypatch: pytest.MonkeyPatch,
    log: list[str],
    fails: str | None,
    calls: Callable[[], None],
    message: str | None,
    expected: str,
) -> None:
    monkeypatch.setattr(Graph, "fails", fails)
    if message is None:
        captured(calls, "pool")
    else:
        with pytest.raises((RuntimeError, ValueError), match=message):
            captured(calls, "pool")
    assert ", ".join(log) == expected
    assert gc.isenabled() and len(capture._never_ended) == ("give up" in expected)


def test_what_draws_has_the_lent_state_to_its_end(log: list[str]) -> None:
    captured(lambda: None, "pool", draws=True)
    assert log == ["lent state", "begin", "end", "own state"]


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
