"""What is computed number by number."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.tensors import dtype_of
from escort.integrations.onnx.values import Operand, Value

_Function = Callable[[Node], Any]


def unary(function: Callable[..., Any]) -> _Function:
    """A function of one tensor without attributes."""
    return lambda node: node.call(function, node.x)


def scalar(operand: Any, beside: Any) -> Any:
    """A constant of one number as that number, where that changes neither shape nor type of what is computed."""
    if isinstance(operand, Tensor) and isinstance(beside, Value) and operand.numel() == 1:
        example = beside.examples[0]
        if isinstance(example, Tensor) and operand.ndim <= example.ndim and operand.dtype == example.dtype:
            return operand.item() if example.dtype.is_floating_point or example.dtype == torch.int64 else operand
    return operand


def binary(function: Callable[..., Any], commutes: bool = False) -> _Function:
    """A function of two tensors. torch takes a number for the second of them."""

    def mapped(node: Node) -> Operand:
        a, b = node.input(0), node.input(1)
        if commutes and (isinstance(a, Tensor) or is_number(a)) and isinstance(b, Value):
            a, b = b, a
        if is_number(a):
            raise NotSupportedError("it computes a map of a size of the input; export the network with fixed sizes")
        return node.call(function, a, scalar(b, a))

    return mapped


def is_number(operand: Any) -> bool:
    """Whether an operand is a number that comes of sizes."""
    return isinstance(operand, Value) and not isinstance(operand.examples[0], Tensor)


def _dtype(*operands: Any) -> torch.dtype:
    """The type that operands have; numbers of sizes are whole."""
    for operand in operands:
        example = operand.examples[0] if isinstance(operand, Value) else operand
        if isinstance(example, Tensor):
            return example.dtype
    return torch.int64


def tensors_only(function: Callable[..., Any]) -> _Function:
    """A function of two tensors that takes no numbers."""
    return lambda node: node.call(function, node.input(0), node.input(1))


def divide(node: Node) -> Operand:
    if _dtype(node.input(0), node.input(1)).is_floating_point:
        return binary(torch.div)(node)
    return node.call(torch.div, node.input(0), node.input(1), rounding_mode="trunc")


def modulo(node: Node) -> Operand:
    """The sign is that of the divisor, or with `fmod` that of the dividend."""
    return binary(torch.fmod if node.get("fmod", 0) else torch.remainder)(node)


def power(node: Node) -> Operand:
    """Of the type of the base."""
    base, exponent = node.input(0), node.input(1)
    dtype = _dtype(base)
    if isinstance(exponent, Tensor) and exponent.numel() == 1 and exponent.ndim == 0 and dtype.is_floating_point:
        return node.call(torch.pow, base, exponent.item())
    result = node.call(torch.pow, base, exponent)
    return result if _dtype(result) == dtype else convert(node, result, dtype)


def convert(node: Node, x: Any, dtype: torch.dtype) -> Any:
    """x in another type."""
    if isinstance(x, Tensor):
        return node.call(lambda x: x.to(dtype), x)
    if isinstance(x, Value) and not isinstance(x.examples[0], Tensor):
        raise NotSupportedError(
            "it makes a tensor of sizes of the input; export the network with inputs of fixed sizes"
        )
    return x if x.dtype == dtype else node.builder.method("to", x, dtype)


def cast(node: Node) -> Operand:
    return convert(node, node.x, dtype_of(node.get("to")))


def cast_like(node: Node) -> Operand:
    return convert(node, node.x, _dtype(node.input(1)))


def many(function: Callable[..., Any]) -> _Function:
    """A function of two tensors, over any number of them."""

    def mapped(node: Node) -> Operand:
        operands = [node.input(index) for index in range(node.arity)]
        return reduce(lambda a, b: node.call(function, a, b), operands)

    return mapped


def mean(node: Node) -> Operand:
    return node.call(torch.div, many(torch.add)(node), node.arity)


def clip(node: Node) -> Operand:
    """Bounds are attributes or inputs, and may be left out."""
    x: Any = node.x
    low, high = node.get("min", None), node.get("max", None)
    if node.is_constant(1) or node.is_constant(2) or not (node.has(1) or node.has(2)):
        low = node.number(1, "lower bound") if node.is_constant(1) else low
        high = node.number(2, "upper bound") if node.is_constant(2) else high
        match low, high:
            case None, None:
                pass
            case 0, None:
                x = node.call(F.relu, x)
            case 0, 6:
                x = node.call(F.relu6, x)
            case _ if low is not None and high is not None and low > high:
                x = node.call(torch.clamp, x, high, high)
            case _:
                x = node.call(torch.clamp, x, low, high)
    if node.has(1) and not node.is_constant(1):
        x = node.call(torch.maximum, x, node.input(1))
    if node.has(2) and not node.is_constant(2):
        x = node.call(torch.minimum, x, node.input(2))
    return x


def where(node: Node) -> Operand:
    return node.call(torch.where, node.input(0), node.input(1), node.input(2))


def prelu(node: Node) -> Operand:
    """Slopes of channels are torch's; others are applied by hand."""
    x, slope = node.variable(), node.input(1)
    if isinstance(slope, Tensor):
        is_of_channels = slope.ndim >= x.ndim - 1 and slope.numel() == slope.reshape(-1).shape[0]
        sizes = (*(1,) * (x.ndim - slope.ndim), *slope.shape)
        if slope.numel() == 1 or (is_of_channels and x.ndim > 1 and slope.numel() == sizes[1]):
            return node.call(F.prelu, x, node.derived(slope.reshape(-1), slope))
    negative = node.call(torch.minimum, x, torch.zeros((), dtype=x.dtype))
    return node.call(torch.add, node.call(F.relu, x), node.call(torch.mul, negative, slope))


