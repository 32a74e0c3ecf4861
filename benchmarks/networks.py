"""The networks that are benchmarked, in plain torch.nn.

Modules carry torchvision's state-dict names and compute what torchvision's modules compute, so its checkpoints load
with `load_state_dict`. CaffeNet, which torchvision lacks, is named after the layers of its Caffe prototxt. All are
traceable by torch.fx. Weights are random, scaled to keep activations finite and alive without trained batch norms.

    >>> from benchmarks.networks import NETWORKS
    >>> network = NETWORKS["resnet50"]
    >>> model = network.factory().eval()
    >>> model(torch.randn(2, *network.input_size)).shape
    torch.Size([2, 1000])
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Network:
    """A benchmarked network: how to build it and the size of one input image."""

    factory: Callable[..., nn.Module]
    input_size: tuple[int, int, int]  # (C, H, W)


def _initialize(model: nn.Module) -> nn.Module:
    """Draws He-normal weights and zero biases; batch norms keep their identity default.

    The scale follows the fan-in because it alone is right for grouped and depthwise convolutions: PyTorch's fan-out
    ignores the groups, and a depthwise layer scaled by it shrinks its output by the square root of the channel count.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


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
    """Residual 1x1-3x3-1x1 block (ResNet-50 v1.5: the stride sits on the 3x3)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
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
    """Stem, four stages of residual blocks, global average pool, classifier."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], num_classes: int) -> None:
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
                blocks.append(block(channels, width, stride if index == 0 else 1))
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
    return _initialize(ResNet(BasicBlock, (2, 2, 2, 2), num_classes))


def resnet50(num_classes: int = 1000) -> nn.Module:
    """ResNet-50 v1.5."""
    return _initialize(ResNet(Bottleneck, (3, 4, 6, 3), num_classes))


class FeatureClassifier(nn.Module):
    """Features pooled to a fixed size, then a fully connected classifier: the shape of AlexNet and VGG."""

    def __init__(self, features: nn.Sequential, pooled: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((pooled, pooled))
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _with_relu(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer, nn.ReLU(inplace=True)


def alexnet(num_classes: int = 1000) -> nn.Module:
    """AlexNet as in torchvision: one column, no groups, no LRN."""
    features = nn.Sequential(
        *_with_relu(nn.Conv2d(3, 64, 11, stride=4, padding=2)),
        nn.MaxPool2d(3, stride=2),
        *_with_relu(nn.Conv2d(64, 192, 5, padding=2)),
        nn.MaxPool2d(3, stride=2),
        *_with_relu(nn.Conv2d(192, 384, 3, padding=1)),
        *_with_relu(nn.Conv2d(384, 256, 3, padding=1)),
        *_with_relu(nn.Conv2d(256, 256, 3, padding=1)),
        nn.MaxPool2d(3, stride=2),
    )
    classifier = nn.Sequential(
        nn.Dropout(),
        *_with_relu(nn.Linear(256 * 6 * 6, 4096)),
        nn.Dropout(),
        *_with_relu(nn.Linear(4096, 4096)),
        nn.Linear(4096, num_classes),
    )
    return _initialize(FeatureClassifier(features, 6, classifier))


def _vgg(num_classes: int, batch_norm: bool) -> nn.Module:
    features: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            features.append(nn.Conv2d(channels, width, 3, padding=1))
            features.extend(_with_relu(nn.BatchNorm2d(width)) if batch_norm else [nn.ReLU(inplace=True)])
            channels = width
        features.append(nn.MaxPool2d(2, stride=2))
    classifier = nn.Sequential(
        *_with_relu(nn.Linear(512 * 7 * 7, 4096)),
        nn.Dropout(),
        *_with_relu(nn.Linear(4096, 4096)),
        nn.Dropout(),
        nn.Linear(4096, num_classes),
    )
    return _initialize(FeatureClassifier(nn.Sequential(*features), 7, classifier))


def vgg16(num_classes: int = 1000) -> nn.Module:
    """VGG-16."""
    return _vgg(num_classes, batch_norm=False)


def vgg16_bn(num_classes: int = 1000) -> nn.Module:
    """VGG-16 with a batch norm after every convolution."""
    return _vgg(num_classes, batch_norm=True)


def caffenet(num_classes: int = 1000) -> nn.Module:
    """The BVLC reference CaffeNet, for 227 x 227 inputs: AlexNet with two groups and each pool before its norm."""
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 96, 11, stride=4),
        relu1=nn.ReLU(inplace=True),
        pool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        norm1=nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0),
        conv2=nn.Conv2d(96, 256, 5, padding=2, groups=2),
        relu2=nn.ReLU(inplace=True),
        pool2=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        norm2=nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0),
        conv3=nn.Conv2d(256, 384, 3, padding=1),
        relu3=nn.ReLU(inplace=True),
        conv4=nn.Conv2d(384, 384, 3, padding=1, groups=2),
        relu4=nn.ReLU(inplace=True),
        conv5=nn.Conv2d(384, 256, 3, padding=1, groups=2),
        relu5=nn.ReLU(inplace=True),
        pool5=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        flatten=nn.Flatten(),
        fc6=nn.Linear(256 * 6 * 6, 4096),
        relu6=nn.ReLU(inplace=True),
        drop6=nn.Dropout(),
        fc7=nn.Linear(4096, 4096),
        relu7=nn.ReLU(inplace=True),
        drop7=nn.Dropout(),
        fc8=nn.Linear(4096, num_classes),
    )
    return _initialize(nn.Sequential(layers))


