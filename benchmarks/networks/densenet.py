"""DenseNet-121."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.weights import with_he_weights

_GROWTH, _STEM = 32, 64


class DenseLayer(nn.Module):
    """A bottleneck that reads all features before it, and adds channels to them."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, 4 * _GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * _GROWTH)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * _GROWTH, _GROWTH, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    """Layers of which each reads the results of all before it."""

    def __init__(self, in_channels: int, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            self[f"denselayer{index + 1}"] = DenseLayer(in_channels + index * _GROWTH)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def _transition(in_channels: int) -> nn.Sequential:
    """Halves channels, rows and columns."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(in_channels, in_channels // 2, 1, bias=False),
            pool=nn.AvgPool2d(2, stride=2),
        )
    )


class DenseNet(nn.Module):
    """Stem, four dense blocks with transitions between them, global average pool, classifier."""

    def __init__(self, depths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels = _STEM
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(channels),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        for number, depth in enumerate(depths, 1):
            self.features.add_module(f"denseblock{number}", DenseBlock(channels, depth))
            channels += depth * _GROWTH
            if number < len(depths):
                self.features.add_module(f"transition{number}", _transition(channels))
                channels //= 2
        self.features.add_module(f"norm{len(depths) + 1}", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(functional.adaptive_avg_pool2d(x, (1, 1)), 1))


def densenet121(num_classes: int = 1000) -> nn.Module:
    """DenseNet-121."""
    return with_he_weights(DenseNet((6, 12, 24, 16), num_classes))
