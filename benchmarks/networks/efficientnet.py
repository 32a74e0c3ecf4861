"""EfficientNet-B0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.networks.weights import with_he_weights


def _conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, activate: bool = True
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        *([nn.SiLU(inplace=True)] if activate else []),
    )


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a gate in (0, 1) that two layers compute from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class MBConv(nn.Module):
    """Expand by 1x1, filter depthwise, gate, project by a linear 1x1; residual where the shape is kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        self.block = nn.Sequential(
            *([_conv_norm(in_channels, hidden, 1)] if expand_ratio != 1 else []),
            _conv_norm(hidden, hidden, kernel_size, stride, groups=hidden),
            SqueezeExcitation(hidden, in_channels // 4),
            _conv_norm(hidden, out_channels, 1, activate=False),
        )
        self.use_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.use_residual else self.block(x)


class EfficientNetB0(nn.Module):
    """EfficientNet-B0 (arXiv:1905.11946) without stochastic depth, which does nothing outside of training."""

    # (expansion, kernel size, stride of the first block, channels, blocks), table 1 of the paper
    STAGES = (
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    )

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        features = [_conv_norm(3, 32, 3, stride=2)]
        channels = 32
        for expand_ratio, kernel_size, stride, width, depth in self.STAGES:
            blocks = []
            for index in range(depth):
                blocks.append(MBConv(channels, width, kernel_size, stride if index == 0 else 1, expand_ratio))
                channels = width
            features.append(nn.Sequential(*blocks))
        features.append(_conv_norm(channels, 1280, 1))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def efficientnet_b0(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-B0."""
    return with_he_weights(EfficientNetB0(num_classes))
