"""The graph of a network as JSON: the steps of its forward. Reading it back runs nothing that it names.

What a graph may call is a closed list. fx writes names and arguments into the source of a forward, so that names must
be plain labels and arguments plain values, whose `repr` is theirs and nothing else.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from escort.artifact.arguments import decode, encode

aten = torch.ops.aten

_OPERATORS = """
abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv imod imul invert ior ipow isub itruediv ixor le lt matmul mod
mul ne neg not_ or_ pos pow sub truediv xor
""".split()
_MATHS = "ceil floor log log2 prod sqrt".split()
# Computations on tensors that have the same name and meaning in torch, as methods and in torch.ops.aten.
_TENSOR = """
abs acos add addcdiv addcmul addmm all alias amax amin any arange argmax argmin argsort asin atan atan2 avg_pool1d
baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm broadcast_to cat ceil channel_shuffle chunk clamp clamp_max
clamp_min clone concat contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
cos cosh count_nonzero cumprod cumsum detach diff div einsum eq erf erfc exp expand expm1 flatten flip floor
floor_divide fmod frac full full_like gather ge greater gt hardshrink hstack index_select instance_norm isfinite isinf
isnan layer_norm le lerp less linspace log log10 log1p log2 log_softmax logical_and logical_not logical_or logical_xor
logsumexp lt masked_fill matmul max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid min minimum mm
moveaxis movedim mul narrow ne neg norm numel ones ones_like outer permute pixel_shuffle pixel_unshuffle pow prelu
prod ravel reciprocal relu remainder reshape rms_norm roll rot90 round rsqrt rsub scalar_tensor
scatter select selu sigmoid sign sin sinh slice softmax sort split split_with_sizes sqrt square squeeze stack std sub
sum swapaxes swapdims t take_along_dim tan tanh tensordot tile topk transpose tril triu true_divide trunc unbind
unflatten unsqueeze var var_mean vstack where zeros zeros_like
""".split()
_FUNCTIONALS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout
avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear celu channel_shuffle conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d dropout dropout1d dropout2d dropout3d elu embedding feature_alpha_dropout fold gelu
glu grid_sample group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu
linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d mish normalize
pad pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm scaled_dot_product_attention selu sigmoid silu softmax
softmin softplus softshrink softsign tanh tanhshrink threshold unfold
""".split()
# What torch.export writes besides, and methods that are no functions.
_ATEN = """
_adaptive_avg_pool2d _log_softmax _softmax _to_copy constant_pad_nd lift_fresh_copy max_pool2d_with_indices sym_size to
upsample_bicubic2d upsample_bilinear2d upsample_nearest2d view
""".split()
_METHODS = """
bfloat16 bool cpu dim double expand_as float half int long masked_fill_ ndimension new_full new_ones new_zeros repeat
reshape_as size to type_as unfold view view_as
""".split()
_INPLACE = """
abs_ add_ addcdiv_ addcmul_ ceil_ celu_ clamp_ clamp_max_ clamp_min_ div_ elu_ exp_ floor_ fmod_ hardsigmoid_ hardswish_
hardtanh_ leaky_relu_ log_ mul_ neg_ pow_ reciprocal_ relu6_ relu_ remainder_ round_ rsqrt_ selu_ sigmoid_ silu_ sqrt_
square_ squeeze_ sub_ tanh_ transpose_ unsqueeze_
""".split()
_ATTRIBUTES = frozenset(("T", "device", "dtype", "itemsize", "mT", "ndim", "shape"))


def _functions() -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {"getattr": getattr, "torch._assert": torch._assert}
    for prefix, module, names in (
        ("operator", operator, _OPERATORS),
        ("math", math, _MATHS),
        ("torch", torch, _TENSOR + _INPLACE),
        ("torch.nn.functional", F, _FUNCTIONALS + _INPLACE),
    ):
        functions |= {f"{prefix}.{name}": getattr(module, name) for name in names if hasattr(module, name)}
    for name in {*_TENSOR, *_FUNCTIONALS, *_ATEN, *_INPLACE}:
        if hasattr(aten, name):
            packet = getattr(aten, name)
            overloads = (overload for overload in packet.overloads() if not overload.endswith("out"))
            functions |= {f"torch.ops.aten.{name}.{overload}": getattr(packet, overload) for overload in overloads}
    return functions


#: What a node may call, and under which names: functions by qualified name, methods of tensors.
FUNCTIONS = _functions()
METHODS = frozenset(_TENSOR + _METHODS + _INPLACE)
_FUNCTION_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}

# A label is an identifier in ASCII that does not begin like Python's own `__names__`. In a path, the numbered children
# of a container are labels too.
_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"(?!__)[A-Za-z0-9_]+(\.(?!__)[A-Za-z0-9_]+)*")
_RESERVED = frozenset(dir(fx.GraphModule({}, fx.Graph())))
# The source of a forward uses these names; a node or an input of such a name would stand in their place.
_TAKEN = frozenset("self torch operator math device inf nan getattr slice".split())
_MOST_POWER = 64  # the largest constant exponent of a power


