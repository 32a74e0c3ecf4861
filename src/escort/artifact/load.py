"""A converted model out of its file.

The file may come from anywhere, so everything in it is checked before it is used, and nothing in it is run as code.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from escort.arguments import path_of
from escort.artifact import build
from escort.artifact import kernels as carried
from escort.artifact.container import Container, parse
from escort.artifact.errors import ArtifactError, blaming
from escort.artifact.save import FORMAT, VERSION
from escort.cuda.carried import carry
from escort.layers import SparseConv2d
from escort.methods import by_name
from escort.network.check import Effort
from escort.network.convert import replan
from escort.network.model import ConvertedModel
from escort.network.original import plain_copy, unwrap
from escort.network.plan import NetworkPlan
from escort.planner.cores import on_all_cores
from escort.planner.machine import Machine, find_device
from escort.problem import Precision
from escort.runtime.saved.builders import SPARSE
from escort.runtime.saved.description import layers_in
from escort.runtime.saved.limits import (
    MAX_LOWERED,
    MAX_MEASURED_MULTIPLY_ADDS,
    MAX_MEASURED_NUMBERS,
    MAX_MEASURED_WRITES,
    MAX_NUMBERS,
)
from escort.runtime.saved.problems import lowered_numbers, multiply_adds
from escort.runtime.saved.rehearsal import Work, rehearse

_log = logging.getLogger(__name__)
_SAVE_AGAIN = "save it with kernels=True again, by this version and on a GPU like this one"
_REMEDY = "save the model again with this version, or get an undamaged copy of the file"


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    remeasure: bool | None = None,
    kernels: bool | str | os.PathLike[str] = False,
) -> ConvertedModel:
    """The converted model that :func:`save` wrote. A file from an untrusted source is safe to load without `kernels`.

    On a GPU its layers are laid out side by side, so that the first call need not do it. On the machine that it was
    planned on nothing is measured.

    Args:
        model: a new dense model of the same structure, for a file that does not hold the whole program; it is copied,
            not changed.
        device: where the model shall run: "cpu", "cuda" or "cuda:1"; by default on the device that it was planned for,
            or on the most similar one that is here.
        remeasure: whether to measure again which method is fastest; by default where the file was planned on another
            machine or for another type of device, with another number of threads, or by other versions. By default
            only layers are measured where the whole network's work is not known without running the model's own code,
            and a layer whose plan is stored on this machine takes that over.
        kernels: whether to use the compiled kernels that were saved with the model, or the path of their file, by
            default `path` with `.kernels` behind. What is not among them is compiled, for which NVRTC must be there.
            Kernels are code that runs on the GPU, and nothing checks what it does: leave them out unless you trust
            whoever made both files.

    Raises:
        ArtifactError: (a ValueError) naming the file, the layer, the problem and the remedy.
        ValueError: if there is no such device here.
        TypeError: if `model` is the name of a device.
        OSError: if the file cannot be read.
        torch.OutOfMemoryError: if the GPU cannot hold the model, or run it on the inputs that it was planned for.
    """
    path, begin = path_of(path, "model.escort"), time.perf_counter()
    if isinstance(model, str | torch.device):
        raise TypeError(f"model is an nn.Module, got {model!r}; write device={str(model)!r}")
    wanted = None if device is None else find_device(str(device))
    saved = _read(path)
    target = _nearest(saved.device) if wanted is None else wanted
    _check_request(saved, target, model, remeasure)
    if kernels is not False:
        beside = carried.beside(path)
        _carry(saved, target, beside if kernels is True else path_of(kernels, beside.name, "kernels"))
    network, plan, works = _build(saved, target, model)
    if kernels is not False:
        _check_kept(saved, plan)
    converted = ConvertedModel(network, plan)
    may_run_whole, is_asked = remeasure is True or all(work.is_bounded for work in works), remeasure is True
    too_much = _too_much(plan, works)
    if remeasure is None:
        sparse = [plan.layers[name] for name, record in saved.layers.items() if record["type"] == SPARSE]
        remeasure = any(layer.time_us is None for layer in sparse) or plan.machine != Machine.here(str(target))
        if remeasure and too_much:
            raise ArtifactError(
                f"{path}: its layers were not measured here, and measuring them takes {too_much}; pass remeasure=True "
                "if you trust the file, or remeasure=False"
            )
    if not remeasure:
        _check_here(saved, target)
    if not remeasure and target.type == "cuda" and not too_much:
        _lay_out(saved, network, is_carried=kernels is not False)
    _log.info("loaded %s in %.2f s%s", path, time.perf_counter() - begin, ", to be measured anew" if remeasure else "")
    if not remeasure:
        return converted
    remedy = "convert the model again on this machine"
    with blaming(path, remedy if saved.moves_to(target) else f"load it with remeasure=False, then {remedy}"):
        return replan(converted, effort=_effort(plan), whole=may_run_whole, remeasure=is_asked)


def _effort(plan: NetworkPlan) -> Effort:
    """What a plan is measured anew with: one that chose kernels made for the weights may compile such kernels again."""
    chosen = [by_name(layer.method, layer.problem.device) for layer in plan.layers.values() if layer.method]
    return "best" if any(method.compiles_per_filter for method in chosen) else "fast"


def load_plan(path: str | os.PathLike[str]) -> NetworkPlan:
    """The plan in a file that :func:`save` wrote, as it was planned, on whatever machine. Nothing else is read.

    Raises:
        ArtifactError, OSError: as :func:`load` does.
    """
    path = path_of(path, "model.escort")
    data = _file_bytes(path)
    with blaming(path, _REMEDY):
        return _open(path, data)[1]


@dataclass(frozen=True)
class _Saved:
    """The content of a file, of which nothing is built yet.

    Attributes:
        layers: the records of the layers by path.
        programs: the records of programs by path; the path of the whole network is the empty text.
        needs_model: whether code of the model's own runs in the network.
    """

    path: Path
    container: Container
    plan: NetworkPlan
    layers: Mapping[str, Mapping[str, Any]]
    programs: Mapping[str, Mapping[str, Any]]
    needs_model: bool

    @property
    def device(self) -> torch.device:
        """What it was planned for."""
        return torch.device(self.plan.device)

    def moves_to(self, target: torch.device) -> bool:
        """Whether that is a device of another type."""
        return target.type != self.device.type


def _read(path: Path) -> _Saved:
    data = _file_bytes(path)
    with blaming(path, _REMEDY):
        container, plan = _open(path, data)
        architecture = parse(container.metadata["architecture"])
        layers, programs = architecture["layers"], architecture["programs"]
        needs_model = "" not in programs or bool(build.own_paths(layers))
        return _Saved(path, container, plan, layers, programs, needs_model)


def _file_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file; name one that escort.save wrote")
    return path.read_bytes()


def _open(path: Path, data: bytes) -> tuple[Container, NetworkPlan]:
    """The content of a file and its plan, both checked."""
    container = Container(data)
    _check_version(path, container.metadata)
    plan = NetworkPlan.from_json(parse(container.metadata["plan"]))
    if sum(map(math.prod, plan.input_shapes)) > MAX_NUMBERS:
        raise ValueError(f"no network takes inputs of shape {plan.input_shapes}")
    return container, plan


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    file_format, version = metadata.get("format"), metadata.get("version")
    if (file_format, version) == (FORMAT, str(VERSION)):
        return
    problem = (
        f"its format is {file_format} {version}, written by escort {metadata.get('escort')}; "
        f"this version reads {FORMAT} {VERSION}"
    )
    if file_format == FORMAT and version in ("1", "2"):
        raise ArtifactError(f"{path}: {problem}; convert the model again, or load it with the version that wrote it")
    raise ValueError(problem)


def _nearest(planned: torch.device) -> torch.device:
    """The device here that is most like the one planned for."""
    if planned.type == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    is_here = planned.index is not None and planned.index < torch.cuda.device_count()
    return planned if is_here else find_device("cuda")


def _check_request(saved: _Saved, target: torch.device, model: nn.Module | None, remeasure: bool | None) -> None:
    """Raises ArtifactError where the file does not go with the arguments of :func:`load`."""
    path, plan = saved.path, saved.plan
    if saved.moves_to(target) and remeasure is False:
        raise ArtifactError(f"{path}: it was planned for {plan.device}, not for {target}; leave out remeasure=False")
    if saved.moves_to(target) and plan.precision in ("fp16", "bf16"):
        remedy = "load it where there is a GPU, or convert the model in float32 on the CPU"
        raise ArtifactError(f"{path}: it computes in {plan.precision}, which takes a GPU; {remedy}")
    if saved.needs_model and model is None:
        raise ArtifactError(
            f"{path}: it does not hold the whole program; pass load a new model of the class that was converted, or "
            "name it by --model on the command line"
        )
    if not saved.needs_model and model is not None:
        raise ArtifactError(f"{path}: it holds its own program; leave out the model")


def _carry(saved: _Saved, target: torch.device, path: Path) -> None:
    """Takes in the kernels that were saved with a network. Raises ArtifactError unless they are for the device."""
    if target.type != "cuda":
        raise ArtifactError(f"{saved.path}: kernels are for GPUs, and it is loaded on the CPU; leave out kernels")
    if (expected := saved.container.metadata.get("kernels")) is None:
        raise ArtifactError(f"{saved.path}: it was saved without kernels; leave them out, or save it with kernels=True")
    binaries = carried.read(path, expected)
    carried.check_fit(path, binaries, target)
    carry(binaries)
    _log.debug("took in %d kernels of %s", len(binaries), path)


def _check_kept(saved: _Saved, plan: NetworkPlan) -> None:
    """Raises ArtifactError where a layer is not run by its method, although kernels came with the network."""
    for name, layer in plan.layers.items():
        method = by_name(saved.plan.layers[name].method, layer.problem.device)
        if method.name != layer.method:
            reason = method.unsupported(layer.problem) or f"{method.name} does not take {layer.problem}"
            raise ArtifactError(f"{saved.path}: layer {name}: {reason}; or {_SAVE_AGAIN}")


def _check_here(saved: _Saved, target: torch.device) -> None:
    """Raises ArtifactError where a layer's method takes something that is not installed."""
    names = [name for name, record in saved.layers.items() if record["type"] == SPARSE and not saved.moves_to(target)]
    for name in names:
        method = by_name(saved.plan.layers[name].method, str(saved.device))
        if (reason := method.missing()) is not None:
            raise ArtifactError(
                f"{saved.path}: layer {name} was planned for {method.name}: {reason}; or pass remeasure=True, which "
                "measures the other methods"
            )


