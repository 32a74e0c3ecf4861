"""What is computed from a GPU's numbers."""

from typing import Any

import pytest
import torch

from escort.cuda.gpu import H200, Gpu
from escort.cuda.kernel import Kernel


@pytest.mark.parametrize(("blocks", "most"), [(0, 1), (1, 1), (132, 1), (133, 2), (264, 2), (1000, 8)])
def test_as_many_blocks_fit_as_one_multiprocessor_must_take(blocks: int, most: int) -> None:
    """With each block the GPU keeps 1 KB to itself."""
    of_block = H200.spreading_bytes(blocks) + 1024
    whole = H200.shared_bytes + 1024
    assert most * of_block <= whole < (most + 1) * of_block


def test_many_blocks_need_no_shared_memory_to_spread() -> None:
    assert H200.spreading_bytes(10**6) == 0


def test_clusters_spread_over_the_multiprocessors_that_they_reach() -> None:
    """Those of four reach 120 of 132, which 124 blocks fill twice."""
    assert H200.spreading_bytes(120, cluster=4) == H200.spreading_bytes(132)
    assert H200.spreading_bytes(124, cluster=4) == H200.spreading_bytes(133)


def test_launches_of_few_blocks_spread_and_others_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, tuple[int, int, int]]] = []

    def bind(self: Kernel, block: int, shared_bytes: int, args: Any, *, overlap: bool) -> Any:
        return lambda grid, x: launched.append((shared_bytes, grid))

    monkeypatch.setattr(Kernel, "bind", bind)
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: H200))
    kernel = object.__new__(Kernel)
    kernel.device = torch.device("cuda")
    launch = kernel.bind_spread(256, 1000, (torch.Tensor,), blocks=100)
    launch((50, 2, 1), None)
    launch((100, 64, 1), None)
    assert launched == [(H200.spreading_bytes(100), (50, 2, 1)), (1000, (100, 64, 1))]
    launched.clear()
    kernel.bind_spread(256, 200_000, (torch.Tensor,), blocks=100)((1, 1, 1), None)
    assert launched == [(200_000, (1, 1, 1))]
