"""What a conversion tells of itself: how much time is left, and what it has done, in the log."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

import escort
from escort.network import progress
from escort.network.progress import Estimate, Progress
from escort.planner import cores, planner
from tests.network.models import Small, pruned


class Clock:
    """A time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def estimate(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Estimate:
    """Of two networks of ten layers, on two cores."""
    monkeypatch.setattr(cores, "count", lambda: 2)
    estimate = Estimate(clock)
    estimate.expect(2, 10)
    return estimate


KERNEL_S, LAYER_S, WHOLE_S = progress._KERNEL_S / 2, progress._LAYER_S, progress._WHOLE_S


def test_before_anything_is_known_no_time_is_told(clock: Clock) -> None:
    estimate = Estimate(clock)
    clock.now += 5.0
    assert (estimate.remaining_s, estimate.share, estimate.doing) == (None, 0.0, "tracing")


def test_what_is_left_is_counted_by_kind(estimate: Estimate) -> None:
    estimate.begin(10)
    assert estimate.remaining_s == pytest.approx(20 * LAYER_S + WHOLE_S)
    estimate.kernels(0, 30)  # the other network is taken to need 30 as well
    assert estimate.remaining_s == pytest.approx(60 * KERNEL_S + 20 * LAYER_S + WHOLE_S)
    assert estimate.doing == "planning, 30 kernels to prepare"


def test_what_was_seen_counts_more_than_what_was_assumed(estimate: Estimate, clock: Clock) -> None:
    estimate.begin(10)
    estimate.kernels(0, 30)
    clock.now += 30.0
    for done in (10, 25, 30):
        estimate.kernels(done, 30)
    each_s = (KERNEL_S + 30.0) / 31
    assert estimate.remaining_s == pytest.approx(30 * each_s + 20 * LAYER_S + WHOLE_S)
    assert estimate.doing == "planning, 10 layers to time"
    for _ in range(10):
        clock.now += 2.0
        estimate.layer()
    layer_s = (LAYER_S + 20.0) / 11
    assert estimate.remaining_s == pytest.approx(30 * each_s + 10 * layer_s + WHOLE_S)
    estimate.begin(10)
    estimate.kernels(0, 3)  # far fewer than expected: what is left shrinks
    assert estimate.remaining_s == pytest.approx(3 * each_s + 10 * layer_s + WHOLE_S)
    estimate.compare()
    assert estimate.remaining_s == pytest.approx(WHOLE_S) and estimate.doing == "comparing networks"


def test_a_rival_that_compiles_is_part_of_what_is_left(estimate: Estimate, clock: Clock) -> None:
    estimate.expect(1, 10, rival=True)
    estimate.begin(10)
    assert estimate.remaining_s == pytest.approx(10 * LAYER_S + WHOLE_S + progress._RIVAL_S)
    estimate.compare()
    clock.now += 2.0
    estimate.compare_with_rival()
    assert estimate.remaining_s == pytest.approx(progress._RIVAL_S)
    assert estimate.doing == "comparing with torch.compile"


def test_time_passes_between_events_too(estimate: Estimate, clock: Clock) -> None:
    estimate.begin(10)
    before = estimate.remaining_s
    clock.now += LAYER_S / 2
    assert before is not None and estimate.remaining_s == pytest.approx(before - LAYER_S / 2)
    assert estimate.elapsed_s == pytest.approx(LAYER_S / 2)


def test_what_is_late_is_neither_done_nor_free(estimate: Estimate, clock: Clock) -> None:
    estimate.begin(10)
    estimate.compare()
    shares = []
    for _ in range(100):
        clock.now += 1.0
        shares.append(estimate.share)
    assert estimate.remaining_s == pytest.approx(50.0)
    assert shares == sorted(shares) and 0.5 < shares[-1] < 0.95


def test_the_share_never_falls(estimate: Estimate, clock: Clock) -> None:
    estimate.begin(10)
    clock.now += 4.0
    before = estimate.share
    estimate.kernels(0, 10_000)
    assert before > 0.2 and estimate.share == before


def whole_conversion(estimate: Estimate, clock: Clock) -> Iterator[None]:
    """Twice 40 kernels of 1 s and 10 layers of 0.5 s, then 4 s for the whole."""
    for _ in range(2):
        estimate.begin(10)
        for done in range(41):
            clock.now += 1.0 * (done > 0)
            estimate.kernels(done, 40)
            yield
        for _ in range(10):
            clock.now += 0.5
            estimate.layer()
            yield
    estimate.compare()
    clock.now += 3.9
    yield


def test_from_a_tenth_on_the_estimate_is_within_a_fifth(estimate: Estimate, clock: Clock) -> None:
    for _ in whole_conversion(estimate, clock):
        left_s = 100.0 + 2 * 40 + 2 * 5 + 4 - clock.now
        if estimate.elapsed_s > 9.0 and left_s > 5.0:
            assert estimate.remaining_s == pytest.approx(left_s, rel=0.2)
        assert estimate.share < 1.0
    assert estimate.share > 0.9


def test_the_bar_shows_what_is_done_and_both_times(clock: Clock) -> None:
    reports = Progress()
    reports.estimate = Estimate(clock)
    clock.now += 75.0

    def line() -> str:
        console = Console(file=io.StringIO(), width=120)
        with console.capture() as capture:
            console.print(reports._line())
        return capture.get()

    assert re.search(r"^tracing .*1:15\s*$", line())
    reports.estimate.expect(1, 3)
    reports.estimate.begin(3)
    assert re.search(r"^planning, 3 layers to time .*1:15 about 0:04 left", line())


DONE = [
    *("checked", "run as it is", "traced", "rewritten for contiguous", "planned 2 layers"),
    *("compared with the original", r"chosen the converted network \(.*\)"),
]


@pytest.mark.usefixtures("always_faster")
def test_what_is_done_is_logged_with_its_seconds_and_layers_with_their_choice(caplog: pytest.LogCaptureFixture) -> None:
    planner._remembered.clear()
    with caplog.at_level(logging.DEBUG, "escort"):
        fast = escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8))
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    for message, done in zip(told, DONE, strict=True):
        assert re.fullmatch(rf"{done} in \d+\.\d\d s", message)
    layers = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    for name, plan in fast.plan.layers.items():
        line = next(line for line in layers if line.startswith(f"layer {name}: {plan.method} "))
        assert f"{plan.time_us:.1f} us, dense" in line and f"of {len(plan.candidates)} candidates timed" in line
    caplog.clear()
    with caplog.at_level(logging.INFO, "escort"):
        escort.replan(fast)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [message.partition(" in ")[0] for message in told] == [*("planned 2 layers", "timed as a whole")]


def test_nothing_is_printed_unless_it_is_asked_for() -> None:
    code = (
        "import torch, escort; from tests.network.models import *; "
        "escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("escort").handlers)


@pytest.mark.parametrize(("level", "is_drawn"), [(logging.WARNING, True), (logging.INFO, False)])
def test_there_is_no_bar_where_the_log_tells_each_step(
    level: int,
    is_drawn: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    caplog.set_level(level, "escort")
    with Progress().bar(shown=True):
        pass
    assert ("tracing" in capsys.readouterr().err) is is_drawn
