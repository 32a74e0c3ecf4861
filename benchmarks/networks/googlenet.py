"""GoogLeNet."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.weights import with_he_weights


class BasicConv2d(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four parallel branches, concatenated.

    Args:
        sizes: output channels of the 1x1; of the 1x1 and the 3x3 of `branch2`; of the 1x1 and the 5x5 of `branch3`; and
            behind the pool.
        kernel_size: of `branch3`: 5 as in the paper, or 3 as in torchvision.
    """

    def __init__(self, in_channels: int, *sizes: int, kernel_size: int) -> None:
        super().__init__()
        out1, mid3, out3, mid5, out5, pool = sizes
        self.branch1 = BasicConv2d(in_channels, out1, 1)
        self.branch2 = nn.Sequential(BasicConv2d(in_channels, mid3, 1), BasicConv2d(mid3, out3, 3, padding=1))
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, mid5, 1), BasicConv2d(mid5, out5, kernel_size, padding=kernel_size // 2)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), BasicConv2d(in_channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    """Auxiliary classifier, evaluated in training only."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = BasicConv2d(in_channels, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(functional.adaptive_avg_pool2d(x, (4, 4)))
        x = functional.relu(self.fc1(torch.flatten(x, 1)), inplace=True)
        return self.fc2(self.dropout(x))


class GoogLeNet(nn.Module):
    """Inception v1 with batch norm; with auxiliary classifiers, training returns (logits, logits of aux2, of aux1)."""

    def __init__(self, num_classes: int, aux_logits: bool, transform_input: bool, kernel_size: int) -> None:
        super().__init__()
        inception = partial(Inception, kernel_size=kernel_size)
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.conv1 = BasicConv2d(3, 64, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, 1)
        self.conv3 = BasicConv2d(64, 192, 3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        if aux_logits:
            self.aux1 = InceptionAux(512, num_classes)
            self.aux2 = InceptionAux(528, num_classes)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if self.transform_input:
            x = _from_imagenet_normalization(x)
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        after_4a = self.inception4a(x)
        after_4d = self.inception4d(self.inception4c(self.inception4b(after_4a)))
        x = self.maxpool4(self.inception4e(after_4d))
        x = self.inception5b(self.inception5a(x))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        if self.training and self.aux_logits:
            return logits, self.aux2(after_4d), self.aux1(after_4a)
        return logits


def _from_imagenet_normalization(x: Tensor) -> Tensor:
    """Turns ImageNet-normalized x: (N, 3, H, W) into the [-1, 1] range that the checkpoint was trained on."""
    moments = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))  # mean and deviation of R, G, B
    channels = [x[:, i : i + 1] * (std / 0.5) + (mean - 0.5) / 0.5 for i, (mean, std) in enumerate(moments)]
    return torch.cat(channels, 1)


def googlenet(
    num_classes: int = 1000, aux_logits: bool = False, transform_input: bool = False, kernel_size: int = 3
) -> nn.Module:
    """GoogLeNet; torchvision's ImageNet checkpoint wants both flags True.

    Args:
        kernel_size: of the branch that has 5x5 filters in the paper and 3x3 in torchvision.
    """
    return with_he_weights(GoogLeNet(num_classes, aux_logits, transform_input, kernel_size))