def describe_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph in order. Raises ValueError naming the node that cannot be saved."""
    if type(graph._codegen) is not fx.graph.CodeGen:
        raise ValueError(
            "its inputs or outputs are packed; pass tensors one by one and convert fx.symbolic_trace(model)"
        )
    nodes = []
    for node in graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = _FUNCTION_NAMES.get(target, torch.typename(target))
        try:
            args, kwargs = [encode(value) for value in node.args], {k: encode(v) for k, v in node.kwargs.items()}
            record = {"op": node.op, "name": node.name, "target": target, "args": args, "kwargs": kwargs}
            _check_node(record)
        except ValueError as error:
            raise ValueError(f"node {node.name}: {error}") from error
        nodes.append(record)
    return nodes


def build_graph(records: list[Mapping[str, Any]], roots: Mapping[str, Any]) -> fx.GraphModule:
    """The graph behind :func:`describe_graph`. It calls the layers and reads the tensors in `roots`.

    Raises:
        ValueError, KeyError, TypeError: naming the node that is no part of a valid graph.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for record in records:
        _check_node(record)
        op, name, target = record["op"], record["name"], record["target"]
        if op in ("call_module", "get_attr") and target not in roots:
            raise ValueError(f"node {name}: there is no {target}")
        if name in nodes:
            raise ValueError(f"there are two nodes {name}")
        args = tuple(decode(value, nodes) for value in record["args"])
        kwargs = {key: decode(value, nodes) for key, value in record["kwargs"].items()}
        nodes[name] = graph.create_node(op, FUNCTIONS[target] if op == "call_function" else target, args, kwargs, name)
    if [record["op"] for record in records].index("output") != len(records) - 1:
        raise ValueError("a graph ends in its only output")
    graph.lint()
    return fx.GraphModule(dict(roots), graph).eval()


def check_path(path: str) -> None:
    """Raises ValueError unless this can name a layer or a tensor of a network."""
    if not isinstance(path, str) or not _PATH.fullmatch(path) or not _RESERVED.isdisjoint(path.split(".")):
        raise ValueError(f"{path!r} cannot name a layer or tensor of a saved network; rename it")


def _check_node(record: Mapping[str, Any]) -> None:
    """Raises ValueError for a node that is not allowed.

    fx writes names, targets and keywords into source, so that none of them may be more than it pretends to be.
    """
    op, name, target, args, kwargs = (record[key] for key in ("op", "name", "target", "args", "kwargs"))
    for label in (name, *kwargs):
        if not _is_label(label) or (label == name and label in _TAKEN):
            raise ValueError(f"{label!r} cannot be a name in a saved graph; rename it")
    if "out" in kwargs:
        raise ValueError("a call that writes to out= cannot be saved; use its result instead")
    if op in ("call_module", "get_attr"):
        check_path(target)
    elif op == "placeholder":
        if not _is_label(target.lstrip("*")) or target.lstrip("*") in _TAKEN:
            raise ValueError(f"{target!r} cannot name an input; rename it")
    elif op == "call_function" and target == "getattr":
        if kwargs or len(args) != 2 or args[1] not in _ATTRIBUTES:
            raise ValueError(f"of a tensor's attributes a saved graph may read {', '.join(sorted(_ATTRIBUTES))} only")
    elif not (
        (op == "call_function" and target in FUNCTIONS)
        or (op == "call_method" and target in METHODS)
        or (op, target) == ("output", "output")
    ):
        raise ValueError(
            f"{op} of {target} cannot be saved; compute it with functions of torch or torch.nn.functional, or outside "
            "the model"
        )
    if op == "call_function" and target.startswith(("operator.", "math.")):
        _check_arithmetic(record)


def _is_label(text: str) -> bool:
    return isinstance(text, str) and _IDENTIFIER.fullmatch(text) is not None and not keyword.iskeyword(text)


def _check_arithmetic(record: Mapping[str, Any]) -> None:
    """Raises ValueError where an operator of Python could run forever, as it can on constants and on sequences."""
    target, args = record["target"], record["args"]
    if record["kwargs"] or not _has_node(args) or any(isinstance(arg, str) for arg in args):
        raise ValueError(f"{target} computes with constants alone or with text; compute it before converting")
    if target in ("operator.mul", "operator.imul") and any(
        isinstance(arg, list | dict) and not _is_scalar(arg) for arg in args
    ):
        raise ValueError(f"{target} repeats a sequence; write it out before converting")
    if target in ("operator.pow", "operator.ipow"):
        exponent = args[1]
        if not isinstance(exponent, int | float) or not abs(exponent) <= _MOST_POWER:
            raise ValueError(f"{target} takes an exponent of at most {_MOST_POWER}; use torch.pow")


def _has_node(data: Any) -> bool:
    """Whether an encoded argument refers to a node."""
    if isinstance(data, dict):
        return "node" in data or any(map(_has_node, data.values()))
    return isinstance(data, list) and any(map(_has_node, data))


def _is_scalar(data: Any) -> bool:
    return isinstance(data, dict) and [*data] in (["node"], ["float"])
