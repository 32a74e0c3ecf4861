"""Work for all cores at once: jobs that spend their time outside Python's lock, such as compiling kernels."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

#: The share of the cores' time that others may take before times are worth a warning.
BUSY = 0.25
_LEAST_TICKS = 10  # of a core, which is a tenth of a second


def count() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def on_all_cores(
    jobs: Iterable[Callable[[], object]], progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Runs jobs side by side, each from when it is given on. The first error is raised, and what had not begun is not.

    Args:
        progress: is called with how many jobs are done, and of how many.
    """
    with threads() as pool:
        futures = [pool.submit(job) for job in jobs]
        if futures:
            progress(0, len(futures))
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            progress(done, len(futures))


class Limit:
    """So many seconds by the clock for a kind of work, which may be done in several stretches among other work.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._left_s, self._clock = seconds, clock
        self._since: float | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A stretch, in which time passes from when the work begins."""
        try:
            yield
        finally:
            if self._since is not None:
                self._left_s -= self._clock() - self._since
                self._since = None

    def begin(self) -> None:
        """The first of the work in this stretch begins."""
        if self._since is None:
            self._since = self._clock()

    @property
    def is_over(self) -> bool:
        since = self._since
        return (0.0 if since is None else self._clock() - since) >= self._left_s


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core. At the end, or once an error passes through, what has not begun never will."""
    pool = ThreadPoolExecutor(count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def busy_share(seconds: float = 0.2) -> float:
    """The share of the time of this process's cores that others take, while it sleeps; 0 where Linux does not tell."""
    before = _clocks()
    time.sleep(seconds)
    busy, idle = _passed(before)
    return busy / (busy + idle) if busy + idle else 0.0


class Watch:
    """What others make of this process's cores from now on."""

    def __init__(self) -> None:
        self._before, self._own_s = _clocks(), time.process_time()

    def others_share(self) -> float:
        """The share of the cores' time that others took; 0 where Linux does not tell, or too little time has passed."""
        busy, idle = _passed(self._before)
        if busy + idle < _LEAST_TICKS * count():
            return 0.0
        own = (time.process_time() - self._own_s) * os.sysconf("SC_CLK_TCK")
        return max(busy - own, 0.0) / (busy + idle)


def _passed(before: tuple[int, ...]) -> tuple[int, int]:
    """How long the cores have worked and have not since the clocks were so, in ticks."""
    busy, idle = [now - then for now, then in zip(_clocks(), before, strict=True)] or (0, 0)
    return busy, idle


def _clocks() -> tuple[int, ...]:
    """How long the cores of this process have worked and have not, in ticks; empty where Linux does not tell."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return ()
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    # For user, nice, system, idle, iowait, irq, softirq and steal. What guests take is part of user and nice.
    ticks = [[int(word) for word in line.split()[1:9]] for line in lines if line.split(" ")[0] in ours]
    idle = sum(sum(core[3:5]) for core in ticks)
    return sum(map(sum, ticks)) - idle, idle
