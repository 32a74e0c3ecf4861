"""Calls that start at the same time, each on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any


def at_once(call: Callable[..., object], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Runs a call for each of the arguments once all threads are there. No thread may raise anything."""
    every = list(arguments)
    start, failures = threading.Barrier(len(every)), list[BaseException]()

    def work(*own: Any) -> None:
        try:
            start.wait()
            call(*own)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=own) for own in every]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures
