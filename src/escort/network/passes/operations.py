"""What the nodes of a graph do, however it is spelled, and what passes replace them by."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from escort.runtime.stand_in import runs_more

aten = torch.ops.aten

# What is understood, however it is spelled: as a module, a function, an exported operator or, as a string, a method.
# The names are those of the positional arguments and, but for the first, of the module's attributes.
CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_FUNCTIONAL_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_FROZEN_NORM = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
#: The arguments of a norm that are tensors.
TENSORS = ("weight", "bias", "running_mean", "running_var")
#: The norm of a decomposed program, which returns (output, saved mean, saved deviation), the last two empty.
FROZEN = aten._native_batch_norm_legit_no_training.default
_FUNCTIONAL_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_EXPORTED_CONVS = tuple(
    overload for conv in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (conv.default, conv.padding)
)
_FUNCTIONAL_TRANSPOSES = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_EXPORTED_TRANSPOSES = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_ADDS = (torch.add, operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor, "add", "add_")
_RELUS = (nn.ReLU, F.relu, torch.relu, torch.relu_, aten.relu.default, aten.relu_.default, "relu", "relu_")
_HARDTANHS = (nn.Hardtanh, F.hardtanh, F.hardtanh_, aten.hardtanh.default, aten.hardtanh_.default)
_CLAMPS = (torch.clamp, torch.clamp_, torch.clip, aten.clamp.default, aten.clamp_.default, "clamp", "clamp_", "clip")
_CLAMP_MINS = (torch.clamp_min, torch.clamp_min_, aten.clamp_min.default, "clamp_min", "clamp_min_")
_CLAMP_MAXES = (torch.clamp_max, torch.clamp_max_, aten.clamp_max.default, "clamp_max", "clamp_max_")
_OTHER_ACTIVATIONS = (
    *(nn.CELU, nn.ELU, nn.Mish, nn.SELU, nn.Softplus, F.elu, F.mish, F.selu, F.softplus),
    *(aten.elu.default, aten.mish.default),
)
_SIGMOIDS = (
    *(nn.Sigmoid, torch.sigmoid, torch.sigmoid_, F.sigmoid, aten.sigmoid.default, aten.sigmoid_.default),
    *("sigmoid", "sigmoid_"),
)
_TANHS = (
    *(nn.Tanh, torch.tanh, torch.tanh_, F.tanh, aten.tanh.default, aten.tanh_.default),
    *("tanh", "tanh_"),
)
_LEAKY_RELUS = (nn.LeakyReLU, F.leaky_relu, F.leaky_relu_, aten.leaky_relu.default, aten.leaky_relu_.default)
_PRELUS = (nn.PReLU, F.prelu, torch.prelu, aten.prelu.default, "prelu")
_PRODUCTS = (torch.mul, operator.mul, operator.imul, aten.mul.Tensor, aten.mul_.Tensor, "mul", "mul_")
_QUOTIENTS = (torch.div, torch.true_divide, operator.truediv, operator.itruediv, aten.div.Tensor, "div", "div_")
_DIFFERENCES = (torch.sub, operator.sub, operator.isub, aten.sub.Tensor, aten.sub_.Tensor, "sub", "sub_")
_SPELLINGS: dict[tuple[str, tuple[str, ...]], tuple[Any, ...]] = {
    ("conv", CONV): (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_FUNCTIONAL_CONVS, *_EXPORTED_CONVS),
    ("conv", _CONVOLUTION): (aten.convolution.default,),
    ("transposed", TRANSPOSED): (
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(*_FUNCTIONAL_TRANSPOSES, *_EXPORTED_TRANSPOSES),
    ),
    ("linear", ("input", "weight", "bias")): (nn.Linear, F.linear, aten.linear.default),
    ("norm", _NORM): (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, torch.batch_norm, aten.batch_norm.default),
    ("norm", _FUNCTIONAL_NORM): (F.batch_norm,),
    ("norm", _FROZEN_NORM): (FROZEN,),
    ("add", ("input", "other")): _ADDS,
    ("relu", ("input",)): _RELUS,
    ("relu6", ("input",)): (nn.ReLU6, F.relu6, aten.relu6.default, aten.relu6_.default),
    ("hardtanh", ("input", "min_val", "max_val")): _HARDTANHS,
    ("clamp", ("input", "min", "max")): _CLAMPS,
    ("clamp", ("input", "min")): _CLAMP_MINS,
    ("clamp", ("input", "max")): _CLAMP_MAXES,
    ("leaky_relu", ("input", "negative_slope")): _LEAKY_RELUS,
    ("prelu", ("input", "weight")): _PRELUS,
    ("sigmoid", ("input",)): _SIGMOIDS,
    ("tanh", ("input",)): _TANHS,
    ("silu", ("input",)): (nn.SiLU, F.silu, aten.silu.default, aten.silu_.default),
    ("gelu", ("input", "approximate")): (nn.GELU, F.gelu, aten.gelu.default, aten.gelu_.default),
    ("hardsigmoid", ("input",)): (nn.Hardsigmoid, F.hardsigmoid, aten.hardsigmoid.default, aten.hardsigmoid_.default),
    ("hardswish", ("input",)): (nn.Hardswish, F.hardswish, aten.hardswish.default, aten.hardswish_.default),
    ("pointwise", ("input",)): _OTHER_ACTIVATIONS,
    ("product", ("input", "other")): _PRODUCTS,
    ("quotient", ("input", "other")): _QUOTIENTS,
    ("pointwise", ("input", "other")): _DIFFERENCES,
    ("pad", ("input", "pad", "mode", "value")): (F.pad, aten.pad.default),
    ("pad", ("input", "pad", "value")): (torch.constant_pad_nd, aten.constant_pad_nd.default),
    ("pad", ("input", "padding", "value")): (
        *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    ),
    ("identity", ("input", "training")): (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    ("identity", ("input", "p", "training")): (
        *(F.dropout, F.dropout1d, F.dropout2d, aten.dropout.default, aten.feature_dropout.default),
    ),
}
#: Operations that compute each number from those at the same place of their operands.
POINTWISE = frozenset(
    "add relu relu6 hardtanh leaky_relu sigmoid tanh silu gelu hardsigmoid hardswish product pointwise".split()
)
#: By module type, function or method: the name of the operation and the names of its arguments.
OPERATIONS = {spelling: key for key, spellings in _SPELLINGS.items() for spelling in spellings}
_VIEWS = frozenset(
    """
    chunk contiguous data detach diagonal expand expand_as flatten flip float getattr getitem half movedim moveaxis
    narrow permute ravel real reshape reshape_as select split squeeze swapaxes swapdims t tensor_split to transpose
    type_as unbind unflatten unfold unsqueeze view view_as
    """.split()
)
_INPLACE_OPERATOR = re.compile(r"i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|matmul)|setitem|.*[^_]_")


def mutates(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node of a network's graph writes to one of its inputs, or has another effect than its result.

    Code of the model's own, in a module or a hook, may do so.
    """
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        is_known = type(module).__module__.startswith(("torch.", "escort.")) and not isinstance(module, fx.GraphModule)
        return not is_known or runs_more(module) or bool(getattr(module, "inplace", False))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.op not in ("call_function", "call_method"):
        return False
    name = getattr(node.target, "__name__", node.target)
    return bool(_INPLACE_OPERATOR.fullmatch(str(name)) or node.kwargs.get("inplace") or "out" in node.kwargs)


