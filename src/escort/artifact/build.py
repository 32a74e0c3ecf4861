"""The network of a file: its layers, and the programs that call them or the model that they are put into."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from escort.artifact.container import Container
from escort.filter import SparseFilter
from escort.layers import SparseConv2d
from escort.methods import Config, Method, for_device
from escort.network.plan import NetworkPlan
from escort.network.tracing.conv_types import unsupported
from escort.planner import Plan
from escort.planner.checked import check_fields
from escort.problem import Problem
from escort.runtime import Program, with_plain
from escort.runtime.saved.builders import OWN, SPARSE, build_layer, describe_layer, is_own
from escort.runtime.saved.description import programs_in
from escort.runtime.saved.errors import naming
from escort.runtime.saved.limits import MAX_LOWERED, MAX_STEPS
from escort.runtime.saved.notation import build_listing, check_path
from escort.runtime.saved.places import Places, joined
from escort.runtime.saved.problems import check_problem, check_together, lowered_numbers
from escort.runtime.stand_in import adopt
from escort.runtime.steps import Listing


def restore_layers(
    records: Mapping[str, Mapping[str, Any]], container: Container, plan: NetworkPlan
) -> dict[str, nn.Module]:
    """The layers of a file by path, with their tensors taken out of the container. Those of a model's own are left out.

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
        if record != OWN:
            with naming(f"layer {name}"):
                layers[name] = _restore_layer(name, record, container, plan)
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
    bias, slope = (
        container.tensor(f"{name}.{kind}") if is_there else None
        for kind, is_there in (("bias", problem.epilogue.bias), ("slope", problem.epilogue.activation == "prelu"))
    )
    for kind, tensor in (("bias is", bias), ("slopes are", slope)):
        if tensor is not None and tensor.dtype is not torch.float32:
            raise ValueError(f"its {kind} {tensor.dtype}, not float32")
    is_too_large = lowered_numbers(problem) > MAX_LOWERED
    methods = sorted(for_device(problem.device), key=lambda method: method.name != plan.method)  # the plan's first
    method = next((m for m in methods if m.unsupported(problem) is None and not (m.lowers and is_too_large)), None)
    if method is None:
        raise ValueError(f"no method here can run {problem}; convert the model on this machine")
    config = _planned_config(plan, method, sparse_filter)
    if config is None:
        config = method.without_trying(method.configs(problem, sparse_filter)[0])
    plan = replace(plan, method=method.name, config=asdict(config))
    return SparseConv2d(sparse_filter, bias, plan, name, slope=slope)


def _planned_config(plan: Plan, method: Method, sparse_filter: SparseFilter) -> Config | None:
    """A plan's config, None where it is none that the method offers: a kernel trusts its config."""
    if plan.method != method.name:
        return None
    try:
        config = method.config_type(**plan.config)
        check_fields(config)
    except (TypeError, ValueError):
        return None
    return config if method.offers(plan.problem, sparse_filter, config) else None


def _load_state(layer: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives a layer, or a network, the tensors of `state`. It keeps its own where `state` has none."""
    for key, own in layer.state_dict().items():
        if key in state and (state[key].shape, state[key].is_floating_point()) != (own.shape, own.is_floating_point()):
            raise ValueError(
                f"{key} is of shape {tuple(state[key].shape)} and {state[key].dtype}, not like {own.shape}"
            )
    nn.Module.load_state_dict(layer, state, strict=False, assign=True)  # whatever a class has in its place


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


def listings(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Listing]:
    """The listings of a file's programs by path.

    Raises:
        ValueError, KeyError, TypeError: naming the part and the step that is wrong.
    """
    found = {}
    for path, record in records.items():
        with naming(f"part {path[:100]}" if path else "the network"):
            if path:
                check_path(path)
            found[path] = build_listing(record)
    return found


def own_layers(records: Mapping[str, Any], model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a file that are modules of the model's own.

    Raises:
        ValueError: naming the layer that the model does not have like this.
    """
    modules, layers = dict(model.named_modules(remove_duplicate=False)), {}
    for name in own_paths(records):
        with naming(f"layer {name}"):
            check_path(name)
            layers[name] = _found(name, modules)
            if not is_own(layers[name]):
                raise ValueError(f"the file takes it from the model, which has {layers[name]}")
    return layers


def own_paths(records: Mapping[str, Any]) -> list[str]:
    """The paths of the layers that are modules of the model's own."""
    return [name for name, record in records.items() if record == OWN]


def assemble(
    listings: Mapping[str, Listing], layers: Mapping[str, nn.Module], container: Container, model: nn.Module | None
) -> tuple[nn.Module, dict[str, Program]]:
    """The network of a file, and its programs by path.

    Args:
        listings: those of the programs, by path.
        layers: all of the file; those of the model's own are modules of `model`.
        model: a plain copy of a dense model, which becomes part of the network: programs and layers take the places of
            those modules that they were made from. None where the file holds the whole network.

    Raises:
        ValueError, KeyError, TypeError: naming the part, the layer or the tensor that is wrong, or that the model does
            not have like this.
    """
    places = Places(listings.keys(), layers)
    places.check()
    modules = {} if model is None else dict(model.named_modules(remove_duplicate=False))
    for path in filter(None, listings):
        with naming(f"part {path}"):
            _found(path, modules)
    for name, layer in layers.items():
        if places.in_model(name):
            with naming(f"layer {name}"):
                _check_replaceable(_found(name, modules), layer)
                _put(name, layer, modules)
    programs: dict[str, Program] = {}
    own = (name for name, layer in layers.items() if is_own(layer))
    for path in sorted({"", *listings, *own}, key=_depth, reverse=True):  # what lies inside of others comes first
        if path not in listings:
            with naming(f"layer {path}") if path else nullcontext():
                _fill(path, modules[path], places, container)
            continue
        with naming(f"part {path}" if path else "the network"):
            programs[path] = Program(listings[path], places.owned(path, container.tensor)(listings[path]))
            if model is not None:  # code around it may read its attributes
                adopt(programs[path], modules[path])
            if path:
                _put(path, programs[path], modules)
    return programs[""] if "" in programs else modules[""], programs


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0


def _found(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    if name not in modules:
        raise ValueError(f"the model has no {name}")
    return modules[name]


def _put(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    owner, _, child = name.rpartition(".")
    modules[owner]._modules[child] = module


def _fill(path: str, module: nn.Module, places: Places, container: Container) -> None:
    """Gives a module of the model's own its tensors. Those of programs and layers inside of it are there already."""
    state, again = {}, places.again(module, path)
    for key in module.state_dict():
        name = joined(path, key)
        if places.around(name) == (path or None) and not name.startswith(again):
            state[key] = container.tensor(name)
    _load_state(module, state)


def _check_replaceable(old: nn.Module, new: nn.Module) -> None:
    if isinstance(new, SparseConv2d):
        problem = new.plan.problem
        where = {"precision": problem.precision, "device": problem.device}
        if unsupported(old) or Problem.of(old, problem.input_shape, **where) != problem:  # type: ignore[arg-type]
            raise ValueError(f"the file holds {new}, the model has {old}")
    elif type(old) is not nn.MaxPool2d or describe_layer(old)["arguments"] != describe_layer(new)["arguments"]:
        raise ValueError(f"the file holds {new}, the model has {old}")
