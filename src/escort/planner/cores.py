"""Work for all cores at once: jobs that spend their time outside Python's lock, such as compiling kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager


def count() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def on_all_cores(
    jobs: Sequence[Callable[[], object]], progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Runs jobs side by side. The first error is raised, and what had not begun is not.

    Args:
        progress: is called with how many jobs are done, and of how many.
    """
    if jobs:
        progress(0, len(jobs))
    with threads() as pool:
        for done, future in enumerate(as_completed([pool.submit(job) for job in jobs]), 1):
            future.result()
            progress(done, len(jobs))


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core. At the end, or once an error passes through, what has not begun never will."""
    pool = ThreadPoolExecutor(count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