def may_be_view(node: fx.Node) -> bool:
    """Whether what a node computes may lie in the memory of what it computes with."""
    if isinstance(node.target, torch._ops.OpOverload):
        return any(result.alias_info is not None for result in node.target._schema.returns)
    name = str(getattr(node.target, "__name__", node.target))
    return node.op in ("call_function", "call_method") and name in _VIEWS


def convolution_name(node: fx.Node) -> str:
    """The qualified name of a convolution: its module's or, if it is a function, that of its weight's owner."""
    if node.op == "call_module":
        return str(node.target)
    weight = node.all_input_nodes[1:2]
    while weight and weight[0].op != "get_attr":
        weight = weight[0].all_input_nodes[:1]
    if not weight:
        return node.name
    # The owner of `weight`, `weight_orig` (pruned) or `parametrizations.weight.original`; else the weight itself.
    return re.sub(r"(^|\.)(parametrizations\.weight\..*|weight\w*)$", "", str(weight[0].target)) or "conv"


def takes_output_size(node: fx.Node) -> bool:
    """Whether the call of a transposed convolution's module says how large its result shall be."""
    return len(node.args) > 1 or node.kwargs.get("output_size") is not None


def attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Sets ``root.<name>``, in place of whatever is there."""
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(getattr(root, part, None), nn.Module):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if hasattr(root, leaf):
        delattr(root, leaf)
    root.add_module(leaf, module)


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module where another is, so that a container keeps its order."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def uses_of_paths(network: fx.GraphModule) -> Counter[Any]:
    """How many nodes call the module, or read the tensor, at each path."""
    return Counter(node.target for node in network.graph.nodes if node.op in ("call_module", "get_attr"))


def per_axis(value: Any, default: int, axes: int = 2) -> Any:
    """A number for each axis, given as torch's convolutions take it: one, several, or None; a string as it is."""
    value = default if value is None else value
    if isinstance(value, str):
        return value
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


def zeros_around_maps(arguments: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """The zeros (top, bottom, left, right) that a pad adds around maps; None where it does something else."""
    if arguments.get("mode") not in (None, "constant") or arguments.get("value") not in (None, 0):
        return None
    sizes = arguments.get("pad", arguments.get("padding"))
    if not isinstance(sizes, (list, tuple)) or not all(type(size) is int and size >= 0 for size in sizes):
        return None
    left, right, top, bottom = [*sizes, 0, 0, 0, 0][:4]
    return None if any(sizes[4:]) else (top, bottom, left, right)


def new_conv2d(weight: Tensor, bias: Tensor | None, *geometry: Any) -> nn.Conv2d:
    """A convolution that shares `weight` and `bias`; geometry: stride, padding, dilation, groups or None."""
    stride, padding, dilation = (per_axis(value, default) for value, default in zip(geometry, (1, 0, 1), strict=False))
    groups = geometry[3] or 1
    out_channels, in_channels, *kernel_size = weight.shape
    channels = in_channels * groups, out_channels
    conv = nn.Conv2d(*channels, (kernel_size[0], kernel_size[1]), stride, padding, dilation, groups, device="meta")
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return conv


def fold_scale(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> bool:
    """Turns `conv` into ``conv * scale + shift``, both (K,) float64, rounding once.

    False, and `conv` stays as it is, where its type does not hold the result: float16 ends at 65504.
    """
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    weight = conv.weight.double() * scale[:, None, None, None]
    scaled = [tensor.to(conv.weight.dtype) for tensor in (weight, bias)]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in scaled):
        return False
    conv.weight, conv.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in scaled)
    return True
