"""Conversions on several threads, and models that others call meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

import escort
from tests.network.models import Small, pruned


def test_threads_convert_while_others_call_models() -> None:
    """torch.fx sees the modules of all threads while it traces one model."""
    x, done, failures = torch.randn(2, 3, 16, 16), threading.Event(), list[BaseException]()
    model, others = pruned(Small()), [pruned(Small()) for _ in range(4)]

    def start(work: Callable[[], object]) -> threading.Thread:
        def noted() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=noted)
        thread.start()
        return thread

    def call() -> None:
        with torch.no_grad():
            expected = model(x)
            while not done.is_set():
                assert torch.equal(model(x), expected)

    caller = start(call)
    converters = [start(lambda other=other: escort.convert(other, x, methods=["direct"])) for other in others]
    for thread in converters:
        thread.join()
    done.set()
    caller.join()
    assert not failures, failures
