"""The network of a file: its layers, and the programs that call them or the model that they are put into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from escort.artifact.container import Container
from escort.layers import SparseConv2d
from escort.methods import for_device
from escort.network.model import NetworkPlan
from escort.network.original import plain_copy
from escort.network.tracing.conv_types import unsupported
from escort.planner import Plan
from escort.problem import Problem
from escort.runtime import Program, with_plain
from escort.runtime.saved.builders import SPARSE, build_layer, describe_layer
from escort.runtime.saved.description import check_apart, joined, programs_in
from escort.runtime.saved.errors import naming
from escort.runtime.saved.limits import MAX_LOWERED, MAX_STEPS
from escort.runtime.saved.notation import build_program, check_path
from escort.runtime.saved.problems import check_problem, check_together, lowered_numbers
from escort.runtime.steps import Listing


def restore_layers(
    records: Mapping[str, Mapping[str, Any]], container: Container, plan: NetworkPlan
) -> dict[str, nn.Module]:
    """The layers of a file by path, with their tensors taken out of the container.

    Raises:
        ValueError: naming the layer and what is wrong with its path, its record, its plan or its tensors.
    """
    if len(records) > MAX_STEPS:
        raise ValueError(f"a network has at most {MAX_STEPS} layers")
    problems = {}
    for name, record in records.items():
        with naming(f"layer {name[:100]}"):
            check_path(name)
            if record["type"] == SPARSE:
                problems[name] = plan.layers[name].problem
                check_problem(problems[name])
    check_together(problems.values())  # before a method lays anything out
    layers = {}
    for name, record in records.items():
        with naming(f"layer {name}"):
            layers[name] = _restore_layer(name, record, container, plan)
    check_apart(layers)
    return layers


def _restore_layer(name: str, record: Mapping[str, Any], container: Container, plan: NetworkPlan) -> nn.Module:
    if record["type"] == SPARSE:
        return _restore_sparse(name, container, plan.layers[name])
    layer = build_layer(record)
    state = {key: container.tensor(f"{name}.{key}") for key in layer.state_dict()}
    _load_state(layer, state)
    return layer


def _restore_sparse(name: str, container: Container, plan: Plan) -> SparseConv2d:
    problem = plan.problem
    sparse_filter = container.sparse_filter(f"{name}.weight", problem.weight_shape, problem.groups)
    bias = container.tensor(f"{name}.bias") if problem.epilogue.bias else None
    if bias is not None and bias.dtype is not torch.float32:
        raise ValueError(f"its bias is {bias.dtype}, not float32")
    # A kernel trusts its config, so only one that a method itself offers may reach it.
    is_too_large = lowered_numbers(problem) > MAX_LOWERED
    methods = [
        method
        for method in for_device(problem.device)
        if method.unsupported(problem) is None and not (method.lowers and is_too_large)
    ]
    if not methods:
        raise ValueError(f"no method here can run {problem}; convert the model on this machine")
    method = next((method for method in methods if method.name == plan.method), methods[0])
    offered = [asdict(config) for config in method.configs(problem, sparse_filter)]
    config = offered[offered.index(plan.config)] if plan.config in offered else offered[0]
    return SparseConv2d(sparse_filter, bias, replace(plan, method=method.name, config=config), name)


def _load_state(layer: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives a layer, or a network, the tensors of `state`. It keeps its own where `state` has none."""
    for key, own in layer.state_dict().items():
        if key in state and (state[key].shape, state[key].is_floating_point()) != (own.shape, own.is_floating_point()):
            raise ValueError(
                f"{key} is of shape {tuple(state[key].shape)} and {state[key].dtype}, not like {own.shape}"
            )
    layer.load_state_dict(state, strict=False, assign=True)


def build_programs(
    records: Mapping[str, Mapping[str, Any]], layers: Mapping[str, nn.Module], container: Container
) -> dict[str, Program]:
    """The programs of a file by path. They call these layers and read tensors, those of layers or their own.

    Raises:
        ValueError, KeyError, TypeError: naming the step, the layer or the tensor that is wrong.
    """
    programs = {}
    for path, record in records.items():
        if path:
            check_path(path)
        if any(other != path and path.startswith(f"{other}." if other else "") for other in records):
            raise ValueError(f"the part {path} lies within another part")
        with naming(f"part {path}" if path else "the network"):
            programs[path] = build_program(record, _owned(path, layers, container))
    return programs


def _owned(path: str, layers: Mapping[str, nn.Module], container: Container) -> Callable[[Listing], dict[str, Any]]:
    """What gives a program at a path its layers and tensors."""

    def owned(listing: Listing) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for step in listing.steps:
            if step.kind == "call":
                continue
            name = joined(path, step.target)
            if step.target not in found:
                found[step.target] = layers[name] if step.kind == "layer" else _tensor(name, layers, container)
            if isinstance(found[step.target], nn.Module) is not (step.kind == "layer"):
                raise ValueError(f"{name} is no tensor that a program may read")
        return found

    return owned


def _tensor(name: str, layers: Mapping[str, nn.Module], container: Container) -> Any:
    """A tensor that a program reads: one of a layer's, or one of its own."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        owner = layers.get(".".join(parts[:i]))
        if owner is None:
            continue
        state = {} if isinstance(owner, SparseConv2d) else owner.state_dict(keep_vars=True)
        if ".".join(parts[i:]) not in state:
            raise ValueError(f"{name} is no tensor that a program may read")
        return state[".".join(parts[i:])]
    return container.tensor(name)


def move(network: nn.Module, planned: torch.device, target: torch.device) -> None:
    """Moves a network to another device. In its programs, the tensors that they make by themselves follow."""
    names = {str(planned), planned.type}

    def follow(argument: Any) -> Any:
        if isinstance(argument, str) and argument in names:
            return str(target)
        return target if isinstance(argument, torch.device) and argument.type == planned.type else argument

    if target != planned:
        for program in programs_in(network).values():
            with_plain(program, follow)
    network.to(target)


def insert(
    layers: Mapping[str, nn.Module], programs: Mapping[str, Program], container: Container, model: nn.Module
) -> nn.Module:
    """A copy of a dense model with these layers and programs in the place of those that they were made from.

    Args:
        layers: those of programs too.

    Raises:
        ValueError: naming the layer, the part or the tensor that the model does not have like this.
    """
    network = plain_copy(model)
    inside = tuple(f"{path}." for path in programs)
    outside = {name: layer for name, layer in layers.items() if not name.startswith(inside)}
    for name, module in {**programs, **outside}.items():
        with naming(f"part {name}" if name in programs else f"layer {name}"):
            modules = dict(network.named_modules())
            if name not in modules:
                raise ValueError(f"the model has no {name}")
            if name in outside:
                _check_replaceable(modules[name], module)
            owner, _, child = name.rpartition(".")
            modules[owner]._modules[child] = module
    done = tuple(f"{name}." for name, layer in outside.items() if isinstance(layer, SparseConv2d)) + inside
    _load_state(network, {key: container.tensor(key) for key in network.state_dict() if not key.startswith(done)})
    return network


def _check_replaceable(old: nn.Module, new: nn.Module) -> None:
    if isinstance(new, SparseConv2d):
        problem = new.plan.problem
        where = {"precision": problem.precision, "device": problem.device}
        if unsupported(old) or Problem.of(old, problem.input_shape, **where) != problem:  # type: ignore[arg-type]
            raise ValueError(f"the file holds {new}, the model has {old}")
    elif type(old) is not nn.MaxPool2d or describe_layer(old)["arguments"] != describe_layer(new)["arguments"]:
        raise ValueError(f"the file holds {new}, the model has {old}")
