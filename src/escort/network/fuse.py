"""Graph passes: a convolution and what runs behind it (batch norm, residual add, activation) become one module.

``fuse(trace(model, example_inputs))`` computes what `model` computes in eval mode, and each 2-d convolution in it is a
:class:`FusedConv2d` under the convolution's own qualified name. The model itself is not touched.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
import traceback
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves

from escort.problem import Activation

aten = torch.ops.aten

# What is understood, however it is spelled: as a module, a function, an exported operator or, as a string, a method.
# The names are those of the positional arguments and, but for the first, of the module's attributes.
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_FUNCTIONAL_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_FROZEN_NORM = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_FROZEN = aten._native_batch_norm_legit_no_training.default
_ADDS = (torch.add, operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor, "add", "add_")
_RELUS = (nn.ReLU, F.relu, torch.relu, torch.relu_, aten.relu.default, aten.relu_.default, "relu", "relu_")
_HARDTANHS = (nn.Hardtanh, F.hardtanh, F.hardtanh_, aten.hardtanh.default, aten.hardtanh_.default)
_SPELLINGS: dict[tuple[str, tuple[str, ...]], tuple[Any, ...]] = {
    ("conv", _CONV): (nn.Conv2d, F.conv2d, aten.conv2d.default, aten.conv2d.padding),
    ("conv", _CONVOLUTION): (aten.convolution.default,),
    ("norm", _NORM): (nn.BatchNorm2d, nn.SyncBatchNorm, torch.batch_norm, aten.batch_norm.default),
    ("norm", _FUNCTIONAL_NORM): (F.batch_norm,),
    ("norm", _FROZEN_NORM): (_FROZEN,),
    ("add", ("input", "other")): _ADDS,
    ("relu", ("input",)): _RELUS,
    ("relu6", ("input",)): (nn.ReLU6, F.relu6, aten.relu6.default, aten.relu6_.default),
    ("hardtanh", ("input", "min_val", "max_val")): _HARDTANHS,
    ("identity", ("input", "training")): (nn.Identity, nn.Dropout, nn.Dropout2d),
}
_OPERATIONS = {spelling: key for key, spellings in _SPELLINGS.items() for spelling in spellings}
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), __file__, "<")  # files in a traceback through a model's forward
_NOT_2D = "it is transposed or not 2-d"
# How far two runs of the same graph may be apart, relative to their size: on a GPU a sum's order is not fixed.
_SAME = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
_INPLACE_OPERATOR = re.compile(r"i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|matmul)|setitem|.*[^_]_")


class Untraceable(Exception):  # noqa: N818 - it says what the model is
    """torch.fx cannot turn this model into a graph; the message says why."""


class FusedConv2d(nn.Module):
    """``activation(conv(x) + residual)`` in plain torch: the unit that conversion replaces.

    Attributes:
        conv: the convolution with any batch norm folded in; its tensors belong to this module alone.
        activation: what runs last.
        residual: whether `forward` is given a second operand.
    """

    def __init__(self, conv: nn.Conv2d, activation: Activation = "none", residual: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.activation: Activation = activation
        self.residual = residual

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W), residual and result: (N, K, out_height, out_width)."""
        y: Tensor = self.conv(x)
        if residual is not None:
            y = y + residual
        if self.activation == "none":
            return y
        return F.relu(y) if self.activation == "relu" else F.relu6(y)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, residual={self.residual}"


