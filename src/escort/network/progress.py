"""What a conversion is at: what it has done, in the log, and a bar with the time that is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from escort.planner import cores
from escort.report import Console

_log = logging.getLogger(__name__)
#: Seconds that things take until the first of their kind was seen: a kernel on one core, a layer's race, the comparison
#: of the whole networks, and that with torch.compile, which compiles.
_KERNEL_S, _LAYER_S, _WHOLE_S, _RIVAL_S = 1.5, 0.4, 3.0, 25.0
_BAR_WIDTH = 40


@dataclass
class _Work:
    """Things of one kind to do, one after the other as far as the clock is concerned.

    Attributes:
        guess_s: what one takes by assumption, which counts as much as one that was done.
        left: how many are left, of the network that is planned now.
        done: how many are done, in `spent_s` seconds.
    """

    guess_s: float
    left: int = 0
    done: int = 0
    spent_s: float = 0.0

    @property
    def each_s(self) -> float:
        return (self.guess_s + self.spent_s) / (1 + self.done)

    def finish(self, count: int, seconds: float) -> None:
        self.left = max(self.left - count, 0)
        self.done += count
        self.spent_s += seconds


class Estimate:
    """How much longer a conversion takes: what is left of each kind of work, times what one of it took so far.

    Networks are planned one after the other: kernels are compiled, on all cores, and layers timed. Then whole networks
    are compared. How many kernels a network needs is known once it is begun; until then it is taken to need as many as
    those before it. What takes longer than the like of it is taken to need half as long again as it already has.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = self._since = clock()
        self._kernels, self._layers = _Work(_KERNEL_S / cores.count()), _Work(_LAYER_S)
        self._whole, self._rival = _Work(_WHOLE_S), _Work(_RIVAL_S)
        self._current: _Work | None = None
        self._networks, self._of_network = 0, 0  # those not begun, and the layers of each
        self._planned, self._wanted = 0, 0  # of networks that were begun: the layers, and the kernels for them
        self._most = 0.0

    def expect(self, networks: int, layers: int, *, whole: bool = True, rival: bool = False) -> None:
        """What there is to do: so many networks of so many layers each.

        Args:
            whole: whether whole networks are timed.
            rival: whether torch.compile of the dense model is.
        """
        self._networks, self._of_network = networks, layers
        self._whole.left, self._rival.left = int(whole), int(rival)

    def begin(self, layers: int) -> None:
        """The next network is planned, of so many layers."""
        self._networks = max(self._networks - 1, 0)
        self._of_network = self._layers.left = layers
        self._planned += layers
        self._turn_to(self._layers)

    def kernels(self, done: int, total: int) -> None:
        """So many of the kernels that are compiled for a network are done; the first call says 0."""
        if done == 0:
            self._wanted += total
            self._kernels.left = total
            self._turn_to(self._kernels)
        self._finish(self._kernels, total - done)
        if self._kernels.left == 0:
            self._turn_to(self._layers)

    def layer(self) -> None:
        """A layer is planned."""
        self._finish(self._layers, self._layers.left - 1)

    def compare(self) -> None:
        """All networks are planned, and compared from now on."""
        self._networks = self._layers.left = self._kernels.left = 0
        self._turn_to(self._whole)

    def compare_with_rival(self) -> None:
        """The networks are compared, and torch.compile has its turn from now on."""
        self._whole.left = 0
        self._turn_to(self._rival)

    def _finish(self, work: _Work, left: int) -> None:
        now = self._clock()
        if left < work.left:
            work.finish(work.left - max(left, 0), now - self._since)
            self._since, self._current = now, work

    def _turn_to(self, work: _Work) -> None:
        self._since, self._current = self._clock(), work

    @property
    def doing(self) -> str:
        """What is done now."""
        if self._current is None:
            return "tracing"
        if self._current is self._whole:
            return "comparing networks"
        if self._current is self._rival:
            return "comparing with torch.compile"
        if self._current is self._kernels and self._kernels.left:
            return f"planning, {self._kernels.left} kernels to prepare"
        return f"planning, {self._layers.left} layers to time"

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._begin

    @property
    def remaining_s(self) -> float | None:
        """The seconds that are left; None until it is known what there is to do."""
        if self._current is None:
            return None
        later_layers = self._networks * self._of_network
        later_kernels = later_layers * self._wanted / max(self._planned, 1)
        later_s = later_layers * self._layers.each_s + later_kernels * self._kernels.each_s
        work = self._kernels, self._layers, self._whole, self._rival
        return later_s + sum(each.left * each.each_s for each in work) + self._correction_s(self._current)

    def _correction_s(self, work: _Work) -> float:
        """What the one that is under way takes from the time that is left, or adds where it is late."""
        if work.left == 0:
            return 0.0
        seconds = self._clock() - self._since
        return max(work.each_s - seconds, seconds / 2) - work.each_s

    @property
    def share(self) -> float:
        """The share of the whole time that is over, which never falls, and never is 1 while something is left."""
        remaining_s = self.remaining_s
        if remaining_s is not None:
            self._most = max(self._most, self.elapsed_s / max(self.elapsed_s + remaining_s, 1e-9))
        return self._most


class Progress:
    """What a conversion tells of itself.

    Attributes:
        estimate: what is left to do, which the bar shows.
    """

    def __init__(self) -> None:
        self.estimate = Estimate()
        self._since = time.perf_counter()

    def done(self, what: str) -> None:
        """Logs what has been done, with the seconds since the last time."""
        now = time.perf_counter()
        _log.info("%s in %.2f s", what, now - self._since)
        self._since = now

    @contextmanager
    def bar(self, *, shown: bool) -> Iterator[None]:
        """One bar on stderr for the whole conversion, if it shall be shown and somebody watches.

        Where the log tells each step there is none: its lines would break into the bar.
        """
        console = Console(stderr=True)
        if not shown or not console.is_watched or _log.isEnabledFor(logging.INFO):
            yield
            return
        with Live(get_renderable=self._line, console=console, refresh_per_second=5, transient=True):
            yield

    def _line(self) -> Table:
        estimate = self.estimate
        remaining_s = estimate.remaining_s
        left = "" if remaining_s is None else f"about {_clock(remaining_s)} left"
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(1.0, estimate.share, width=_BAR_WIDTH)
        line.add_row(estimate.doing, bar, _clock(estimate.elapsed_s), left)
        return line


def _clock(seconds: float) -> str:
    """75 as "1:15"."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
