"""The float64 reference itself: in parts as at once, whatever the tensors are stored in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from escort import reference
from tests.cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["3x3 with everything behind it", "no samples", "seven samples", "groups", "dilation"])
def test_a_batch_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME[name]
    x, weight, bias, residual = case.tensors()
    whole = reference.conv2d(case.problem, x, weight, bias, residual)
    assert whole.dtype is torch.float64 and whole.shape == case.problem.output_shape
    for samples in (1, 2, 3):
        monkeypatch.setattr(reference, "_CHUNK", samples * x[:1].numel() + 1)
        parts = reference.conv2d(case.problem, x, weight, bias, residual)
        assert parts.shape == whole.shape
        assert reference.compare(parts, whole) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_types_are_taken_as_they_are(dtype: torch.dtype) -> None:
    case: Case = BY_NAME["3x3 with everything behind it"]
    x, weight, bias, residual = case.tensors()
    assert residual is not None and bias is not None
    x, residual = x.to(dtype), residual.to(dtype)
    plain = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    assert torch.equal(reference.conv2d(case.problem, x, weight, bias, residual), plain.clamp(min=0.0))


def test_a_residual_has_as_many_samples_as_the_input() -> None:
    case = BY_NAME["3x3 with everything behind it"]
    x, weight, bias, residual = case.tensors()
    assert residual is not None
    with pytest.raises(RuntimeError):
        reference.conv2d(case.problem, x, weight, bias, residual.repeat(2, 1, 1, 1))
