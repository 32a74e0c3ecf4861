"""The layers of a converted network, each an operator of torch and the module that calls it."""

from escort.layers.conv import SparseConv2d
from escort.layers.fused import FusedConv2d
from escort.layers.pool import MaxPool2d

__all__ = ["FusedConv2d", "MaxPool2d", "SparseConv2d"]
