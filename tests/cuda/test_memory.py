"""Memory for results: torch's quick way on the current device, its usual one elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from escort.cuda import memory
from escort.cuda.memory import allocator


def test_the_quick_way_is_for_the_current_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    quick: list[Any] = []

    def allocate(*args: Any) -> torch.Tensor:
        quick.append(args)
        return torch._C._dynamo.guards._empty_strided_cpu(*args)  # type: ignore[attr-defined]

    monkeypatch.setattr(memory, "_quick", allocate)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    usual: list[Any] = []
    monkeypatch.setattr(torch, "empty_strided", lambda *args, **named: usual.append((*args, named["device"])))
    shape, strides = (2, 3), (1, 2)
    y = allocator(torch.float16, torch.device("cuda:1"))(shape, strides)
    assert (tuple(y.shape), y.stride(), y.dtype) == (shape, strides, torch.float16)
    others = [torch.device(name) for name in ("cuda:0", "cuda", "cpu")]
    for device in others:
        allocator(torch.float16, device)(shape, strides)
    assert quick == [(shape, strides, torch.float16)] and usual == [(shape, strides, device) for device in others]


@pytest.mark.gpu
def test_what_is_allocated_is_as_torch_has_it() -> None:
    assert memory._quick is not None
    allocate = allocator(torch.bfloat16, torch.device("cuda:0"))
    with torch.inference_mode():
        y = allocate((2, 3, 4), (12, 1, 3))
        assert y.is_inference() and (y.stride(), y.dtype, str(y.device)) == ((12, 1, 3), torch.bfloat16, "cuda:0")
    assert allocate((0, 3), (3, 1)).numel() == 0 and not allocate((1, 1), (1, 1)).is_inference()