class BasicConv2d(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four parallel branches, concatenated; `branch3`, the paper's 5x5, is a 3x3 here as in torchvision."""

    def __init__(self, in_channels: int, out1: int, mid3: int, out3: int, mid5: int, out5: int, pool: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(in_channels, out1, 1)
        self.branch2 = nn.Sequential(BasicConv2d(in_channels, mid3, 1), BasicConv2d(mid3, out3, 3, padding=1))
        self.branch3 = nn.Sequential(BasicConv2d(in_channels, mid5, 1), BasicConv2d(mid5, out5, 3, padding=1))
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

    def __init__(self, num_classes: int, aux_logits: bool, transform_input: bool) -> None:
        super().__init__()
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.conv1 = BasicConv2d(3, 64, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, 1)
        self.conv3 = BasicConv2d(64, 192, 3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
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


def googlenet(num_classes: int = 1000, aux_logits: bool = False, transform_input: bool = False) -> nn.Module:
    """GoogLeNet; torchvision's ImageNet checkpoint wants both flags True."""
    return _initialize(GoogLeNet(num_classes, aux_logits, transform_input))


def _conv_bn_relu6(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise, project by a linear 1x1; residual where the shape is kept."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        expand = [_conv_bn_relu6(in_channels, hidden, 1)] if expand_ratio != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.use_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1.0."""

    # (expansion, channels, blocks, stride of the first block), table 2 of the paper (arXiv:1801.04381)
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        features: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, stride=2)]
        channels = 32
        for expand_ratio, width, depth, stride in self.STAGES:
            for index in range(depth):
                features.append(InvertedResidual(channels, width, stride if index == 0 else 1, expand_ratio))
                channels = width
        features.append(_conv_bn_relu6(channels, 1280, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def mobilenet_v2(num_classes: int = 1000) -> nn.Module:
    """MobileNetV2."""
    return _initialize(MobileNetV2(num_classes))


NETWORKS: dict[str, Network] = {
    "alexnet": Network(alexnet, (3, 224, 224)),
    "caffenet": Network(caffenet, (3, 227, 227)),
    "googlenet": Network(googlenet, (3, 224, 224)),
    "mobilenet_v2": Network(mobilenet_v2, (3, 224, 224)),
    "resnet18": Network(resnet18, (3, 224, 224)),
    "resnet50": Network(resnet50, (3, 224, 224)),
    "vgg16": Network(vgg16, (3, 224, 224)),
    "vgg16_bn": Network(vgg16_bn, (3, 224, 224)),
}
