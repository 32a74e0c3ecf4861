"""Max pooling on the CPU is torch's; tests/test_max_pool.py has the GPU's kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from escort.layers import MaxPool2d
from escort.layers.pool import max_pool2d


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_max_pool_is_torchs(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kernel_size = (draw(1, 5), draw(1, 5))
    stride, dilation = ((draw(1, 3), draw(1, 3)) for _ in range(2))
    padding = (draw(0, kernel_size[0] // 2), draw(0, kernel_size[1] // 2))
    pool = nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=data.draw(st.booleans()))
    ours = MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=pool.ceil_mode)
    x = torch.randn(draw(1, 2), draw(1, 3), draw(1, 40), draw(1, 40))
    if data.draw(st.booleans()):
        x.flatten()[draw(0, x.numel() - 1)] = float("nan")
    try:
        expected = pool(x)
    except RuntimeError:
        with pytest.raises(ValueError, match="smaller than the pooling window"):
            ours(x)
        return
    assert torch.equal(ours(x).nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(ours(x[0].double()).nan_to_num(nan=1e9), pool(x[0].double()).nan_to_num(nan=1e9))


def test_pool_takes_single_numbers_and_a_default_stride() -> None:
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(MaxPool2d(2)(x), nn.MaxPool2d(2)(x))


def test_the_operator_passes_torchs_own_checks() -> None:
    x = torch.randn(2, 6, 11, 12)
    torch.library.opcheck(max_pool2d, (x, [3, 3], [2, 2], [1, 1], [1, 1], True))
