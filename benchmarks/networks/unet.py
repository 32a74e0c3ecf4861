"""U-Net: maps on the way down are joined to those of their size on the way up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.weights import with_he_weights


def _two_convs(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (arXiv:1505.04597) of four levels, padded, with doubling in the place of transposed convolutions.

    A picture of (H, W), multiples of 16, gives the scores of the classes for each pixel, (N, classes, H, W).
    """

    LEVELS = 4

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(self.LEVELS + 1)]
        self.down = nn.ModuleList(
            _two_convs(before, channels) for before, channels in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            _two_convs(below + channels, channels)
            for below, channels in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.scores = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.down[0](x)]
        for level in range(1, self.LEVELS + 1):
            skips.append(self.down[level](functional.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for convs in self.up:
            x = convs(torch.cat([functional.interpolate(x, scale_factor=2.0, mode="nearest"), skips.pop()], 1))
        return self.scores(x)


def unet(num_classes: int = 2, width: int = 32) -> nn.Module:
    """U-Net at half the paper's width: 7.8 M weights, 55 G multiply-adds at 512x512."""
    return with_he_weights(UNet(num_classes, width))
