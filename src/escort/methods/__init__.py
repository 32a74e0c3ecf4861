"""The ways to run a convolution; the planner iterates over METHODS and knows none of them by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from escort.methods.base import Config, Method, Prepared, Runner
from escort.methods.cpu.dense import Dense
from escort.methods.cpu.depthwise import Depthwise
from escort.methods.cpu.direct import Direct
from escort.methods.cpu.linear import Linear
from escort.methods.cpu.lowered import Lowered
from escort.methods.cuda.cublas import Cublas
from escort.methods.cuda.cudnn import Cudnn
from escort.methods.cuda.cudnn_graph import CudnnGraph
from escort.methods.cuda.cusparse import Cusparse
from escort.methods.cuda.depthwise import DepthwiseCuda
from escort.methods.cuda.depthwise_tc import DepthwiseTc
from escort.methods.cuda.direct import DirectCuda
from escort.methods.cuda.gemv import Gemv
from escort.methods.cuda.generated import Generated
from escort.methods.cuda.sparse_tc import SparseTc
from escort.methods.cuda.stem import Stem
from escort.problem import Precision

METHODS: tuple[Method, ...] = (
    Direct(),
    Depthwise(),
    Linear(),
    Dense(),
    Lowered(),
    DirectCuda(),
    Generated(),
    SparseTc(),
    DepthwiseCuda(),
    DepthwiseTc(),
    Stem(),
    Gemv(),
    Cudnn(),
    CudnnGraph(),
    Cublas(),
    Cusparse(),
)


def by_name(name: str, device: str = "cpu") -> Method:
    """The method of that name on a device ("cpu", "cuda:0"), also one of which something is missing here.

    Raises ValueError that names the methods there are.
    """
    methods = {method.name: method for method in METHODS if method.device_type == device.partition(":")[0]}
    if name not in methods:
        raise ValueError(f"no method {name!r} on {device}; there are {', '.join(methods)}")
    return methods[name]


def for_device(device: str) -> tuple[Method, ...]:
    """The methods that run on a device ("cpu", "cuda:0") and of which nothing is missing here."""
    device_type = device.partition(":")[0]
    return tuple(method for method in METHODS if method.device_type == device_type and method.missing() is None)


def dense_for(device: str) -> Method:
    """The method that stands for the dense model on a device."""
    return next(method for method in for_device(device) if method.is_dense)


def channel_order(weights: Sequence[torch.Tensor], precision: Precision, device: str) -> torch.Tensor | None:
    """The order of the input channels of weights (K, C, R, S) that suits a device's methods best, (C,) int64.

    The weights read the same tensor. None where no method of the device gains by an order.
    """
    orders = (method.channel_order(weights, precision) for method in for_device(device))
    return next((order for order in orders if order is not None), None)


__all__ = [
    "METHODS",
    "Config",
    "Method",
    "Prepared",
    "Runner",
    "by_name",
    "channel_order",
    "dense_for",
    "for_device",
]
