"""Sparse methods, forced: what is right is what is looked at, and whatever is faster must not hide it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from escort.planner import search, timing


@contextmanager
def sparse_forced() -> Iterator[None]:
    """Nothing is timed within: whoever comes first in a race loses, and the first config of a method is its only one.

    First is the dense method among ``methods=["direct"]``, and the original among whole networks. So each layer is run
    by the direct method, and the original is kept only where the converted network is wrong.
    """
    with (
        mock.patch.object(timing, "race", lambda runs, **options: _first_loses(runs)),
        mock.patch.object(timing, "glance_us", lambda run, device="cpu": 1.0),
        mock.patch.object(search, "_MOST_CONFIGS", 1),
    ):
        yield


def _first_loses(runs: list[Any]) -> list[float]:
    return [2.0, *[1.0] * (len(runs) - 1)]
