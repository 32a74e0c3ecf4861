"""What is computed from a GPU's numbers."""

import pytest

from escort.cuda.gpu import H200


@pytest.mark.parametrize(("blocks", "most"), [(0, 1), (1, 1), (132, 1), (133, 2), (264, 2), (1000, 8)])
def test_as_many_blocks_fit_as_one_multiprocessor_must_take(blocks: int, most: int) -> None:
    """With each block the GPU keeps 1 KB to itself."""
    of_block = H200.spreading_bytes(blocks) + 1024
    whole = H200.shared_bytes + 1024
    assert most * of_block <= whole < (most + 1) * of_block


def test_many_blocks_need_no_shared_memory_to_spread() -> None:
    assert H200.spreading_bytes(10**6) == 0
