"""Counts of what a layer did besides its plan: a call that goes as planned costs nothing here."""

from __future__ import annotations

import threading

#: A runner was made for an input size that was not planned.
ANOTHER_SIZE = "laid out for another input size"
#: A call came from what observes operators, by which it was run.
BY_OPERATOR = "called as an operator of torch"
#: A residual of another shape than the result was added by torch, behind the convolution.
BROADCAST = "residual broadcast behind the convolution"
#: What stands for all reasons beyond the most that are told apart.
OTHERS = "other reasons"

_MOST_REASONS = 64


class Counters:
    """How often what happened. Any thread may count, and of reasons there is a bounded number."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, reason: str) -> None:
        with self._lock:
            if reason not in self._counts and len(self._counts) >= _MOST_REASONS:
                reason = OTHERS
            self._counts[reason] = self._counts.get(reason, 0) + 1

    def __call__(self) -> dict[str, int]:
        """The counts so far, by reason."""
        with self._lock:
            return dict(self._counts)
