"""The models that are saved and loaded here, and how they are compared."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def sparse(model: nn.Module, density: float = 0.1) -> nn.Module:
    """The model, initialised and pruned in place, ready to be converted."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0.0 if "var" in name else 0.5))
            if tensor.ndim == 4:
                tensor *= torch.rand(tensor.shape, generator=generator) < density
    return model.eval()


class Block(nn.Module):
    """A residual block with a strided shortcut, as in a ResNet."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding="same", groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))) + self.shortcut(x))


class Residual(nn.Module):
    """Two blocks, a full filter, an empty one, a depthwise one, tied linear layers and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU6(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Block(8, 12, 2), Block(12, 12, 1))
        self.depthwise = nn.Conv2d(12, 12, (3, 2), padding=(2, 1), dilation=2, groups=12)
        self.empty = nn.Conv2d(12, 12, 1)
        self.full = nn.Conv2d(12, 10, 1)
        self.fc, self.again = nn.Linear(10, 10), nn.Linear(10, 10)
        self.again.weight = self.fc.weight
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = self.full(torch.cat([self.depthwise(x), self.empty(x)], 3))
        return self.again(self.fc(x.mean((2, 3)))) * self.scale


class Untraceable(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.MaxPool2d(2))
        self.conv = nn.Conv2d(channels, 6, 3, bias=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.features(x))
        return self.fc(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for x in (X, X[:1], torch.randn(3, 3, 45, 37)):
        with torch.inference_mode():
            assert torch.equal(ours(x), theirs(x))


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))
