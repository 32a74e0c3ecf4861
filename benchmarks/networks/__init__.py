"""The networks that are benchmarked, in plain torch.nn.

Modules carry torchvision's state-dict names and compute what torchvision's modules compute, so its checkpoints load
with `load_state_dict`. CaffeNet, which torchvision lacks, is named after the layers of its Caffe prototxt; the detector
and the U-Net have names of their own. All are traceable by torch.fx. Weights are random, scaled to keep activations
finite and alive without trained batch norms.

    >>> from benchmarks.networks import NETWORKS
    >>> network = NETWORKS["resnet50"]
    >>> model = network.factory().eval()
    >>> model(torch.randn(2, *network.input_size)).shape
    torch.Size([2, 1000])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.networks.densenet import densenet121
from benchmarks.networks.efficientnet import efficientnet_b0
from benchmarks.networks.googlenet import googlenet
from benchmarks.networks.mobilenet import mobilenet_v2
from benchmarks.networks.plain import alexnet, caffenet, vgg16, vgg16_bn
from benchmarks.networks.resnet import resnet18, resnet50, resnext50_32x4d
from benchmarks.networks.unet import unet
from benchmarks.networks.yolo import yolo


@dataclass(frozen=True)
class Network:
    """A benchmarked network: how to build it and the size of one input."""

    factory: Callable[..., nn.Module]
    input_size: tuple[int, int, int]  # (C, H, W)


NETWORKS: dict[str, Network] = {
    "alexnet": Network(alexnet, (3, 224, 224)),
    "caffenet": Network(caffenet, (3, 227, 227)),
    "densenet121": Network(densenet121, (3, 224, 224)),
    "efficientnet_b0": Network(efficientnet_b0, (3, 224, 224)),
    "googlenet": Network(googlenet, (3, 224, 224)),
    "mobilenet_v2": Network(mobilenet_v2, (3, 224, 224)),
    "resnet18": Network(resnet18, (3, 224, 224)),
    "resnet50": Network(resnet50, (3, 224, 224)),
    "resnext50_32x4d": Network(resnext50_32x4d, (3, 224, 224)),
    "unet": Network(unet, (3, 512, 512)),
    "vgg16": Network(vgg16, (3, 224, 224)),
    "vgg16_bn": Network(vgg16_bn, (3, 224, 224)),
    "yolo": Network(yolo, (3, 640, 640)),
}
__all__ = [
    "NETWORKS",
    "Network",
    "alexnet",
    "caffenet",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "unet",
    "vgg16",
    "vgg16_bn",
    "yolo",
]
