"""Small models that hold one of everything that conversion has to do with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escort import prune


class Small(nn.Module):
    """Batch norm, ReLU6, a residual, a pool by module and one by function, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu6(self.norm(self.first(x))), 3, stride=2, padding=1)
        x = self.pool(F.relu(self.second(x) + x))
        return self.head(F.dropout(x.mean((2, 3)), training=self.training))


class Block(nn.Module):
    """Traceable; with an attribute that the code around it reads."""

    def __init__(self, source: int = -1) -> None:
        super().__init__()
        self.conv, self.norm, self.source = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), source

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x))) + x


class Branching(nn.Module):
    """Control flow on data, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(self.other(x)[:, :3])


def pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    prune.uniform(model, sparsity)
    prune.make_permanent(model)
    return model.eval()


def three_convolutions() -> nn.Module:
    """The second is like the first."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(2)), nn.Conv2d(4, 4, 3)).eval()


def one_conv(kernel_size: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, kernel_size, dtype=dtype)).eval()


class Masked(nn.Module):
    """Takes a tensor by position, others by name, and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)

    def forward(
        self, x: torch.Tensor, factor: float = 2.0, mask: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = F.relu(self.conv(x)) * factor
        y = y if mask is None else y * mask
        return self.other(y) if bias is None else self.other(y) + bias


class Checked(nn.Module):
    """Checks shapes by hand, in the ways that people do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4 and x.shape[1] == 3, f"got {x.shape}"
        _, channels, height, width = x.shape
        if channels != 3 or not height > 2:
            raise ValueError(f"too small: {height}")
        if width % 3:
            raise ValueError("width must be divisible by three")
        return self.conv(x)


class Between(nn.Module):
    """A depthwise layer with squeeze-excitation, a normalisation, and a pyramid of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 5, 1, 2, groups=16), nn.BatchNorm2d(16), nn.SiLU())
        self.reduce, self.expand = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Conv2d(16, 24, 1)
        self.norm = nn.LocalResponseNorm(5, 0.1)
        self.pool, self.up = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
        self.deep, self.head = nn.Conv2d(24, 32, 3, padding=1), nn.Linear(56, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        x = x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        x = self.norm(self.project(x))
        x = torch.cat([self.up(F.relu(self.deep(self.pool(x)))), x], 1)
        return self.head(x.mean((2, 3)))
