"""Each kind of model is converted once, and every test has a copy that was never called."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import pytest
import torch
from torch import nn

from escort.planner import timing
from tests.modes.kinds import Kind


@pytest.fixture(scope="session")
def converted() -> Callable[[Kind], nn.Module]:
    """The converted model of a kind, by our kernel, whatever is faster."""

    @cache
    def of(kind: Kind) -> nn.Module:
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(timing, "race", lambda runs, **_: [2.0] + [1.0] * (len(runs) - 1))
            return kind.convert(kind.original(), kind.example)

    return of


@pytest.fixture(scope="session")
def another_process() -> Iterator[ProcessPoolExecutor]:
    """A process that was started afresh, to which models are pickled."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool
