"""Networks of blocks as EfficientNet, MobileNetV3 and MediaPipe's have them: all of their convolutions are fused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import escort
from benchmarks.zoo import sparse_forced
from escort.layers import SparseConv2d
from escort.network.model import ConvertedModel
from escort.reference import compare
from tests.network.patterns import with_statistics

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """Expand, depthwise, squeeze and excite, project: an inverted residual with the activations of one network."""

    def __init__(self, before: int, after: int, stride: int, act: Callable[[], nn.Module], gate: nn.Module) -> None:
        super().__init__()
        wide = 4 * before
        self.expand = nn.Sequential(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), act())
        depthwise = nn.Conv2d(wide, wide, 5, stride, 2, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), act())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Sequential(nn.Conv2d(wide, 8, 1), act(), nn.Conv2d(8, wide, 1), gate)
        self.project = nn.Sequential(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after))
        self.is_residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(self.pool(y)))
        return x + y if self.is_residual else y


class Blaze(nn.Module):
    """A depthwise convolution, a pointwise one, and an activation behind the residual add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.convs = nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1))
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.convs(x) + x)


def mobile(act: Callable[[], nn.Module], gate: Callable[[], nn.Module]) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), act())
    blocks = (Block(8, 8, 1, act, gate()), Block(8, 12, 2, act, gate()), Block(12, 12, 1, act, gate()))
    head = nn.Sequential(nn.Conv2d(12, 40, 1, bias=False), nn.BatchNorm2d(40), act())
    return nn.Sequential(stem, *blocks, head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5))


def blaze() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.PReLU(), Blaze(8), Blaze(8), nn.Conv2d(8, 4, 1), nn.Sigmoid())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "efficientnet": (lambda: mobile(nn.SiLU, nn.Sigmoid), {"silu": 11, "sigmoid": 3, "none": 3}),
    "mobilenet_v3": (lambda: mobile(nn.Hardswish, nn.Hardsigmoid), {"hardswish": 11, "hardsigmoid": 3, "none": 3}),
    "yolo": (
        lambda: mobile(lambda: nn.LeakyReLU(0.1, inplace=True), nn.Sigmoid),
        {"leaky_relu": 11, "sigmoid": 3, "none": 3},
    ),
    "blaze": (blaze, {"prelu": 3, "none": 2, "sigmoid": 1}),
}


#: A decomposed PReLU is a comparison, a product and a choice, which no pass puts together.
WAYS = [
    (name, decomposed) for name in NETWORKS for decomposed in (False, True) if (name, decomposed) != ("blaze", True)
]


@pytest.mark.parametrize(("name", "decomposed"), WAYS)
def test_all_convolutions_are_fused(name: str, decomposed: bool) -> None:
    factory, activations = NETWORKS[name]
    model = with_statistics(factory())
    escort.prune.uniform(model, 0.6)
    escort.prune.make_permanent(model)
    given = model
    if decomposed:
        given = torch.export.export(model, (X,)).run_decompositions().module(check_guards=False)
    with sparse_forced():
        fast: ConvertedModel = escort.convert(given, X, methods=["direct"])
    sparse = [module for module in fast.modules() if isinstance(module, SparseConv2d)]
    found = {act: sum(layer.activation == act for layer in sparse) for act in {layer.activation for layer in sparse}}
    assert found == activations
    # The projections have no activation in the model either.
    assert all(
        layer.residual or layer.unfolded is not None or "convs" in layer.name
        for layer in sparse
        if layer.activation == "none"
    )
    with torch.inference_mode():
        assert compare(fast(X), model(X)) < 1e-5
