"""The layers of a converted network: what computes is an operator of torch and the module that calls it."""

from escort.layers.conv import SparseConv2d
from escort.layers.fused import FusedConv2d
from escort.layers.images import Images
from escort.layers.pad import SamePad
from escort.layers.planes.average import AdaptiveAvgPool2d, AvgPool2d
from escort.layers.planes.base import OnPlanes
from escort.layers.planes.concat import Concat, NormedConcat
from escort.layers.planes.gate import Gate
from escort.layers.planes.linear import FusedLinear
from escort.layers.planes.norm import LocalResponseNorm
from escort.layers.planes.resize import Upsample
from escort.layers.planes.squeeze import Squeeze
from escort.layers.pool import MaxPool2d

#: Layers other than convolutions that launch kernels of our own, and say which: they have `binaries`.
LAUNCHING = MaxPool2d, OnPlanes, Images

__all__ = [
    "LAUNCHING",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "Concat",
    "FusedConv2d",
    "FusedLinear",
    "Gate",
    "Images",
    "LocalResponseNorm",
    "MaxPool2d",
    "NormedConcat",
    "OnPlanes",
    "SamePad",
    "SparseConv2d",
    "Squeeze",
    "Upsample",
]
