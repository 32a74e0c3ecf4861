"""A network's convolutions: which are called, their plans, and the layers that run as planned in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import nn

from escort.filter import SparseFilter
from escort.layers import SparseConv2d
from escort.methods import by_name
from escort.network.check import Request
from escort.network.context import naming, running_out
from escort.network.example import Example
from escort.network.fused import FusedConv2d, unsupported
from escort.network.passes.operations import replace_module
from escort.planner import Plan, plan_layers
from escort.planner.cores import on_all_cores
from escort.planner.plan import Layer
from escort.problem import TORCH_DTYPE, Epilogue, MemoryFormat, Problem
from escort.report import Console, Description

_PLANNING = "planning"


@dataclass(frozen=True)
class Swapped:
    """A network whose convolutions run as planned, their plans, and which were left alone for what reason."""

    network: nn.Module
    layers: dict[str, Plan]
    skipped: dict[str, str]


def record_calls(network: nn.Module, skipped: Mapping[str, str], example: Example) -> dict[str, torch.Size]:
    """The input shape of each convolution that is not skipped, in the order of their first calls on the example."""
    modules = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, FusedConv2d | nn.Conv2d) and name not in skipped
    }
    inner = {f"{name}.conv" for name in modules}  # of a FusedConv2d
    shapes: dict[str, torch.Size] = {}
    with _hooks() as hooks, torch.inference_mode():
        for name in (name for name in modules if name not in inner):

            def record(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                shapes.setdefault(name, args[0].shape)

            hooks.append(modules[name].register_forward_pre_hook(record))
        example.run(network)
    if not shapes:
        reasons = "".join(f"; layer {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"the model runs no 2-d convolution on this example; there is nothing to convert{reasons}")
    return shapes


def swap(
    network: nn.Module,
    calls: Mapping[str, torch.Size],
    memory_format: MemoryFormat,
    skipped: Mapping[str, str],
    request: Request,
) -> Swapped:
    """Plans the convolutions of a network that are called, and puts a :class:`SparseConv2d` in the place of each.

    Args:
        network: is written to.
        calls: what :func:`record_calls` returned.
        skipped: the convolutions that are already left alone, and why.
    """
    layers: dict[str, Layer] = {}
    skipped = dict(skipped)
    for name, shape in calls.items():
        module = network.get_submodule(name)
        reason = None
        if isinstance(module, nn.Conv2d):  # of a model without a graph
            reason = request.left_alone(name, module) or unsupported(module)
        if len(shape) != 4:
            reason = f"is called without a batch, on shape {tuple(shape)}"
        if reason:
            skipped[name] = reason
            continue
        with running_out(f"layer {name}"):
            layers[name] = _layer(module, shape, name, memory_format, request)
    return Swapped(network, plan_into(network, layers, request), skipped)


def plan_into(network: nn.Module, layers: Mapping[str, Layer], request: Request) -> dict[str, Plan]:
    """Plans layers of a network, and puts a :class:`SparseConv2d` in the place of each."""
    plans: dict[str, Plan] = {}
    compiled: list[SparseConv2d] = []
    with _progress(len(layers), request.progress) as (advance, preparing):
        planned = plan_layers(list(layers.values()), request.compile_budget_s, preparing, methods=request.methods)
        for name, layer in layers.items():
            with running_out(f"layer {name}"), naming(name):
                plans[name] = next(planned)
                sparse = SparseConv2d(layer.sparse_filter, layer.bias, plans[name], name)
            replace_module(network, name, sparse)
            if by_name(plans[name].method, plans[name].problem.device).compiles_per_filter:
                compiled.append(sparse)
            advance()
        with running_out("the whole network"):  # those that took over a plan have their kernels still to compile
            on_all_cores([sparse.prepare for sparse in compiled], preparing)
    return plans


def _layer(module: nn.Module, shape: torch.Size, name: str, memory_format: MemoryFormat, request: Request) -> Layer:
    """What to plan for a convolution that is called on a shape."""
    if isinstance(module, FusedConv2d):
        conv, activation, residual = module.conv, module.activation, module.residual
    else:
        assert isinstance(module, nn.Conv2d)
        conv, activation, residual = module, "none", False
    epilogue, precision = Epilogue(conv.bias is not None, residual, activation), request.precision
    with naming(name):
        if conv.weight.dtype is not TORCH_DTYPE[precision]:
            raise ValueError(
                f"weights of {conv.weight.dtype} among others of {TORCH_DTYPE[precision]}; convert the model to one "
                "type"
            )
        device = str(conv.weight.device)
        problem = Problem.of(
            conv, shape, epilogue=epilogue, precision=precision, device=device, memory_format=memory_format
        )
        sparse_filter = SparseFilter.from_dense(conv.weight, conv.groups)
    return Layer(problem, sparse_filter, None if conv.bias is None else conv.bias.detach().float())


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _progress(layers: int, shown: bool) -> Iterator[tuple[Callable[[], None], Callable[[int, int], None]]]:
    """A progress bar on stderr: what to call when a layer is planned, and when some of the kernels are compiled."""
    columns = Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task(_PLANNING, total=layers)

        def preparing(done: int, kernels: int) -> None:
            ready = done == kernels
            bar.update(task, description=_PLANNING if ready else f"{_PLANNING}, preparing {done} of {kernels} kernels")

        yield lambda: bar.advance(task), preparing
