"""Converted models in one file: save and load. docs/format.md describes the file byte by byte.

A file may come from anywhere, so everything in it is checked before it is used, and nothing in it is ever run as code.
"""

from __future__ import annotations

import json
import math
import operator
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from escort.artifact import graph
from escort.artifact.container import Container, pack, parse
from escort.filter import SparseFilter
from escort.layers import MaxPool2d, SparseConv2d
from escort.methods import for_device
from escort.network.convert import replan as plan_again
from escort.network.fused import unsupported
from escort.network.model import ConvertedModel, NetworkPlan
from escort.network.trace import plain_copy
from escort.planner.machine import Machine, find_device
from escort.planner.plan import Plan
from escort.problem import Precision, Problem

FORMAT = "escort"
VERSION = 1
MAX_WINDOW = 1 << 13  # kernel size, stride, padding and dilation
MAX_PLANE = 1 << 26  # positions of an input or output that a convolution is planned for
MAX_NUMBERS = 1 << 30  # in such an input or output, or in the inputs of a network

_SPARSE = "escort.SparseConv2d"
_REMEDY = "save the model again with this version, or get an undamaged copy of the file"


class ArtifactError(ValueError):
    """A file that cannot be loaded; the message names the file, the layer, the problem and the remedy."""


def save(model: ConvertedModel, path: str | os.PathLike[str]) -> None:
    """Writes a converted model to one file: its graph, compressed filters, other weights and plan, and no code.

    An older file of that name is replaced once the new one is complete, and stays if anything fails. Of a model that
    torch.fx could not trace, the file holds filters and weights only, and :func:`load` takes the model besides.

    Raises:
        ValueError, TypeError: naming the layer that cannot be saved and the remedy.
        OSError: naming the path that cannot be written and the remedy.
    """
    if not isinstance(model, ConvertedModel):
        raise TypeError(f"save takes what escort.convert returned, got {type(model).__name__}; convert the model first")
    architecture = _describe(model)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "escort": Machine.here().escort,
        "architecture": _json(architecture),
        # The error of a candidate that failed may be infinite, which JSON cannot say.
        "plan": _json(json.loads(json.dumps(model.plan.to_json()), parse_constant=lambda constant: None)),
    }
    _write(Path(path), pack(metadata, _tensors(model.network, architecture["layers"])))


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    replan: bool | None = None,
) -> ConvertedModel:
    """The converted model that :func:`save` wrote. A file from an untrusted source is safe to load.

    Args:
        model: for a file without a graph, a new dense model of the same structure; it is copied, not changed.
        device: what it shall run on: "cpu", "cuda" or "cuda:1"; by default what it was planned for, or the nearest to
            that which is here.
        replan: whether to measure anew which method is fastest; by default if the file was planned on another
            machine or for another type of device, with another number of threads, or by other versions.

    Raises:
        ArtifactError: (a ValueError) naming the file, the layer, the problem and the remedy.
        ValueError: if there is no such device here.
        OSError: if the file cannot be read.
        torch.OutOfMemoryError: if the GPU cannot hold the model, or run it on the inputs that it was planned for.
    """
    path = Path(path)
    asked = None if device is None else find_device(str(device))
    data = _read(path)
    with _blaming(path, _REMEDY):
        container, plan = _open(data)
        architecture = parse(container.metadata["architecture"])
        nodes = architecture["graph"]
    planned = torch.device(plan.device)
    there = _nearest(planned) if asked is None else asked
    moves = there.type != planned.type
    if moves and replan is False:
        raise ArtifactError(f"{path}: it was planned for {planned}, not for {there}; leave out replan=False")
    if moves and plan.precision in ("fp16", "bf16"):
        remedy = "load it where there is a GPU, or convert the model in float32 on the CPU"
        raise ArtifactError(f"{path}: it computes in {plan.precision}, which takes a GPU; {remedy}")
    with _blaming(path, _REMEDY):
        plan = _transfer(plan, there)
        layers = {name: _build(name, record, container, plan) for name, record in architecture["layers"].items()}
    if (nodes is None) != (model is not None):
        what = "no graph; pass load a new model of the class" if model is None else "its own graph; leave out the model"
        raise ArtifactError(f"{path}: it holds {what} that was converted")
    with _blaming(path, _REMEDY if model is None else "pass a new model of the class that was converted"):
        network = _connect(nodes, layers, container) if model is None else _insert(layers, container, model)
        if container.left:
            raise ValueError(f"nothing in the network uses its tensor {container.left[0]}")
        if isinstance(network, fx.GraphModule) and there != planned:
            _redirect(network, planned, there)
        network.to(there)
        if plan.memory_format == "channels_last" and not plan.kept_dense:  # for what is left of torch's convolutions
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    chosen = {name: layer.plan for name, layer in layers.items() if isinstance(layer, SparseConv2d)}
    others = {} if moves else plan.layers  # of a network that stayed dense
    converted = ConvertedModel(network, replace(plan, layers=others | chosen))
    if replan is None:
        replan = plan.machine != Machine.here(str(there)) or any(plan.time_us is None for plan in chosen.values())
    if not replan:
        return converted
    remedy = "convert the model again on this machine"
    with _blaming(path, remedy if moves else f"load it with replan=False, then {remedy}"):
        return plan_again(converted)


