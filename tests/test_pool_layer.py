"""Max pooling on the CPU is torch's; tests/test_max_pool.py has the GPU's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from escort.layers import MaxPool2d, pool
from escort.layers.pool import max_pool2d


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_max_pool_is_torchs(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kernel_size = (draw(1, 5), draw(1, 5))
    stride, dilation = ((draw(1, 3), draw(1, 3)) for _ in range(2))
    padding = (draw(0, kernel_size[0] // 2), draw(0, kernel_size[1] // 2))
    torchs = nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=data.draw(st.booleans()))
    ours = MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=torchs.ceil_mode)
    x = torch.randn(draw(1, 2), draw(1, 3), draw(1, 40), draw(1, 40))
    if data.draw(st.booleans()):
        x.flatten()[draw(0, x.numel() - 1)] = float("nan")
    try:
        expected = torchs(x)
    except RuntimeError:
        with pytest.raises(ValueError, match="smaller than the pooling window"):
            ours(x)
        return
    assert torch.equal(ours(x).nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(ours(x[0].double()).nan_to_num(nan=1e9), torchs(x[0].double()).nan_to_num(nan=1e9))


def test_pool_takes_single_numbers_and_a_default_stride() -> None:
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(MaxPool2d(2)(x), nn.MaxPool2d(2)(x))


def test_the_operator_passes_torchs_own_checks() -> None:
    x = torch.randn(2, 6, 11, 12)
    torch.library.opcheck(max_pool2d, (x, [3, 3], [2, 2], [1, 1], [1, 1], True))


def test_a_plain_call_is_no_operator_and_what_observes_operators_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, calls = MaxPool2d(3, 2, 1), torch.randn(2, 3, 9, 9), []
    expected, operator = nn.MaxPool2d(3, 2, 1)(x), pool.max_pool2d

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(pool, "max_pool2d", counted)
    assert torch.equal(layer(x), expected) and torch.equal(layer(nn.Parameter(x, requires_grad=False)), expected)
    assert not calls
    assert torch.equal(torch.vmap(layer)(x[None])[0], expected) and len(calls) == 1
    assert torch.equal(make_fx(layer)(x)(x), expected) and len(calls) == 2
    with FakeTensorMode():
        assert layer(torch.empty(2, 3, 9, 9)).shape == expected.shape and len(calls) == 3
    with torch.profiler.profile() as profile:
        assert torch.equal(layer(x), expected) and len(calls) == 4
    assert "escort::max_pool2d" in {event.key for event in profile.key_averages()}
    negated = torch.imag(torch.complex(x, x).conj())
    assert torch.equal(layer(negated), nn.MaxPool2d(3, 2, 1)(-x)) and len(calls) == 5


def test_a_kernel_that_cannot_be_had_leaves_pooling_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*args: Any) -> None:
        raise ImportError("max_pool.cu is not compiled for sm_90 yet")

    monkeypatch.setattr(pool, "_pool_launch", missing)
    x, window = torch.randn(2, 3, 9, 9), ((3, 3), (2, 2), (1, 1), (1, 1))
    run = pool._pooling.__wrapped__(x.shape, x.dtype, torch.device("cuda:0"), False, window, False)
    assert torch.equal(run(x), nn.MaxPool2d(3, 2, 1)(x))
    assert "max pooling of (2, 3, 9, 9) on cuda:0 is run by torch: max_pool.cu" in caplog.text


def test_kernels_may_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = ["no compiler", None, "asked once too often"]
    monkeypatch.setattr(pool, "_served", set())
    monkeypatch.setattr("escort.cuda.kernel.unavailable", lambda device: reasons.pop(0))
    device = torch.device("cuda:0")
    assert [pool.pools(device, torch.float32) for _ in range(3)] == [False, True, True]
