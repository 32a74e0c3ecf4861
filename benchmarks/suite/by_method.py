"""A converted network with some of its layers run by one method, or in no time; everything around them stays."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.suite.networks import BOTH_FORMATS, NetworkRace, converted_alone
from escort.layers import SparseConv2d
from escort.methods import Method
from escort.network.check import Effort, Request
from escort.network.choose import choose
from escort.network.model import ConvertedModel
from escort.network.passes.operations import replace_module
from escort.network.swap import Swapped, Unplanned, likely
from escort.planner import Plan, plan_layers
from escort.planner.machine import Machine
from escort.planner.plan import Layer, Planned
from escort.problem import TORCH_MEMORY_FORMAT, MemoryFormat, Precision


def convert_keeping(
    model: nn.Module,
    x: Tensor,
    *,
    precision: Precision,
    effort: Effort,
    formats: Sequence[MemoryFormat] = BOTH_FORMATS,
    only_likely: bool = False,
) -> tuple[ConvertedModel, list[Swapped]]:
    """The model converted, and the networks that it was chosen from: one for each memory format.

    All are planned, whatever the effort: a rival may be fastest in another than ours. The one that was chosen is as it
    was chosen, with its dense layers; the others are as they were planned.

    Args:
        formats: memory formats, of which only those are planned, where there is a network for any of them.
        only_likely: choose from those alone that the effort would plan.
    """
    networks: list[Swapped] = []
    tried = set[MemoryFormat]()

    def keep(dense: nn.Module, candidates: Sequence[Swapped], *args: Any) -> ConvertedModel:
        chosen = choose(dense, [each for each in candidates if _memory_format(each) in tried], *args)
        networks.clear()
        for candidate in {id(candidate.network): candidate for candidate in reversed(candidates)}.values():
            if candidate.network is not chosen.network:
                candidate.put_in_place()  # what was raced last may be another alternative
            layers = {name: _sparse(candidate.network, name).plan for name in candidate.layers}
            networks.insert(0, replace(candidate, layers=layers, modules={}))
        return chosen

    def all_of(
        found: Mapping[MemoryFormat, Unplanned], request: Request
    ) -> tuple[Mapping[MemoryFormat, Unplanned], dict[str, str]]:
        wanted = {name: network for name, network in found.items() if name in formats} or found
        tried.update(likely(wanted, request)[0] if only_likely else wanted)
        return wanted, {}

    stage = "escort.network.convert"
    with mock.patch(f"{stage}.choose", keep), mock.patch(f"{stage}.likely", all_of):
        converted = converted_alone(model, x, NetworkRace(precision=precision, effort=effort))
    return converted, networks


def run_by(network: nn.Module, names: Sequence[str], method: Method, *, as_torch: bool = False) -> nn.Module:
    """A copy of a converted network, some layers of which run by a method.

    A layer that the method cannot run in the network's memory format is run in the other one, and what it writes is
    converted.

    Args:
        as_torch: by what the method does as torch alone would; else by the config that is fastest for the first layer
            of its problem.

    Raises:
        ValueError: where the method can run a layer in neither, or has nothing that torch alone would do.
    """
    layers = [_layer(network, name, method) for name in names]
    planned = [_as_torch(layer, method) for layer in layers] if as_torch else _fastest(layers, method)
    new = copy.deepcopy(network)
    for name, layer, (plan, prepared) in zip(names, layers, planned, strict=True):
        module = SparseConv2d(layer.sparse_filter, layer.bias, plan, name, slope=layer.slope)
        module.run_by(prepared)
        wanted = _sparse(network, name).plan.problem.memory_format
        replace_module(new, name, module if plan.problem.memory_format == wanted else _InFormat(module, wanted))
    if layers[0].problem.device_type == "cuda":
        torch.cuda.synchronize()  # any stream may read the tables from now on
    return new


def run_free(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of a converted network, some layers of which take no time.

    Its first call computes them. Every later one reads what they gave then.
    """
    new = copy.deepcopy(network)
    for name in names:
        replace_module(new, name, _Once(_sparse(new, name)))
    return new


def _memory_format(swapped: Swapped) -> MemoryFormat:
    return next(iter(swapped.layers.values())).problem.memory_format


def _sparse(network: nn.Module, name: str) -> SparseConv2d:
    layer = network.get_submodule(name)
    if not isinstance(layer, SparseConv2d):
        raise ValueError(f"layer {name} was left alone in the conversion, which says why in its plan's `skipped`")
    return layer


def _layer(network: nn.Module, name: str, method: Method) -> Layer:
    """What a method is given of a layer."""
    layer = _sparse(network, name)
    problem = layer.plan.problem
    if method.unsupported(problem) is not None and problem.device_type == "cuda":
        other: MemoryFormat = "channels_last" if problem.memory_format == "contiguous" else "contiguous"
        problem = replace(problem, memory_format=other)
    if reason := method.unsupported(problem):
        raise ValueError(f"layer {name}: {method.name} cannot run it: {reason}")
    return Layer(problem, layer.filter, layer.bias, layer.slope)


def _fastest(layers: Sequence[Layer], method: Method) -> list[Planned]:
    firsts = {layer.problem: layer for layer in reversed(layers)}
    plans = dict(zip(firsts, plan_layers(list(firsts.values()), 0.0, methods=[method]), strict=True))
    planned = []
    for layer in layers:
        plan, prepared = plans[layer.problem]
        if layer is not firsts[layer.problem]:
            prepared = layer.prepare(method, method.config_type(**plan.config))
        planned.append(Planned(plan, prepared))
    return planned


def _as_torch(layer: Layer, method: Method) -> Planned:
    config = next(iter(method.benchmark_configs(layer.problem, layer.sparse_filter)), None)
    if config is None:
        raise ValueError(f"{method.name} has nothing that torch alone would do")
    machine = Machine.here(layer.problem.device)
    plan = Plan(layer.problem, method.name, asdict(config), (), machine)
    return Planned(plan, layer.prepare(method, config))


class _InFormat(nn.Module):
    """A layer, with what it writes in another memory format."""

    def __init__(self, layer: nn.Module, memory_format: MemoryFormat) -> None:
        super().__init__()
        self.layer, self.memory_format = layer, TORCH_MEMORY_FORMAT[memory_format]

    def forward(self, *args: Tensor) -> Tensor:
        return self.layer(*args).contiguous(memory_format=self.memory_format)


class _Once(nn.Module):
    """A layer that computes in its first call, and returns the same tensor in every later one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: nn.Module | None = layer
        self.result: Tensor | None = None

    def forward(self, *args: Tensor) -> Tensor:
        if self.result is None:
            assert self.layer is not None
            self.result, self.layer = self.layer(*args), None
        return self.result