def load_plan(path: str | os.PathLike[str]) -> NetworkPlan:
    """The plan in a file that :func:`save` wrote, as it was planned and wherever that was; nothing else is looked at.

    Raises:
        ArtifactError, OSError: as :func:`load` does.
    """
    path = Path(path)
    data = _read(path)
    with _blaming(path, _REMEDY):
        return _open(data)[1]


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file; name one that escort.save wrote")
    return path.read_bytes()


def _open(data: bytes) -> tuple[Container, NetworkPlan]:
    container = Container(data)
    _check_version(container.metadata)
    plan = NetworkPlan.from_json(parse(container.metadata["plan"]))
    sizes = [size for shape in plan.input_shapes for size in shape]
    if min(sizes, default=0) < 0 or sum(map(math.prod, plan.input_shapes)) > MAX_NUMBERS:
        raise ValueError(f"no network takes inputs of shape {plan.input_shapes}")
    return container, plan


def _nearest(planned: torch.device) -> torch.device:
    """The device here that is most like the one planned for."""
    if planned.type == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    there = planned.index is not None and planned.index < torch.cuda.device_count()
    return planned if there else find_device("cuda")


def _transfer(plan: NetworkPlan, device: torch.device) -> NetworkPlan:
    """The plan for another device; on one of another type nothing is chosen yet."""
    moves = device.type != torch.device(plan.device).type
    precision: Precision = "fp32" if moves and plan.precision == "tf32" else plan.precision
    layers = {}
    for name, layer in plan.layers.items():
        layer = replace(layer, problem=replace(layer.problem.on(str(device)), precision=precision))
        layers[name] = replace(layer, method="", candidates=()) if moves else layer
    samples = None if moves else plan.samples
    return replace(plan, layers=layers, device=str(device), precision=precision, samples=samples)


def _describe(model: ConvertedModel) -> dict[str, Any]:
    network = model.network
    if isinstance(network, fx.GraphModule):
        names = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
        nodes = graph.describe_graph(network.graph)
    else:
        names = [name for name, layer in network.named_modules() if isinstance(layer, SparseConv2d | MaxPool2d)]
        nodes = None
    layers = {}
    for name in names:
        with _naming(f"layer {name}"):
            graph.check_path(name)
            layer = network.get_submodule(name)
            if isinstance(layer, SparseConv2d):
                asked = model.plan.layers[name].problem
                if replace(layer.problem(asked.batch, asked.height, asked.width), device=asked.device) != asked:
                    raise ValueError("it was changed after it was planned; convert the model again")
                layers[name] = {"type": _SPARSE}
            else:
                layers[name] = graph.describe_layer(layer)
    return {"layers": layers, "graph": nodes}


def _tensors(network: nn.Module, layers: Collection[str]) -> dict[str, Tensor | SparseFilter]:
    """What the file holds, by qualified name; a sparse convolution's filter is its weight."""
    state: dict[str, Any] = network.state_dict()
    if isinstance(network, fx.GraphModule):  # only what its nodes refer to, which may be plain attributes
        targets = [str(node.target) for node in network.graph.nodes if node.op == "get_attr"]
        state = {key: value for key, value in state.items() if key.startswith(tuple(f"{name}." for name in layers))}
        state |= {target: operator.attrgetter(target)(network) for target in targets}
    for name in layers:
        layer = network.get_submodule(name)
        if isinstance(layer, SparseConv2d):
            for buffer in ("values", "columns", "indptr"):
                del state[f"{name}.{buffer}"]
            state[f"{name}.weight"] = layer.filter
    for name, value in state.items():
        if not isinstance(value, Tensor | SparseFilter):
            raise TypeError(f"{name} is a {type(value).__name__}, not a tensor; make it a buffer of the model")
    return state


