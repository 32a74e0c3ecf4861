"""Freed memory stays with the process, unless it is told otherwise."""

from __future__ import annotations

import resource

import pytest
import torch

from escort.kernels import _cpu
from escort.network import memory


def test_large_blocks_come_back_without_page_faults() -> None:
    if not memory.keep_freed_memory():
        pytest.skip("this C library is not glibc")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            kept = [torch.ones(10_000_000) for _ in range(3)]  # 3 x 40 MB: more than glibc keeps by itself
            del kept
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 5_000  # of 146,000 pages


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.VARIABLE, "0")
    monkeypatch.setattr(_cpu, "keep_freed_memory", lambda most_bytes: pytest.fail("the allocator was changed"))
    assert not memory.keep_freed_memory()
