"""Networks that people prune run natively from their first step to their last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import escort
from benchmarks.networks import googlenet, mobilenet_v2
from benchmarks.zoo.forced import sparse_forced
from tests.network import zoo
from tests.network.models import pruned
from tests.runtime.test_native import images, same, steps_left


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def conv(before: int, after: int, kernel: int = 1, stride: int = 1, **options: Any) -> nn.Sequential:
    return nn.Sequential(*zoo.conv_norm(before, after, kernel, stride, **options), nn.SiLU())


class Yolo5(nn.Module):
    """As YOLOv5: slices of every second pixel first, pooling in a row, and heads that decode boxes by anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.pool = conv(12, 16, 3), conv(16, 16, 3, 2), nn.MaxPool2d(5, 1, 2)
        self.after_pool, self.lateral, self.up = conv(64, 16), conv(16, 16), nn.Upsample(scale_factor=2)
        self.fused = conv(32, 16, 3)
        self.heads = nn.ModuleList(nn.Conv2d(16, 3 * 7, 1) for _ in range(2))
        self.register_buffer("anchors", torch.rand(2, 1, 3, 1, 1, 2))
        self.register_buffer("grid", torch.rand(1, 1, 1, 1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        large = self.stem(x)
        small = self.down(large)
        pooled = [small]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        small = self.after_pool(torch.cat(pooled, 1))
        large = self.fused(torch.cat([self.up(self.lateral(small)), large], 1))
        boxes, raw = [], []
        for i, (head, y) in enumerate(zip(self.heads, (large, small), strict=True)):
            samples, _, height, width = y.shape
            z = head(y).view(samples, 3, 7, height, width).permute(0, 1, 3, 4, 2).contiguous()
            raw.append(z)
            middle, size, score = z.sigmoid().split((2, 2, 3), 4)
            decoded = torch.cat(((middle * 2 + self.grid) * 8.0, (size * 2) ** 2 * self.anchors[i], score), 4)
            boxes.append(decoded.view(samples, 3 * height * width, 7))
        return torch.cat(boxes, 1), raw


class Yolo8(nn.Module):
    """As YOLOv8: halves that go separate ways, and heads whose distances are means over shares of bins."""

    def __init__(self, classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.bins, self.classes = bins, classes
        self.stem, self.wide, self.branch, self.out = conv(3, 16, 3, 2), conv(16, 16), conv(8, 8, 3), conv(24, 16)
        self.down = conv(16, 16, 3, 2)
        self.boxes = nn.ModuleList(nn.Conv2d(16, 4 * bins, 1) for _ in range(2))
        self.scores = nn.ModuleList(nn.Conv2d(16, classes, 1) for _ in range(2))
        self.mean = nn.Conv2d(bins, 1, 1, bias=False)
        self.mean.weight.data = torch.arange(bins).float().view(1, bins, 1, 1)
        self.register_buffer("points", torch.rand(1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        halves = list(self.wide(self.stem(x)).chunk(2, 1))
        halves.append(self.branch(halves[-1]) + halves[-1])
        large = self.out(torch.cat(halves, 1))
        levels = [
            torch.cat([box(y), score(y)], 1).view(x.shape[0], 4 * self.bins + self.classes, -1)
            for box, score, y in zip(self.boxes, self.scores, (large, self.down(large)), strict=True)
        ]
        box, score = torch.cat(levels, 2).split((4 * self.bins, self.classes), 1)
        shares = box.view(x.shape[0], 4, self.bins, -1).transpose(2, 1).softmax(1)
        before, after = self.mean(shares).view(x.shape[0], 4, -1).chunk(2, 1)
        first, last = self.points - before, self.points + after
        return torch.cat([torch.cat([(first + last) / 2, last - first], 1) * 8, score.sigmoid()], 1)


class Shuffle(nn.Module):
    """As ShuffleNetV2: one half goes on as it is, and channels of both are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*zoo.conv_norm(3, 16, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(*zoo.conv_norm(8, 8), nn.ReLU(), *zoo.conv_norm(8, 8, 3, groups=8), *zoo.conv_norm(8, 8), nn.ReLU())
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            first, second = x.chunk(2, dim=1)
            x = torch.cat((first, block(second)), dim=1)
            samples, channels, height, width = x.size()
            x = x.view(samples, 2, channels // 2, height, width)
            x = torch.transpose(x, 1, 2).contiguous()
            x = x.view(samples, channels, height, width)
        return self.head(x.mean([2, 3]))


class Dense(nn.Module):
    """As DenseNet: each layer reads the results of all before it."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(*zoo.conv_norm(3, 8, 3), nn.ReLU())
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), *zoo.conv_norm(8 + 4 * i, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(F.pad(layer(torch.cat(features, 1)), (1, 1, 1, 1)))
        return F.adaptive_avg_pool2d(torch.cat(features, 1), 1).flatten(1)


class Landmarks(nn.Module):
    """As MediaPipe's: pads on one side, residuals with channels of zeros, PReLU, and bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.activation = nn.Conv2d(3, 8, 3, stride=2), nn.PReLU(8)
        self.depthwise, self.project = nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.Conv2d(8, 12, 1)
        self.slopes, self.head = nn.PReLU(), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(F.pad(x, (0, 1, 0, 1))))
        y = self.project(self.depthwise(F.pad(x, (0, 1, 0, 1))))
        shortcut = F.pad(F.max_pool2d(x, 2), (0, 0, 0, 0, 0, 4))
        y = self.head(self.slopes(y + shortcut))
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear") + F.leaky_relu(x, 0.1)
        return F.interpolate(y, size=(20, 20), mode="bicubic")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mobilenet v2": (mobilenet_v2, images(1, 3, 64, 64)),
    "mobilenet v3": (zoo.Mobile, images(1, 3, 32, 32)),
    "googlenet": (googlenet, images(1, 3, 64, 64)),
    "shufflenet": (Shuffle, images(1, 3, 32, 32)),
    "densenet": (Dense, images(1, 3, 16, 16)),
    "a detector with anchors": (Yolo5, images(1, 3, 32, 32)),
    "a detector without": (Yolo8, images(1, 3, 32, 32)),
    "a segmenter": (zoo.UNet, images(1, 3, 32, 32)),
    "landmarks": (Landmarks, images(1, 3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_segment(name: str) -> None:
    torch.manual_seed(0)
    factory, x = NETWORKS[name]
    model = pruned(factory().eval())
    with sparse_forced():
        fast = escort.convert(model, x, methods=["direct", "depthwise"], remeasure=True)
    for samples in (1, 2):
        inputs = torch.cat([x, x.flip(3)])[:samples]
        same(fast(inputs), model(inputs), bound=1e-4)
        assert not steps_left(fast.network)
    assert {form["segments"] for form in fast.network.native.stats()["forms"]} == {1}
