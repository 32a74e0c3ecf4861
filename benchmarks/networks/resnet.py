"""ResNet-18, ResNet-50 and ResNeXt-50."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks.weights import with_he_weights


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (ResNet-18)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(in_channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """Residual 1x1-3x3-1x1 block.

    Args:
        width: a quarter of its output channels, and its inner channels where there is one group.
        stride: of the 3x3 as in ResNet v1.5, or of the first 1x1 as in the paper's v1.
        groups: of the 3x3.
        group_width: inner channels of a group by those of `width`, in sixty-fourths.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        *,
        groups: int = 1,
        group_width: int = 64,
        strides_first: bool = False,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        width = width * group_width // 64 * groups
        first, second = (stride, 1) if strides_first else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut's 1x1 convolution, or None where the identity already has the right shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global average pool, classifier. Options are those of the blocks."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        num_classes: int,
        **options: Any,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64

        def stage(width: int, depth: int, stride: int) -> nn.Sequential:
            nonlocal channels
            blocks = []
            for index in range(depth):
                blocks.append(block(channels, width, stride if index == 0 else 1, **options))
                channels = width * block.expansion
            return nn.Sequential(*blocks)

        self.layer1 = stage(64, depths[0], stride=1)
        self.layer2 = stage(128, depths[1], stride=2)
        self.layer3 = stage(256, depths[2], stride=2)
        self.layer4 = stage(512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000) -> nn.Module:
    """ResNet-18."""
    return with_he_weights(ResNet(BasicBlock, (2, 2, 2, 2), num_classes))


def resnet50(num_classes: int = 1000, strides_first: bool = False) -> nn.Module:
    """ResNet-50 v1.5, whose strides are on the 3x3; or v1, where they come first, as in Caffe."""
    return with_he_weights(ResNet(Bottleneck, (3, 4, 6, 3), num_classes, strides_first=strides_first))


def resnext50_32x4d(num_classes: int = 1000) -> nn.Module:
    """ResNeXt-50 of 32 groups, 4 channels wide in the first stage."""
    return with_he_weights(ResNet(Bottleneck, (3, 4, 6, 3), num_classes, groups=32, group_width=4))
