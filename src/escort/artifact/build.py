"""The network of a file: its layers, and the graph that calls them or the model that they are put into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from escort.artifact.container import Container
from escort.artifact.errors import naming
from escort.artifact.graph import build_graph, check_path
from escort.artifact.layers import SPARSE, build_layer, describe_layer
from escort.layers import SparseConv2d
from escort.methods import for_device
from escort.network.fused import unsupported
from escort.network.model import NetworkPlan
from escort.network.original import plain_copy
from escort.planner import Plan
from escort.problem import Problem

MAX_WINDOW = 1 << 13  # kernel_size, stride, padding and dilation
MAX_PLANE = 1 << 26  # positions of an input or output that a convolution is planned for
MAX_NUMBERS = 1 << 30  # in such an input or output, or in the inputs of a network


def restore_layer(name: str, record: Mapping[str, Any], container: Container, plan: NetworkPlan) -> nn.Module:
    """The layer of that name, with its tensors taken out of the container.

    Raises:
        ValueError: naming the layer and what is wrong with its record, its plan or its tensors.
    """
    with naming(f"layer {name}"):
        check_path(name)
        if record["type"] == SPARSE:
            return _restore_sparse(name, container, plan.layers[name])
        layer = build_layer(record)
        state = {key: container.tensor(f"{name}.{key}") for key in layer.state_dict()}
        _load_state(layer, state)
        return layer


def _restore_sparse(name: str, container: Container, plan: Plan) -> SparseConv2d:
    problem = plan.problem
    _check_problem(problem)
    sparse_filter = container.sparse_filter(f"{name}.weight", problem.weight_shape, problem.groups)
    bias = container.tensor(f"{name}.bias") if problem.epilogue.bias else None
    if bias is not None and bias.dtype is not torch.float32:
        raise ValueError(f"its bias is {bias.dtype}, not float32")
    # A kernel trusts its config, so only one that a method itself offers may reach it.
    methods = [method for method in for_device(problem.device) if method.unsupported(problem) is None]
    if not methods:
        raise ValueError(f"no method here can run {problem}; convert the model on this machine")
    method = next((method for method in methods if method.name == plan.method), methods[0])
    offered = [asdict(config) for config in method.configs(problem, sparse_filter)]
    config = offered[offered.index(plan.config)] if plan.config in offered else offered[0]
    return SparseConv2d(sparse_filter, bias, replace(plan, method=method.name, config=config), name)


def _check_problem(problem: Problem) -> None:
    """Raises ValueError for a problem that a kernel or an allocation should never see."""
    sizes = (*problem.input_shape, problem.out_channels, problem.groups)
    windows = (*problem.kernel_size, *problem.stride, *problem.dilation, *problem.padding)
    lengths = len(problem.kernel_size), len(problem.stride), len(problem.dilation), len(problem.padding)
    flags = problem.epilogue.bias, problem.epilogue.residual
    if (
        lengths != (2, 2, 2, 4)
        or not all(type(number) is int for number in (*sizes, *windows))
        or not all(type(flag) is bool for flag in flags)
        or (problem.device == "cpu" and problem.precision != "fp32")
        or max(windows) > MAX_WINDOW
        or max(math.prod(shape[2:]) for shape in (problem.input_shape, problem.output_shape)) > MAX_PLANE
        or max(math.prod(shape) for shape in (problem.input_shape, problem.output_shape)) > MAX_NUMBERS
    ):
        raise ValueError(f"no network asks for {problem}")


def _load_state(layer: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives a layer, or a network, the tensors of `state`. It keeps its own where `state` has none."""
    for key, own in layer.state_dict().items():
        if key in state and (state[key].shape, state[key].is_floating_point()) != (own.shape, own.is_floating_point()):
            raise ValueError(
                f"{key} is of shape {tuple(state[key].shape)} and {state[key].dtype}, not like {own.shape}"
            )
    layer.load_state_dict(state, strict=False, assign=True)


def connect(nodes: list[Mapping[str, Any]], layers: Mapping[str, nn.Module], container: Container) -> fx.GraphModule:
    """The graph that calls these layers and reads tensors, theirs or its own.

    Raises:
        ValueError, KeyError, TypeError: naming the node or the tensor that is wrong.
    """
    roots: dict[str, Any] = dict(layers)
    for path in {str(node["target"]) for node in nodes if node["op"] == "get_attr"}:
        owner, _, key = path.rpartition(".")
        if owner in layers and not isinstance(layers[owner], SparseConv2d):
            roots[path] = layers[owner].state_dict(keep_vars=True)[key]
            continue
        if path in layers or any(path.startswith(f"{name}.") for name in layers):
            raise ValueError(f"{path} is no tensor that the graph may read")
        roots[path] = container.tensor(path)
    return build_graph(nodes, roots)


def move(network: nn.Module, planned: torch.device, target: torch.device) -> None:
    """Moves a network to another device. In a graph, the tensors that it makes by itself follow."""

    def follow(argument: Any) -> Any:
        return target if isinstance(argument, torch.device) and argument.type == planned.type else argument

    if isinstance(network, fx.GraphModule) and target != planned:
        for node in network.graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), follow)
        network.recompile()
    network.to(target)


def insert(layers: Mapping[str, nn.Module], container: Container, model: nn.Module) -> nn.Module:
    """A copy of a dense model with these layers in the place of those that they were made from.

    Raises:
        ValueError: naming the layer or the tensor that the model does not have like this.
    """
    network = plain_copy(model)
    for name, layer in layers.items():
        with naming(f"layer {name}"):
            _check_replaceable(network.get_submodule(name), layer)
            network.set_submodule(name, layer)
    sparse = tuple(f"{name}." for name, layer in layers.items() if isinstance(layer, SparseConv2d))
    _load_state(network, {key: container.tensor(key) for key in network.state_dict() if not key.startswith(sparse)})
    return network


def _check_replaceable(old: nn.Module, new: nn.Module) -> None:
    if isinstance(new, SparseConv2d):
        problem = new.plan.problem
        where = {"precision": problem.precision, "device": problem.device}
        if unsupported(old) or Problem.of(old, problem.input_shape, **where) != problem:  # type: ignore[arg-type]
            raise ValueError(f"the file holds {new}, the model has {old}")
    elif type(old) is not nn.MaxPool2d or describe_layer(old)["arguments"] != describe_layer(new)["arguments"]:
        raise ValueError(f"the file holds {new}, the model has {old}")