def trace(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph of `model` in eval mode, on copies of its weights, each node knowing its shape on the example.

    A model that is a graph already, such as ``torch.export.load(path).module()``, keeps its graph. Arguments of
    `model.forward` beyond the example are fixed at their defaults.

    Raises:
        Untraceable: where control flow depends on the data, or the graph does not compute what the model does.
        torch.OutOfMemoryError: where the device's memory does not hold the copies.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    try:
        copied = plain_copy(model)
        if isinstance(copied, fx.GraphModule):
            graph_module = copied
        else:
            beyond = list(inspect.signature(copied.forward).parameters.values())[len(inputs) :]
            defaults = {p.name: p.default for p in beyond if p.default is not p.empty}
            graph_module = fx.symbolic_trace(copied, defaults or None)
        with torch.no_grad():  # on copies, for an in-place first layer writes into what it is given
            traced = tree_leaves(_Shapes(graph_module).run(*(x.clone() for x in inputs)))
            called = tree_leaves(copied(*(x.clone() for x in inputs)))
        # fx takes `x += y` for `x = x + y`, which differs where x is also known by another name.
        if not all(
            _same(a, b) for a, b in zip(traced, called, strict=True) if isinstance(a, Tensor) and a.is_floating_point()
        ):
            raise ValueError("its graph computes something else, as `x += y` may where x has a second name")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's forward may raise anything
        reason = str(error).strip().partition("\n\n")[0] or type(error).__name__  # fx appends the whole node
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_MODEL)]
        where = f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
        raise Untraceable(f"{type(model).__name__}: {reason}{where}") from error
    return graph_module


def _same(a: Tensor, b: Tensor) -> bool:
    if not a.is_cuda:
        return torch.allclose(a, b, equal_nan=True)
    size = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=size * _SAME.get(a.dtype, 1e-4), equal_nan=True)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes in every node the shape and type of its result."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = result.shape, result.dtype
        return result


def _shape(node: Any) -> tuple[torch.Size, torch.dtype] | None:
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose weights are plain parameters: pruning masks and parametrizations are applied."""
    # Pruning leaves the masked weight behind as a computed tensor, which deepcopy refuses without a memo entry.
    tensors = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    copied = copy.deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})
    copied.eval()  # before parametrizations are read: some update themselves in training
    for module in list(copied.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
    return copied


def unsupported(conv: nn.Module) -> str | None:
    """Why this convolution cannot be replaced by a :class:`FusedConv2d`, or None."""
    if not isinstance(conv, nn.Conv2d):
        return f"{type(conv).__name__} is not a 2-d convolution"
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{type(conv).__name__} computes something else than nn.Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r} is not zeros"
    if conv._forward_hooks or conv._forward_pre_hooks:
        return "it has forward hooks, which would not run; remove them before converting"
    return None


def fuse(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces every 2-d convolution by a :class:`FusedConv2d` with what runs behind it.

    A convolution called several times becomes several modules: `name`, `name_1`, ... Residual adds are fused where the
    nodes carry shapes, as :func:`trace` leaves them. `graph_module` is left as it is; the result shares with it the
    modules that are not convolutions.

    Returns:
        The new graph module in eval mode, and for every convolution left alone its name and the reason.
    """
    graph = copy.deepcopy(graph_module.graph)
    fuser = _Fuser(fx.GraphModule(graph_module, graph), graph)
    fuser.find_constants()
    fuser.eliminate_dead_code()
    fuser.replace_convolutions()
    for node in list(graph.nodes):
        fuser.absorb(node)
    fuser.eliminate_dead_code()
    # A new module takes over only what the graph still refers to.
    result = fx.GraphModule(fuser.root, graph, type(graph_module).__name__)
    result.graph.lint()
    return result.eval(), fuser.skipped


