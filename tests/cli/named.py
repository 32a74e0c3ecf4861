"""Models that commands are given by name, and what a name may lead to besides."""

from __future__ import annotations

import torch
from torch import nn

from escort import Images

TINY = "tests.cli.named:tiny"


def tiny() -> nn.Module:
    """What most commands are tried on; in training mode, as factories leave it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def of_bytes() -> nn.Module:
    """Takes images of bytes, N,H,W,C."""
    return nn.Sequential(Images([0.5] * 3, [0.25] * 3), tiny())


class Branching(nn.Module):
    """Cannot be traced: control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def chatty() -> nn.Module:
    print("a model that prints")
    return tiny()


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def needs_width(width: int) -> nn.Module:
    return nn.Conv2d(3, width, 3)


def broken() -> nn.Module:
    raise KeyError("no such layer")


def not_a_model() -> str:
    return "weights"


number = 3


def quits() -> nn.Module:
    raise SystemExit(3)
