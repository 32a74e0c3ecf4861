"""The layers of a converted network: what computes is an operator of torch and the module that calls it."""

from escort.layers.conv import SparseConv2d
from escort.layers.fused import FusedConv2d
from escort.layers.pad import SamePad
from escort.layers.pool import MaxPool2d

__all__ = ["FusedConv2d", "MaxPool2d", "SamePad", "SparseConv2d"]
