"""What is checked in a child of fork."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable


def in_a_child(check: Callable[[], None]) -> None:
    """Runs a check in a child of this process, and fails where it raises there or takes longer than 20 s."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that other threads may hold locks
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits forever
        code = 1
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
