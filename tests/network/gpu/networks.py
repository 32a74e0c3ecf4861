"""The networks that GPU tests convert, in which precisions and memory formats, and when two results are the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import escort
from escort import prune, reference
from escort.artifact import kernels
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.model import ConvertedModel
from escort.problem import TORCH_DTYPE, Precision

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class Mixed(nn.Module):
    """Stride, groups, a depthwise and a pointwise layer, a residual, both pools, a concatenation and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = F.relu(self.norm(self.grouped(x)) + x)
        x = torch.cat([F.relu(self.pointwise(self.depthwise(x))), x], 1)
        return self.head(x.mean((2, 3)))


class Branching(nn.Module):
    """Its control flow depends on the data: it can be neither traced nor captured."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    prune.uniform(model, sparsity)
    prune.make_permanent(model)
    return model.eval()


PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")


def on_gpu(model: nn.Module, precision: Precision) -> nn.Module:
    return model.to("cuda", TORCH_DTYPE[precision])


def samples(precision: Precision, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 32, 32), device="cuda").to(TORCH_DTYPE[precision])


def converted(precision: Precision, model: nn.Module | None = None, *shape: int) -> ConvertedModel:
    model = on_gpu(pruned(Mixed()) if model is None else model, precision)
    fast = escort.convert(model, samples(precision, *shape), precision=precision, effort="best")
    assert not fast.plan.kept_dense and fast.plan.precision == precision
    return fast


def saved_and_loaded(fast: ConvertedModel, path: Path) -> tuple[ConvertedModel, set[str]]:
    """What a file with its kernels beside it gives back, and the sources of these."""
    escort.save(fast, path, kernels=True)
    data = kernels.beside(path)
    sources = {binary.source for binary in kernels.read(data, kernels.digest(data.read_bytes()))}
    return escort.load(path, kernels=True), sources


def assert_close(fast: nn.Module, model: nn.Module, x: Tensor, precision: Precision) -> None:
    """Both by the same float64 truth, with bounds for the precision."""
    with torch.inference_mode():
        out = fast(x)
        expected = copy.deepcopy(model).double()(x.double())
    assert out.dtype is x.dtype and out.shape == expected.shape
    assert reference.compare(out, expected) < NETWORK_ERROR_BOUND[precision]


def assert_same(out: Tensor, expected: Tensor, precision: Precision | None = None) -> None:
    """The same computation: bits may differ, as not every kernel fixes the order of its sums.

    Args:
        precision: of products, where it is not that of the tensors: another process may choose another dense algorithm.
    """
    precision = precision or {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(out.dtype, "fp32")
    assert out.dtype is expected.dtype and reference.compare(out, expected) < reference.ERROR_BOUND[precision]


def in_formats(*formats: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize("memory_formats", formats, indirect=True, ids="-".join)


BOTH = in_formats(("contiguous",), ("channels_last",))


def each(*precisions: Precision) -> Any:
    """These precisions in each memory format that they have."""
    cases = [
        (p, (name,))
        for p in precisions
        for name in ("contiguous", "channels_last")
        if p != "fp32" or name == "contiguous"
    ]
    ids = ["-".join((precision, *formats)) for precision, formats in cases]
    return pytest.mark.parametrize(("precision", "memory_formats"), cases, indirect=["memory_formats"], ids=ids)