def _lay_out(saved: _Saved, network: nn.Module, *, is_carried: bool) -> None:
    """Lays out layers on all cores. What has to be compiled for its weights waits for the call that needs it.

    Args:
        is_carried: whether the kernels came with the network.
    """
    remedy = "convert the model again, or load it with device='cpu'"
    if is_carried:
        remedy = _SAVE_AGAIN
    jobs = []
    for layer in network.modules():
        if isinstance(layer, SparseConv2d):
            method = by_name(layer.plan.method, layer.plan.problem.device)
            jobs += [layer.prepare] if is_carried or not method.compiles_per_filter else []
    with blaming(saved.path, remedy):
        on_all_cores(jobs)


def _too_much(plan: NetworkPlan, works: list[Work]) -> str | None:
    """What it takes to run all layers that nobody asked to run, where that is much memory or takes long."""
    problems = [layer.problem for layer in plan.layers.values()]
    shapes = [*plan.input_shapes, *(shape for p in problems for shape in (p.input_shape, p.output_shape))]
    numbers = max([0, *map(math.prod, shapes), *(work.at_a_time for work in works)])
    written = sum(work.written for work in works)
    multiplied = sum(map(multiply_adds, problems)) + sum(work.flop for work in works) // 2
    if (
        numbers > MAX_MEASURED_NUMBERS
        or written > MAX_MEASURED_WRITES
        or multiplied > MAX_MEASURED_MULTIPLY_ADDS
        or max(map(lowered_numbers, problems), default=0) > MAX_LOWERED
    ):
        return f"{numbers:,} numbers in memory and {multiplied:.1e} multiply-adds"
    return None


