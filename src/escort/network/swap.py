"""A network's convolutions: which are called, their plans, and the layers that run as planned in their place."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from escort.filter import SparseFilter
from escort.layers import FusedConv2d, SparseConv2d
from escort.layers.weight import is_outside
from escort.methods import by_name
from escort.network.check import Request
from escort.network.context import naming, running_out
from escort.network.original import Original
from escort.network.passes.operations import replace_module
from escort.network.tracing.conv_types import unsupported
from escort.planner import Plan, plan_layers
from escort.planner.cores import BUSY, Watch, on_all_cores
from escort.planner.plan import Layer
from escort.planner.planner import are_known, predicted_us
from escort.problem import TORCH_DTYPE, Epilogue, MemoryFormat, Problem
from escort.runtime.stand_in import adopt

_log = logging.getLogger(__name__)

#: Of the predicted time in channels_last: a network is planned in NCHW below the second share of it, and in NCHW alone
#: below the first. What models do not know, cuDNN and what lies between the layers, is faster in channels_last.
_NCHW_PAYS = 0.6, 0.75


@dataclass(frozen=True)
class Unplanned:
    """A network, its convolutions that are to be planned, and which are left alone for what reason."""

    network: nn.Module
    layers: dict[str, Layer]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Swapped:
    """A network whose convolutions run as planned, their plans, and which were left alone for what reason."""

    network: nn.Module
    layers: dict[str, Plan]
    skipped: dict[str, str]


def record_calls(network: nn.Module, skipped: dict[str, str], original: Original) -> dict[str, torch.Size]:
    """The input shape of each convolution that can be swapped, in the order of their first calls on the example.

    Args:
        skipped: the convolutions that are left alone, and why; those that are found to be are written to it.
    """
    modules = {n: m for n, m in network.named_modules() if isinstance(m, FusedConv2d | nn.Conv2d) and n not in skipped}
    inner = {f"{name}.conv" for name, module in modules.items() if isinstance(module, FusedConv2d)}
    modules = {name: module for name, module in modules.items() if name not in inner}
    shapes: dict[str, torch.Size] = {}
    uses = _Uses({name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)})
    with _hooks() as hooks:
        for name, module in modules.items():

            def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                shapes.setdefault(name, next(iter((*args, *kwargs.values()))).shape)

            hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))
        with uses:
            original.run_afresh(network)
    for name, module in original.model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and name not in shapes and name not in skipped:
            used = any(other == name or other.startswith((f"{name}_", f"{name}.")) for other in (*shapes, *skipped))
            skipped |= {} if used else {name: "is not called on the example"}
    for name in uses.found & shapes.keys():
        del shapes[name]
        skipped[name] = "the code around it computes with its weight"
    return shapes


def check_calls(calls: Mapping[str, torch.Size], skipped: Mapping[str, str]) -> None:
    """Raises ValueError where no convolution is called, with the reasons why those that there are stay as they are."""
    if not calls:
        reasons = "".join(f"; layer {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"the model runs no 2-d convolution on this example; there is nothing to convert{reasons}")


class _Uses(TorchFunctionMode):
    """Finds the convolutions whose weight is used by anything but themselves."""

    def __init__(self, convolutions: Mapping[str, nn.Conv2d]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._names = {id(conv.weight): name for name, conv in convolutions.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_outside(func) and func is not F.conv2d and func is not torch.conv2d:
            for value in tree_leaves((args, kwargs)):
                if id(value) in self._names:
                    self.found.add(self._names[id(value)])
        return func(*args, **(kwargs or {}))


def find_layers(
    network: nn.Module,
    calls: Mapping[str, torch.Size],
    memory_format: MemoryFormat,
    skipped: Mapping[str, str],
    request: Request,
) -> Unplanned:
    """The convolutions of a network that are called and that can be planned.

    Args:
        calls: what :func:`record_calls` returned.
        skipped: the convolutions that are already left alone, and why.
    """
    layers: dict[str, Layer] = {}
    skipped = dict(skipped)
    for name, shape in calls.items():
        module = network.get_submodule(name)
        reason = None
        if isinstance(module, nn.Conv2d):  # of a module without a graph
            reason = request.left_alone(name, module) or unsupported(module)
        if len(shape) != 4:
            reason = f"is called without a batch, on shape {tuple(shape)}"
        if reason:
            skipped[name] = reason
            continue
        with running_out(f"layer {name}"):
            layers[name] = _layer(module, shape, name, memory_format, request)
    return Unplanned(network, layers, skipped)


def likely(
    networks: Mapping[MemoryFormat, Unplanned], request: Request
) -> tuple[dict[MemoryFormat, Unplanned], dict[str, str]]:
    """The networks that are worth planning by their methods' predictions, and why the others are not.

    Where time may be spent on compiling for the weights, all are planned. Where all plans of one are known, so that an
    earlier conversion chose it, it is the only one. Layers of mostly nonzeros do not count: the dense method will run
    them. Where methods with a model run a layer in one memory format alone, nothing can be said.
    """
    if len(networks) == 1 or request.compile_budget_s > 0.0:
        return dict(networks), {}
    layers = {memory_format: list(network.layers.values()) for memory_format, network in networks.items()}
    known = [name for name in networks if not request.remeasure and are_known(layers[name], request.methods)]
    if len(known) == 1:
        reason = f"the plans of all layers are known in {known[0]} alone; effort='best' tries it"
        return {known[0]: networks[known[0]]}, {name: reason for name in networks if name != known[0]}
    times = {
        name: predicted_us([layer for layer in layers[name] if layer.sparse_filter.sparsity > 0.5], request.methods)
        for name in networks
    }
    if len({tuple(time_us is None for time_us in times_us) for times_us in times.values()}) > 1:
        return dict(networks), {}
    totals_us = {name: sum(time_us or 0.0 for time_us in times_us) for name, times_us in times.items()}
    share = totals_us["contiguous"] / totals_us["channels_last"] if totals_us["channels_last"] else math.nan
    slower: dict[MemoryFormat, str] = {}
    if share > _NCHW_PAYS[1]:
        slower["contiguous"] = f"its layers are predicted to take {share:.2f} of the time in channels_last"
    elif share < _NCHW_PAYS[0]:
        slower["channels_last"] = f"layers in NCHW are predicted to take {share:.2f} of its time"
    kept = {name: network for name, network in networks.items() if name not in slower}
    return kept, {name: f"{reason}; effort='best' tries it" for name, reason in slower.items()}


def swap(unplanned: Unplanned, request: Request) -> Swapped:
    """Plans the layers of a network, and puts a :class:`SparseConv2d` in the place of each."""
    return Swapped(unplanned.network, plan_into(unplanned.network, unplanned.layers, request), unplanned.skipped)


def plan_into(network: nn.Module, layers: Mapping[str, Layer], request: Request) -> dict[str, Plan]:
    """Plans layers of a network, and puts a :class:`SparseConv2d` in the place of each."""
    plans: dict[str, Plan] = {}
    slow_to_lay_out: list[SparseConv2d] = []
    estimate = request.progress.estimate
    estimate.begin(len(layers))
    watch = Watch()
    planned = plan_layers(
        list(layers.values()),
        request.compile_budget_s,
        estimate.kernels,
        methods=request.methods,
        remeasure=request.remeasure,
    )
    for name, layer in layers.items():
        old = network.get_submodule(name)
        with running_out(f"layer {name}"), naming(name):
            plans[name] = next(planned)
            unfolded = getattr(old, "unfolded", None)
            sparse = SparseConv2d(layer.sparse_filter, layer.bias, plans[name], name, unfolded, layer.slope)
        adopt(sparse, old)
        replace_module(network, name, sparse)
        device = layer.problem.device
        if device != "cpu" or by_name(plans[name].method, device).compiles_per_filter:
            slow_to_lay_out.append(sparse)
        estimate.layer()
        _log.debug("layer %s: %s", name, _summary(plans[name]))
    if request.device.type == "cpu":
        _warn_if_busy(plans, watch.others_share())
    with running_out("the whole network"):  # laid out side by side, as the first call would do one by one
        on_all_cores([sparse.prepare for sparse in slow_to_lay_out], estimate.kernels)
    request.progress.done(f"planned {len(plans)} layers")
    return plans


def _warn_if_busy(plans: Mapping[str, Plan], others_share: float) -> None:
    """Says in the log where times are worth little, since others ran meanwhile."""
    disturbed = sum(not plan.is_steady for plan in plans.values())
    if disturbed or others_share > BUSY:
        _log.warning(
            "other processes took %.0f%% of the time of this machine's cores, and disturbed the times of %d of %d "
            "layers: choices may be wrong. Plans of such layers are not stored; convert again once it is quiet",
            *(100 * others_share, disturbed, len(plans)),
        )


def _summary(plan: Plan) -> str:
    """What was chosen, and among what, for the log."""
    times_us = [candidate.time_us for candidate in plan.candidates if candidate.time_us is not None]
    time = "not timed" if plan.time_us is None else f"{plan.time_us:.1f} us"
    dense = "not timed" if plan.dense_time_us is None else f"{plan.dense_time_us:.1f} us"
    candidates = f"{len(times_us)} of {len(plan.candidates)} candidates timed"
    return f"{plan.method} {plan.config}, {time}, dense {dense}, {plan.problem.memory_format}, {candidates}"


def _layer(module: nn.Module, shape: torch.Size, name: str, memory_format: MemoryFormat, request: Request) -> Layer:
    """What to plan for a convolution that is called on a shape."""
    if isinstance(module, FusedConv2d):
        conv, zeros, epilogue, slope = module.conv, module.zeros, module.epilogue, module.slope
    else:
        assert isinstance(module, nn.Conv2d)
        conv, zeros, epilogue, slope = module, (0, 0, 0, 0), Epilogue(module.bias is not None), None
    precision = request.precision
    with naming(name):
        if conv.weight.dtype is not TORCH_DTYPE[precision]:
            raise ValueError(
                f"weights of {conv.weight.dtype} among others of {TORCH_DTYPE[precision]}; convert the model to one "
                "type"
            )
        device = str(conv.weight.device)
        problem = Problem.of(
            *(conv, shape),
            zeros=zeros,
            epilogue=epilogue,
            precision=precision,
            device=device,
            memory_format=memory_format,
        )
        sparse_filter = SparseFilter.from_dense(conv.weight, conv.groups)
    bias, slope = (None if tensor is None else tensor.detach().float() for tensor in (conv.bias, slope))
    return Layer(problem, sparse_filter, bias, slope)


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()
