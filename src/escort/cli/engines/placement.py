"""The cores that engines run on: as many as they have threads, of different cores of the processor first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@contextmanager
def placed_on(threads: int | None) -> Iterator[int]:
    """Lets torch have so many threads, on as many cores, here and in the processes that are started meanwhile.

    Args:
        threads: None leaves torch's threads and the cores as they are.

    Yields:
        The number of threads.

    Raises:
        ValueError: where there are fewer cores than threads.
    """
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    if threads is None:
        yield before
        return
    if not 1 <= threads <= len(cores):
        raise ValueError(f"--threads {threads}: this process may use {len(cores)} cores; give 1 to {len(cores)}")
    try:
        os.sched_setaffinity(0, sorted(cores, key=_rank)[:threads])
        torch.set_num_threads(threads)
        yield threads
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)


def _rank(core: int) -> tuple[int, int]:
    """Its place: the first threads of all cores come before the second ones."""
    try:
        siblings = Path(_TOPOLOGY.format(core)).read_text()
    except OSError:
        return 0, core
    return sum(other < core for other in _numbers(siblings)), core


def _numbers(text: str) -> set[int]:
    """ "0-1,4" as {0, 1, 4}."""
    ends = [part.split("-") for part in text.strip().split(",")]
    return {number for first, *last in ends for number in range(int(first), int((last or [first])[0]) + 1)}
