"""The only timer, and what a measurement was made on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from escort.methods.direct import ISAS


def median_us(run: Callable[[], object], *, warmup: int = 2, rounds: int = 9, budget_s: float = 1.0) -> float:
    """The median time of a call in microseconds: `rounds` calls after the warm-up, fewer (at least 3) over budget."""
    return race([run], warmup=warmup, rounds=rounds, budget_s=budget_s)[0]


def race(
    runs: Sequence[Callable[[], object]], *, warmup: int = 2, rounds: int = 9, burst: int = 1, budget_s: float = 1.0
) -> list[float]:
    """The median time of each of several calls in microseconds, taken in turn so that a machine's moods hit all alike.

    Args:
        burst: timed calls per turn. Above one, a call that is not timed leads each turn: it brings a contestant's
            weights back into cache and lets the threads of the one before it go to sleep.
        budget_s: seconds after which no further round starts once there were three.
    """
    for run in runs:
        for _ in range(warmup):
            run()
    times: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > budget_s:
            break
        for run, taken in zip(runs, times, strict=True):
            if burst > 1:
                run()
            for _ in range(burst):
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
    return [median(taken) * 1e6 for taken in times]


@dataclass(frozen=True)
class Machine:
    """What a plan or a result was measured on. Plans measured on another machine are measured again."""

    device: str
    isa: str
    threads: int
    torch: str
    escort: str

    @classmethod
    def here(cls) -> Machine:
        return cls(_cpu_name(), next(iter(ISAS)), torch.get_num_threads(), torch.__version__, version("escort-sparse"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Machine:
        """Raises ValueError where the fields are not a machine's."""
        try:
            machine = cls(**data)
        except TypeError as error:
            raise ValueError(f"not a machine: {error}") from error
        kinds = (str, str, int, str, str)
        if not all(isinstance(value, kind) for value, kind in zip(asdict(machine).values(), kinds, strict=True)):
            raise ValueError(f"not a machine: {data}")
        return machine


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
