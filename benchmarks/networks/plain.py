"""Networks that are a sequence of layers: AlexNet, CaffeNet and VGG."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from benchmarks.networks.weights import with_he_weights


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
    return with_he_weights(FeatureClassifier(features, 6, classifier))


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
    return with_he_weights(FeatureClassifier(nn.Sequential(*features), 7, classifier))


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
    return with_he_weights(nn.Sequential(layers))