@dataclass
class _Fuser:
    """A graph that is rewritten in place, the fused convolutions in it, and why others are none."""

    root: fx.GraphModule
    graph: fx.Graph
    fused: dict[fx.Node, FusedConv2d] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    constants: set[fx.Node] = field(default_factory=set)

    def eliminate_dead_code(self) -> None:
        def has_effect(node: fx.Node) -> bool:
            # fx by itself removes an in-place operation whose result is not used, such as the statement `x.relu_()`,
            # and keeps an exported program's assertions on its weights, which have been checked by now.
            settled = node.op == "call_function" and self.constants.issuperset(node.all_input_nodes or (node,))
            return mutates(self.root, node) or (node.is_impure() and not settled)

        self.graph.eliminate_dead_code(has_effect)

    def operation(self, node: fx.Node) -> tuple[str, dict[str, Any]]:
        """What `node` does and its arguments by name, constant weights and statistics as tensors."""
        module = self.module(node)
        key = node.target if node.op in ("call_function", "call_method") else type(module)
        if isinstance(module, nn.Conv2d):
            key = nn.Conv2d  # a subclass, perhaps; obstacle() tells whether it computes the same
        name, names = _OPERATIONS.get(key, ("", ("input",)))
        arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
        if module is not None and name:
            if module._forward_hooks or module._forward_pre_hooks:
                return "", {}
            arguments |= {name: getattr(module, name, None) for name in names[1:]}
        elif name in ("conv", "norm"):
            arguments |= {key: self.value(arguments[key]) for key in _TENSORS if key in arguments}
        return name, arguments

    def replace_convolutions(self) -> None:
        found: dict[fx.Node, tuple[str, nn.Conv2d]] = {}
        for node in list(self.graph.nodes):
            operation, arguments = self.operation(node)
            if reason := self.obstacle(node, operation, arguments):
                self.skipped[_name_of(node)] = reason
            elif operation == "conv":
                weight, *others = (arguments.get(key) for key in _CONV[1:])
                found[node] = _name_of(node), _new_conv2d(cast(Tensor, weight), *others)
                node.args, node.kwargs = (arguments["input"],), {}  # lets go of the weights
        self.eliminate_dead_code()
        taken = {str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr") and n not in found}
        for node, (base, conv) in found.items():
            names = (f"{base}_{i}" if i else base for i in count())
            name = next(n for n in names if not any(t == n or t.startswith(n + ".") for t in taken))
            taken.add(name)
            module = FusedConv2d(conv)
            _attach(self.root, name, module)
            with self.graph.inserting_before(node):
                call = self.graph.call_module(name, node.args)
            call.meta = node.meta
            self.fused[call] = module
            self.merge(node, call)

    def obstacle(self, node: fx.Node, operation: str, arguments: dict[str, Any]) -> str | None:
        """Why a convolution must be left alone, or None; None for everything else too."""
        module = self.module(node)
        if isinstance(module, nn.modules.conv._ConvNd):
            reason = unsupported(module)
        elif operation == "conv":
            inputs: list[fx.Node] = []
            fx.map_arg({**arguments, "input": None}, inputs.append)
            if inputs:
                reason = f"its weight, bias or geometry depends on the input through {inputs[0]}"
            else:
                reason = _NOT_2D if arguments["weight"].ndim != 4 or arguments.get("transposed") else None
        elif node.op == "call_function" and re.match(r"conv(\dd|_transpose)", getattr(node.target, "__name__", "")):
            reason = _NOT_2D
        else:
            return None
        shape = _shape(arguments.get("input"))
        if reason is None and shape is not None and len(shape[0]) != 4:
            reason = f"its input has shape {tuple(shape[0])}; add a batch dimension"
        return reason

    def absorb(self, node: fx.Node) -> None:
        """Moves what `node` does into the convolution it follows, if it can be."""
        operation, arguments = self.operation(node)
        source: Any = arguments.get("input")
        if operation == "identity" and not arguments["training"] and isinstance(source, fx.Node):
            self.merge(node, source)
        elif operation == "norm" and self.open(source) and not self.fused[source].residual:
            self.absorb_norm(node, source, arguments)
        elif operation == "add":
            self.absorb_add(node, arguments)
        elif operation and self.open(source):
            limits = arguments.get("min_val", -1.0), arguments.get("max_val", 1.0)
            if operation == "hardtanh" and limits == (0.0, 6.0):
                operation = "relu6"
            if operation in ("relu", "relu6"):
                self.fused[source].activation = "relu" if operation == "relu" else "relu6"
                self.merge(node, source)

    def absorb_norm(self, node: fx.Node, source: fx.Node, arguments: dict[str, Any]) -> None:
        weight, bias, mean, variance = (arguments.get(key) for key in _TENSORS)
        if arguments.get("training") or mean is None or variance is None:
            return  # it uses the statistics of the batch
        if any(isinstance(value, fx.Node) for key, value in arguments.items() if key != "input"):
            return  # it depends on another input
        items = list(node.users) if node.target is _FROZEN else []  # (output, saved mean, saved deviation), both empty
        if any(item.target is not operator.getitem or item.args[1] != 0 for item in items):
            return
        scale = (variance.double() + arguments.get("eps", 1e-5)).rsqrt()
        scale = scale if weight is None else scale * weight.double()
        shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
        if _scale(self.fused[source].conv, scale, shift):
            for merged in (*items, node):
                self.merge(merged, node if merged in items else source)

    def absorb_add(self, node: fx.Node, arguments: dict[str, Any]) -> None:
        left: Any = arguments.get("input")
        right: Any = arguments.get("other")
        if left is right or _shape(left) is None or _shape(left) != _shape(right):
            return  # the same operand twice, or a scalar, a broadcast, a promotion
        if arguments.get("alpha", 1) != 1 or "out" in arguments:
            return
        candidates = [n for n in (left, right) if self.open(n) and not self.fused[n].residual]
        if not candidates:
            return
        conv: fx.Node = max(candidates)  # the last in the graph: the other operand exists by then
        residual = left if conv is right else right
        if residual in self.constants:
            return  # it keeps the example's batch size for ever, so the shapes agree by chance
        if mutates(self.root, node) and not (left in self.fused and len(left.users) == 1):
            return  # somebody else may look at the operand that is written to; the fused sum is a new tensor
        between = conv.next
        while between is not node:
            if mutates(self.root, between):
                return  # perhaps to what the convolution reads, which moves down to the add
            between = between.next
        node.prepend(conv)
        conv.args = (conv.args[0], residual)
        self.fused[conv].residual = True
        self.merge(node, conv)

    def open(self, node: Any) -> bool:
        """Whether `node` is a fused convolution to which its only user may be added."""
        return node in self.fused and len(node.users) == 1 and self.fused[node].activation == "none"

    def merge(self, node: fx.Node, into: fx.Node) -> None:
        node.replace_all_uses_with(into)
        self.graph.erase_node(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def find_constants(self) -> None:
        """Marks what no input takes part in: attributes and what is computed from them, say a masked weight."""
        for node in self.graph.nodes:
            inputs = node.all_input_nodes
            computed = node.op in ("call_function", "call_method") and not (
                node.is_impure() or mutates(self.root, node)
            )
            if node.op == "get_attr" or (computed and inputs and self.constants.issuperset(inputs)):
                self.constants.add(node)

    def value(self, argument: Any) -> Any:
        """The value of a constant node; any other argument as it is."""
        if argument not in self.constants:
            return argument
        if argument.op == "get_attr":
            return operator.attrgetter(argument.target)(self.root)
        args, kwargs = fx.map_arg((argument.args, argument.kwargs), self.value)
        with torch.no_grad():
            if argument.op == "call_function":
                return argument.target(*args, **kwargs)
            return getattr(args[0], argument.target)(*args[1:], **kwargs)


def mutates(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node of a network's graph writes to one of its inputs."""
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.op not in ("call_function", "call_method"):
        return False
    name = getattr(node.target, "__name__", node.target)
    return bool(_INPLACE_OPERATOR.fullmatch(str(name)) or node.kwargs.get("inplace") or "out" in node.kwargs)


def _name_of(node: fx.Node) -> str:
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


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Sets ``root.<name>``, in place of whatever is there."""
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(getattr(root, part, None), nn.Module):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if hasattr(root, leaf):
        delattr(root, leaf)
    root.add_module(leaf, module)


def _new_conv2d(weight: Tensor, bias: Tensor | None, *geometry: Any) -> nn.Conv2d:
    """A convolution with copies of `weight` and `bias`; geometry: stride, padding, dilation, groups or None."""

    def pair(value: Any, default: int) -> Any:
        value = default if value is None else value
        return value if isinstance(value, str) else (value,) * 2 if isinstance(value, int) else (*value, *value)[:2]

    stride, padding, dilation = (pair(value, default) for value, default in zip(geometry, (1, 0, 1), strict=False))
    groups = geometry[3] or 1
    out_channels, in_channels, *kernel = weight.shape
    channels = in_channels * groups, out_channels
    conv = nn.Conv2d(*channels, (kernel[0], kernel[1]), stride, padding, dilation, groups, device="meta")
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv


def _scale(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> bool:
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
