"""The layers of a converted network, each an operator of torch and the module that calls it."""

from escort.layers.nn import MaxPool2d, SparseConv2d

__all__ = ["MaxPool2d", "SparseConv2d"]
