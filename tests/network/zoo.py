"""Structures that networks of other libraries have, written out small."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(before: int, after: int, kernel: int = 3, stride: int = 1, **options: int) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False, **options),
        nn.BatchNorm2d(after, eps=1e-3),
    ]


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze and excite, project; a residual where the shapes allow it."""

    def __init__(self, before: int, wide: int, after: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.use_residual = stride == 1 and before == after
        self.block = nn.Sequential(
            *conv_norm(before, wide, 1),
            activation(),
            *conv_norm(wide, wide, 5, stride, groups=wide),
            activation(),
            SqueezeExcitation(wide),
            *conv_norm(wide, after, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return x + y if self.use_residual else y


class Mobile(nn.Module):
    """As MobileNetV3: hard swish, squeeze and excitation, a classifier behind the average."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(*conv_norm(3, 16, 3, 2), nn.Hardswish()),
            InvertedResidual(16, 32, 16, 1, nn.ReLU),
            InvertedResidual(16, 48, 24, 2, nn.Hardswish),
            InvertedResidual(24, 48, 24, 1, nn.Hardswish),
            nn.Sequential(*conv_norm(24, 64, 1), nn.Hardswish()),
        )
        self.classifier = nn.Sequential(nn.Linear(64, 32), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x).mean((2, 3), keepdim=True), 1))


class Block(nn.Module):
    """Convolution, norm, SiLU, with the routing of the network around it: where its input comes from, and its place."""

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = conv_norm(before, after, kernel, stride)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Split(nn.Module):
    """The halves of a convolution, and what each of a row of bottlenecks makes of the last, in one tensor."""

    def __init__(self, channels: int, bottlenecks: int) -> None:
        super().__init__()
        self.c = channels // 2
        self.cv1 = Block(channels, 2 * self.c)
        self.cv2 = Block((2 + bottlenecks) * self.c, channels)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(bottlenecks))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Block(channels, channels, 3), Block(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class Pyramid(nn.Module):
    """Three poolings in a row, and all of them side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Block(channels, channels // 2), Block(channels * 2, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.pool(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Cat(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Detect(nn.Module):
    """Boxes and classes by branches of their own, decoded with anchors that are kept for as long as sizes stay."""

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.bins, self.strides, self.no = bins, strides, classes + 4 * bins
        self.shape: torch.Size | None = None
        self.anchors = self.scales = torch.empty(0)
        self.cv2 = nn.ModuleList(nn.Sequential(Block(c, 16, 3), nn.Conv2d(16, 4 * bins, 1)) for c in channels)
        self.cv3 = nn.ModuleList(nn.Sequential(Block(c, 16, 3), nn.Conv2d(16, classes, 1)) for c in channels)

    def forward(self, x: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        for i in range(len(x)):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
        if self.shape != x[0].shape:
            self.anchors, self.scales = self.made_for(x)
            self.shape = x[0].shape
        box, scores = torch.cat([y.view(y.shape[0], self.no, -1) for y in x], 2).split(
            (4 * self.bins, self.no - 4 * self.bins), 1
        )
        shares = box.view(box.shape[0], 4, self.bins, -1).softmax(2)
        offsets = (shares * torch.arange(self.bins, dtype=box.dtype).view(1, 1, -1, 1)).sum(2)
        near, far = offsets.chunk(2, 1)
        boxes = torch.cat((self.anchors - near, self.anchors + far), 1) * self.scales
        return torch.cat((boxes, scores.sigmoid()), 1), x

    def made_for(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, scales = [], []
        for y, stride in zip(x, self.strides, strict=True):
            rows, columns = (torch.arange(size, dtype=y.dtype) + 0.5 for size in y.shape[2:])
            points.append(torch.stack(torch.meshgrid(columns, rows, indexing="xy")).flatten(1))
            scales.append(torch.full((1, points[-1].shape[1]), stride, dtype=y.dtype))
        return torch.cat(points, 1), torch.cat(scales, 1)


class Detector(nn.Module):
    """As YOLO: a list of modules whose attributes say where their inputs come from."""

    def __init__(self) -> None:
        super().__init__()
        rows: list[tuple[int | list[int], nn.Module]] = [
            (-1, Block(3, 16, 3, 2)),
            (-1, Split(16, 1)),
            (-1, Block(16, 32, 3, 2)),
            (-1, Pyramid(32)),
            (-1, nn.Upsample(scale_factor=2.0, mode="nearest")),
            ([-1, 1], Cat()),
            (-1, Block(48, 16)),
            (-1, Block(16, 24, 3, 2)),
            ([6, 7], Detect((16, 24), (2, 4))),
        ]
        self.model = nn.Sequential(*(module for _, module in rows))
        for index, (source, module) in enumerate(rows):
            module.f, module.i = source, index
        self.save = {1, 6, 7}

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y: list[Tensor | None] = []
        for m in self.model:
            if m.f != -1:
                x = y[m.f] if isinstance(m.f, int) else [x if j == -1 else y[j] for j in m.f]  # type: ignore
            x = m(x)
            y.append(x if m.i in self.save else None)
        return x  # type: ignore[return-value]


def twice(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(*conv_norm(before, after), nn.ReLU(inplace=True), *conv_norm(after, after), nn.ReLU(True))


class UNet(nn.Module):
    """Skips that the decoder catches up with by interpolating to their sizes, and a check of the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([twice(3, 8), twice(8, 16), twice(16, 24)])
        self.up = nn.ModuleList([twice(24 + 16, 16), twice(16 + 8, 8)])
        self.output_stride, self.head = 4, nn.Conv2d(8, 2, 1)

    def check(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        if height % self.output_stride != 0 or width % self.output_stride != 0:
            raise ValueError(f"wrong input size ({height}, {width}): divisible by {self.output_stride} it must be")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        skips = []
        for stage in self.down:
            x = stage(x if not skips else F.max_pool2d(skips[-1], 2))
            skips.append(x)
        for stage, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat([skip, x], dim=1))
        return self.head(x)


class PooledBranch(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_norm(before, after, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for module in self:
            x = module(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DeepLab(nn.Module):
    """Dilated branches side by side, and the sizes of the input again; an ordered dict with an auxiliary output."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"low": twice(3, 8), "pool": nn.MaxPool2d(2), "high": twice(8, 16)})
        self.returned = {"low": "aux", "high": "out"}
        dilated = [
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=rate, dilation=rate, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            for rate in (2, 4)
        ]
        first = nn.Sequential(*conv_norm(16, 8, 1), nn.ReLU())
        self.branches = nn.ModuleList([first, *dilated, PooledBranch(16, 8)])
        self.project = nn.Sequential(*conv_norm(32, 8, 1), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 1))
        self.aux = nn.Conv2d(8, 4, 1)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        out: OrderedDict[str, Tensor] = OrderedDict()
        for name, module in self.backbone.items():
            x = module(x)
            if name in self.returned:
                out[self.returned[name]] = x
        return out

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        size = x.shape[-2:]
        features = self.features(x)
        y = self.project(torch.cat([branch(features["out"]) for branch in self.branches], dim=1))
        result: OrderedDict[str, Tensor] = OrderedDict()
        result["out"] = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        result["aux"] = F.interpolate(self.aux(features["aux"]), size=size, mode="bilinear", align_corners=False)
        return result


class ChannelNorm(nn.LayerNorm):
    """A layer norm over channels, of maps in torch's order."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """Depthwise 7x7, a norm and two linear layers over channels, scaled onto the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand, self.reduce = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.reduce(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """As ConvNeXt: patches for a stem, layer norms, and layer scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ChannelNorm(16))
        self.stages = nn.Sequential(Scaled(16), ChannelNorm(16), nn.Conv2d(16, 24, 2, 2), Scaled(24))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x)).mean([-2, -1])))


class SameConv2d(nn.Conv2d):
    """Pads as TensorFlow does, by the size of the input, more at the end than at the beginning."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        height, width = (max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in sizes)
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class CheckedNorm(nn.BatchNorm2d):
    """A norm that checks its input, and applies an activation of its own."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__(channels, eps=1e-3)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, eps=self.eps)
        return self.act(x)


class DropPath(nn.Module):
    """Leaves out a branch of some samples in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Ported(nn.Module):
    """As the ports of TensorFlow's networks: 'same' padding by the input's size, norms that check, drop path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 16, 3, 2, bias=False)
        self.bn1 = CheckedNorm(16, nn.SiLU())
        self.wide = nn.Conv2d(16, 32, 1, bias=False)
        self.bn2 = CheckedNorm(32, nn.ReLU6())
        self.depthwise = SameConv2d(32, 32, 5, 2, groups=32, bias=False)
        self.bn3 = CheckedNorm(32, nn.ReLU6())
        self.mix = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn4 = CheckedNorm(32, nn.Identity())
        self.drop_path, self.head = DropPath(0.2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.wide(self.bn1(self.stem(x))))
        x = self.bn3(self.depthwise(x))
        x = self.drop_path(self.bn4(self.mix(x))) + x
        return self.head(x.mean((2, 3)))


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    """A structure with random weights and the statistics of norms that were trained, in eval mode."""
    torch.manual_seed(0)
    model = factory().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model
