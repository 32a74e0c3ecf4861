"""What was raced in one test is forgotten in the next."""

from __future__ import annotations

import pytest

from tests.benchmarks.small import QUICK


@pytest.fixture(autouse=True)
def forget() -> None:
    QUICK.raced.clear()