def hard_sigmoid(node: Node) -> Operand:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if np.float32(alpha) == np.float32(1 / 6) and beta == 0.5:
        return node.call(F.hardsigmoid, node.x)
    line = node.call(torch.add, node.call(torch.mul, node.x, alpha), beta)
    return node.call(torch.clamp, line, 0.0, 1.0)


def gelu(node: Node) -> Operand:
    return node.call(F.gelu, node.x, approximate=node.text("approximate", "none", "none tanh"))


def swish(node: Node) -> Operand:
    alpha = node.get("alpha", 1.0)
    if alpha == 1.0:
        return node.call(F.silu, node.x)
    return node.call(torch.mul, node.x, node.call(torch.sigmoid, node.call(torch.mul, node.x, alpha)))


def selu(node: Node) -> Operand:
    alpha, gamma = node.get("alpha", 1.6732632), node.get("gamma", 1.0507010)
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.050701) < 1e-6:
        return node.call(F.selu, node.x)
    return node.call(torch.mul, node.call(F.elu, node.x, alpha), gamma)


def shrink(node: Node) -> Operand:
    """What lies further from zero than `lambd` comes nearer by `bias`."""
    x, bias, threshold = node.x, node.get("bias", 0.0), node.get("lambd", 0.5)
    if bias == 0.0:
        return node.call(F.hardshrink, x, threshold)
    low = node.call(torch.where, node.call(torch.lt, x, -threshold), node.call(torch.add, x, bias), _zero(x))
    return node.call(torch.where, node.call(torch.gt, x, threshold), node.call(torch.sub, x, bias), low)


def _zero(x: Any) -> Tensor:
    return torch.zeros((), dtype=_dtype(x))


def is_infinite(node: Node) -> Operand:
    x, positive, negative = node.x, node.get("detect_positive", 1), node.get("detect_negative", 1)
    if positive and negative:
        return node.call(torch.isinf, x)
    if not positive and not negative:
        return node.call(torch.ne, x, x) if not _dtype(x).is_floating_point else node.call(torch.lt, x, -torch.inf)
    return node.call(torch.eq, x, torch.inf if positive else -torch.inf)


def threshold(node: Node) -> Operand:
    alpha = node.get("alpha", 1.0)
    return node.call(F.threshold, node.x, alpha, 0.0)


def softplus(node: Node) -> Operand:
    return node.call(F.softplus, node.x)


def celu(node: Node) -> Operand:
    return node.call(F.celu, node.x, node.get("alpha", 1.0))


def elu(node: Node) -> Operand:
    return node.call(F.elu, node.x, node.get("alpha", 1.0))


def leaky_relu(node: Node) -> Operand:
    return node.call(F.leaky_relu, node.x, node.get("alpha", 0.01))


def identity(node: Node) -> Operand:
    return node[0]


def dropout(node: Node) -> Any:
    """Nothing is dropped in inference, and the mask says so."""
    if node.has(2) and node.number(2, "training mode"):
        raise NotSupportedError("it is in training mode; export the network in eval mode")
    return (node[0], node.call(torch.ones_like, node.x, dtype=torch.bool)) if node.wants(1) else node[0]


OPERATORS: dict[str, _Function] = {
    **{
        name: unary(getattr(torch, name.lower()))
        for name in "Abs Acos Asin Atan Ceil Cos Cosh Erf Exp Floor Log Neg Reciprocal Round Sigmoid Sign Sin Sinh "
        "Sqrt Tan Tanh IsNaN".split()
    },
    **{name: unary(function) for name, function in (("Relu", F.relu), ("Not", torch.logical_not), ("Mish", F.mish))},
    **{name: unary(function) for name, function in (("HardSwish", F.hardswish), ("Softsign", F.softsign))},
    **{name: binary(getattr(torch, name.lower()), commutes=True) for name in ("Add", "Mul")},
    "Sub": binary(torch.sub),
    **{
        name: binary(function)
        for name, function in (
            *(("Equal", torch.eq), ("Greater", torch.gt), ("Less", torch.lt)),
            *(("GreaterOrEqual", torch.ge), ("LessOrEqual", torch.le)),
        )
    },
    **{name: tensors_only(getattr(torch, f"logical_{name.lower()}")) for name in ("And", "Or", "Xor")},
    **{name: many(function) for name, function in (("Max", torch.maximum), ("Min", torch.minimum), ("Sum", torch.add))},
    "Div": divide,
    "Mod": modulo,
    "Pow": power,
    "Mean": mean,
    "Cast": cast,
    "CastLike": cast_like,
    "Clip": clip,
    "Where": where,
    "PRelu": prelu,
    "HardSigmoid": hard_sigmoid,
    "Gelu": gelu,
    "Swish": swish,
    "Selu": selu,
    "Celu": celu,
    "Elu": elu,
    "LeakyRelu": leaky_relu,
    "Softplus": softplus,
    "ThresholdedRelu": threshold,
    "Shrink": shrink,
    "IsInf": is_infinite,
    "Identity": identity,
    "Dropout": dropout,
}
