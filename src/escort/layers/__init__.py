"""The layers of a converted network: what computes is an operator of torch and the module that calls it."""

from escort.layers.average import AdaptiveAvgPool2d, AvgPool2d
from escort.layers.concat import Concat
from escort.layers.conv import SparseConv2d
from escort.layers.fused import FusedConv2d
from escort.layers.gate import Gate
from escort.layers.norm import LocalResponseNorm
from escort.layers.pad import SamePad
from escort.layers.planes import OnPlanes
from escort.layers.pool import MaxPool2d

#: Layers other than convolutions that launch kernels of our own, and say which: they have `binaries`.
LAUNCHING = MaxPool2d, OnPlanes

__all__ = [
    "LAUNCHING",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "Concat",
    "FusedConv2d",
    "Gate",
    "LocalResponseNorm",
    "MaxPool2d",
    "OnPlanes",
    "SamePad",
    "SparseConv2d",
]
