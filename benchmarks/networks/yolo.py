"""A detector in the style of YOLO: convolutions and SiLU throughout, maps at three strides, a path down and one up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.weights import with_he_weights


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-3),
            nn.SiLU(inplace=True),
        )


class Bottleneck(nn.Module):
    """Two 3x3 convolutions; with a shortcut around both, behind the second activation."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.convs = nn.Sequential(Conv(channels, channels, 3), Conv(channels, channels, 3))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x) if self.shortcut else self.convs(x)


class Stage(nn.Module):
    """One half of the channels goes through bottlenecks in a row; all that is computed on the way is joined (C2f)."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        self.width = out_channels // 2
        self.enter = Conv(in_channels, 2 * self.width)
        self.bottlenecks = nn.ModuleList(Bottleneck(self.width, shortcut) for _ in range(depth))
        self.leave = Conv((2 + depth) * self.width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.enter(x).split(self.width, 1)
        parts = [first, second]
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class PyramidPooling(nn.Module):
    """Maxima over windows of 5, 9 and 13, each from the one before, joined with what they are of (SPPF)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = Conv(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.leave = Conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.pool(x)
        z = self.pool(y)
        return self.leave(torch.cat([x, y, z, self.pool(z)], 1))


class Head(nn.Module):
    """The distributions of the four sides of a box and the scores of the classes, for each position of a map."""

    SIDES = 4 * 16  # sixteen distances each

    def __init__(self, channels: int, narrowest: int, num_classes: int) -> None:
        super().__init__()
        boxes, scores = max(16, narrowest // 4, self.SIDES), max(narrowest, min(num_classes, 100))
        self.boxes = nn.Sequential(Conv(channels, boxes, 3), Conv(boxes, boxes, 3), nn.Conv2d(boxes, self.SIDES, 1))
        self.scores = nn.Sequential(
            Conv(channels, scores, 3), Conv(scores, scores, 3), nn.Conv2d(scores, num_classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(torch.cat([self.boxes(x), self.scores(x)], 1), 2)


class Yolo(nn.Module):
    """The detector; a picture of (H, W), multiples of 32, gives (N, 64 + classes, HW/64 + HW/256 + HW/1024)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (width * 2**level for level in range(5))
        self.to_third = nn.Sequential(
            Conv(3, c1, 3, 2), Conv(c1, c2, 3, 2), Stage(c2, c2, 1, True), Conv(c2, c3, 3, 2), Stage(c3, c3, 2, True)
        )
        self.to_fourth = nn.Sequential(Conv(c3, c4, 3, 2), Stage(c4, c4, 2, True))
        self.to_fifth = nn.Sequential(Conv(c4, c5, 3, 2), Stage(c5, c5, 1, True), PyramidPooling(c5))
        self.up_fourth = Stage(c5 + c4, c4, 1, False)
        self.up_third = Stage(c4 + c3, c3, 1, False)
        self.down_third = Conv(c3, c3, 3, 2)
        self.down_fourth = Stage(c3 + c4, c4, 1, False)
        self.from_fourth = Conv(c4, c4, 3, 2)
        self.down_fifth = Stage(c4 + c5, c5, 1, False)
        self.heads = nn.ModuleList(Head(channels, c3, num_classes) for channels in (c3, c4, c5))

    def forward(self, x: Tensor) -> Tensor:
        third = self.to_third(x)
        fourth = self.to_fourth(third)
        fifth = self.to_fifth(fourth)
        fourth = self.up_fourth(torch.cat([_doubled(fifth), fourth], 1))
        third = self.up_third(torch.cat([_doubled(fourth), third], 1))
        fourth = self.down_fourth(torch.cat([self.down_third(third), fourth], 1))
        fifth = self.down_fifth(torch.cat([self.from_fourth(fourth), fifth], 1))
        maps = zip(self.heads, (third, fourth, fifth), strict=True)
        return torch.cat([head(x) for head, x in maps], 2)


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def yolo(num_classes: int = 80, width: int = 16) -> nn.Module:
    """A detector of the layers and size of YOLOv8n at width 16: 3.2 M weights, 4.4 G multiply-adds at 640x640."""
    return with_he_weights(Yolo(num_classes, width))
