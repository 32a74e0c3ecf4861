"""From a model to its graph, on plain copies of its weights. The model itself is not touched."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves

from escort.network.conv_types import is_leaf

_NOT_THE_MODEL = (str(Path(torch.__file__).parent), __file__, "<")  # files in a traceback through a model's forward
# How far two runs of the same graph may be apart, relative to their size: on a GPU a sum's order is not fixed.
_SAME = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


class Untraceable(Exception):  # noqa: N818 - it says what the model is
    """torch.fx cannot turn this model into a graph; the message says why."""


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    example_kwargs: Mapping[str, Tensor] | None = None,
) -> fx.GraphModule:
    """The graph of `model` in eval mode, on copies of its weights, each node knowing its shape on the example.

    A model that is a graph already, such as ``torch.export.load(path).module()``, keeps its graph. Arguments of
    `model.forward` beyond the example are fixed at their defaults.

    Raises:
        Untraceable: where control flow depends on the data, or the graph does not compute what the model does.
        torch.OutOfMemoryError: where the device's memory does not hold the copies.
    """
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    kwargs = dict(example_kwargs or {})
    try:
        copied = plain_copy(model)
        graph_module = copied if isinstance(copied, fx.GraphModule) else _symbolic_trace(copied, len(args), kwargs)
        with torch.no_grad():  # on copies, since an in-place first layer writes to its input
            flat = [x.clone() if isinstance(x, Tensor) else x for x in _in_order(graph_module, args, kwargs)]
            traced = tree_leaves(_Shapes(graph_module).run(*flat, enable_io_processing=False))
            copies = {name: x.clone() for name, x in kwargs.items()}
            called = tree_leaves(copied(*(x.clone() for x in args), **copies))
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


def _symbolic_trace(model: nn.Module, positional: int, kwargs: Mapping[str, Tensor]) -> fx.GraphModule:
    name = type(model).__name__
    model = _Alone(model) if is_leaf(model) else model  # the root itself is always traced through
    beyond = list(inspect.signature(model.forward).parameters.values())[positional:]
    defaults = {p.name: p.default for p in beyond if p.name not in kwargs and p.default is not p.empty}
    tracer = _Tracer()
    graph = tracer.trace(model, defaults or None)
    return fx.GraphModule(tracer.root, graph, name)


class _Alone(nn.Module):
    """A convolution as a whole model."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or is_leaf(m)


def _in_order(graph_module: fx.GraphModule, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> list[Any]:
    """The example in the order of the graph's inputs, with the default of an input that it does not name."""
    beyond = [node for node in graph_module.graph.nodes if node.op == "placeholder"][len(args) :]
    return [*args, *(kwargs.get(node.target, *node.args) for node in beyond if node.target in kwargs or node.args)]


def shape_of(node: Any) -> tuple[torch.Size, torch.dtype] | None:
    """The shape and type of a node's result on the example, as :func:`trace` noted it; None for anything else."""
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


class _Shapes(fx.Interpreter):
    """Runs a graph and notes in every node the shape and type of its result."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = result.shape, result.dtype
        return result


def _same(a: Tensor, b: Tensor) -> bool:
    if not a.is_cuda:
        return torch.allclose(a, b, equal_nan=True)
    size = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=size * _SAME.get(a.dtype, 1e-4), equal_nan=True)