def _build(name: str, record: Mapping[str, Any], container: Container, plan: NetworkPlan) -> nn.Module:
    with _naming(f"layer {name}"):
        graph.check_path(name)
        if record["type"] == _SPARSE:
            return _build_sparse(name, container, plan.layers[name])
        layer = graph.build_layer(record)
        state = {key: container.tensor(f"{name}.{key}") for key in layer.state_dict()}
        _fill(layer, state)
        return layer


def _build_sparse(name: str, container: Container, plan: Plan) -> SparseConv2d:
    problem = plan.problem
    _check_problem(problem)
    sparse_filter = container.filter(f"{name}.weight", problem.weight_shape, problem.groups)
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


def _fill(layer: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives a layer, or a network, its tensors; those that it has and `state` lacks stay."""
    for key, own in layer.state_dict().items():
        if key in state and (state[key].shape, state[key].is_floating_point()) != (own.shape, own.is_floating_point()):
            raise ValueError(
                f"{key} is of shape {tuple(state[key].shape)} and {state[key].dtype}, not like {own.shape}"
            )
    layer.load_state_dict(state, strict=False, assign=True)


def _connect(nodes: list[Mapping[str, Any]], layers: Mapping[str, nn.Module], container: Container) -> fx.GraphModule:
    """The graph that calls these layers and reads tensors, theirs or its own."""
    roots: dict[str, Any] = dict(layers)
    for path in {str(node["target"]) for node in nodes if node["op"] == "get_attr"}:
        owner, _, key = path.rpartition(".")
        if owner in layers and not isinstance(layers[owner], SparseConv2d):
            roots[path] = layers[owner].state_dict(keep_vars=True)[key]
            continue
        if path in layers or any(path.startswith(f"{name}.") for name in layers):
            raise ValueError(f"{path} is no tensor that the graph may read")
        roots[path] = container.tensor(path)
    return graph.build_graph(nodes, roots)


def _redirect(network: fx.GraphModule, planned: torch.device, there: torch.device) -> None:
    """Lets the tensors that a graph makes by itself follow the network to another device."""

    def follow(argument: Any) -> Any:
        return there if isinstance(argument, torch.device) and argument.type == planned.type else argument

    for node in network.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), follow)
    network.recompile()


def _insert(layers: Mapping[str, nn.Module], container: Container, model: nn.Module) -> nn.Module:
    """A copy of a dense model with these layers in the place of those that they were made from."""
    network = plain_copy(model)
    for name, layer in layers.items():
        with _naming(f"layer {name}"):
            _check_replaceable(network.get_submodule(name), layer)
            network.set_submodule(name, layer)
    sparse = tuple(f"{name}." for name, layer in layers.items() if isinstance(layer, SparseConv2d))
    _fill(network, {key: container.tensor(key) for key in network.state_dict() if not key.startswith(sparse)})
    return network


def _check_replaceable(old: nn.Module, new: nn.Module) -> None:
    if isinstance(new, SparseConv2d):
        problem = new.plan.problem
        where = {"precision": problem.precision, "device": problem.device}
        if unsupported(old) or Problem.of(old, problem.input_shape, **where) != problem:  # type: ignore[arg-type]
            raise ValueError(f"the file holds {new}, the model has {old}")
    elif (
        type(old) is not nn.MaxPool2d
        or graph.describe_layer(old)["arguments"] != graph.describe_layer(new)["arguments"]
    ):
        raise ValueError(f"the file holds {new}, the model has {old}")


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        found = f"{metadata.get('format')} {metadata.get('version')}, written by escort {metadata.get('escort')}"
        raise ValueError(f"its format is {found}; this version reads {FORMAT} {VERSION}")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _write(path: Path, data: bytes) -> None:
    """All or nothing: another process, or a later one after a crash, finds the old file or the new one."""
    unfinished = path.parent / f".escort-{secrets.token_hex(4)}.unfinished"
    try:
        try:
            with open(unfinished, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        remedy = f"name a file in a folder that exists and takes {len(data):,} bytes"
        raise type(error)(error.errno, f"cannot save: {error.strerror or error}; {remedy}", str(path)) from error


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turns whatever goes wrong into a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_told(error)}") from error


@contextmanager
def _blaming(path: Path, remedy: str) -> Iterator[None]:
    """Turns whatever goes wrong into an ArtifactError. A damaged file may go wrong anywhere, in torch too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path}: {_told(error)}; {remedy}") from error


def _told(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, KeyError):
        return f"{error} is missing or unknown"
    return f"{type(error).__name__}: {error}"