def _build(saved: _Saved, target: torch.device, model: nn.Module | None) -> tuple[nn.Module, NetworkPlan, list[Work]]:
    """The network on a device, its plan for it, and what its programs take on the example."""
    container = saved.container
    with blaming(saved.path, _REMEDY):
        plan = _transfer(saved.plan, target)
        layers = build.restore_layers(saved.layers, container, plan)
        listings = build.listings(saved.programs)
    with blaming(saved.path, _REMEDY if model is None else "pass a new model of the class that was converted"):
        copied = None if model is None else plain_copy(unwrap(model))
        if copied is not None:
            layers |= build.own_layers(saved.layers, copied)
        network, programs = build.assemble(listings, layers, container, copied)
        if container.left:
            raise ValueError(f"nothing in the network uses its tensor {container.left[0]}")
        unused = layers.keys() - layers_in(network).keys()
        if unused:
            raise ValueError(f"nothing in the network uses its layer {min(unused)}")
    with blaming(saved.path, _REMEDY):
        build.move(network, saved.device, target)
        works = [rehearse(program, target) for program in programs.values()]
    if plan.memory_format == "channels_last" and not plan.kept_dense:  # for what is left of torch's convolutions
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    chosen = {name: layer.plan for name, layer in layers.items() if isinstance(layer, SparseConv2d)}
    others = {} if saved.moves_to(target) else plan.layers  # of a network that stayed dense
    return network, replace(plan, layers=others | chosen), works


def _transfer(plan: NetworkPlan, target: torch.device) -> NetworkPlan:
    """The plan for another device; on one of another type nothing is chosen yet."""
    moves = target.type != torch.device(plan.device).type
    precision: Precision = "fp32" if moves and plan.precision == "tf32" else plan.precision
    layers = {}
    for name, layer in plan.layers.items():
        layer = replace(layer, problem=replace(layer.problem.on(str(target)), precision=precision))
        layers[name] = replace(layer, method="", candidates=()) if moves else layer
    if moves and plan.methods:
        _log.warning("the choice among %s is among all methods of %s now", ", ".join(plan.methods), target)
    methods = () if moves else plan.methods
    batching: dict[str, Any] = {"samples": None, "favor": "latency", "is_favor_asked": False} if moves else {}
    return replace(plan, layers=layers, device=str(target), precision=precision, methods=methods, **batching)
