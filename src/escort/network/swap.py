"""A network's convolutions: which are called, their plans, and the layers that run as planned in their place."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from escort.filter import SparseFilter
from escort.layers import FusedConv2d, SparseConv2d, Squeeze
from escort.layers.weight import is_outside
from escort.methods import by_name
from escort.network.check import Request
from escort.network.context import naming, running_out
from escort.network.original import Original
from escort.network.passes.operations import replace_module
from escort.network.passes.squeezes import ONE_LAUNCH
from escort.network.tracing.conv_types import unsupported
from escort.planner import Plan, plan_layers
from escort.planner.cores import BUSY, Watch
from escort.planner.follow import follow
from escort.planner.plan import Candidate, Layer
from escort.planner.planner import known_us, predicted_us
from escort.problem import TORCH_DTYPE, Epilogue, MemoryFormat, Problem
from escort.runtime.stand_in import adopt

_log = logging.getLogger(__name__)

#: Of the predicted time in channels_last: a network is planned in NCHW below the second share of it, and in NCHW alone
#: below the first. What models do not know, cuDNN and what lies between the layers, is faster in channels_last.
_NCHW_PAYS = 0.6, 0.75
#: The same of measured times, which include cuDNN's.
_NCHW_PAID = 0.75, 1.1
#: A layer of which models know nothing in one memory format, as of a first one of three channels, takes up to so many
#: times there what it takes in the other: the dense method can run it.
_UNKNOWN = 2.0
#: A dense method is tried in the network where it takes at most so many times what the choice takes alone.
_CLOSE = 1.15


@dataclass(frozen=True)
class Unplanned:
    """A network, its convolutions that are to be planned, and which are left alone for what reason."""

    network: nn.Module
    layers: dict[str, Layer]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Swapped:
    """A network whose convolutions run as planned, their plans, and which were left alone for what reason.

    Attributes:
        modules: where the network has alternatives, the layers of this one in which they differ.
    """

    network: nn.Module
    layers: dict[str, Plan]
    skipped: dict[str, str]
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    def put_in_place(self) -> None:
        """Makes the network this alternative of it."""
        for name, module, around, child in self._places:
            if around[child] is not module:
                replace_module(self.network, name, module)

    @cached_property
    def _places(self) -> list[tuple[str, nn.Module, dict[str, nn.Module | None], str]]:
        """The layers with what each lies in, and its name there: looking for them would count in the network's time."""
        places = []
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            places.append((name, module, self.network.get_submodule(parent)._modules, child))
        return places


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
            below = (f"{name}_", f"{name}.") if name else ("",)  # the model itself, which has a name in its graph
            used = any(other == name or other.startswith(below) for other in (*shapes, *skipped))
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
        module, reason = network.get_submodule(name), None
        if isinstance(network.get_submodule(name.rpartition(".")[0]), Squeeze):
            skipped[name] = ONE_LAUNCH
            continue
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
    """The networks that are worth planning by what is known or predicted of their layers, and why the others are not.

    Where time may be spent on compiling for the weights, all are planned. Where all plans of one are known, so that an
    earlier conversion chose it, it is the only one; where those of all are, their times count. Else predictions do, and
    only of layers of mostly zeros: the dense method will run the others.
    """
    if len(networks) == 1 or request.compile_budget_s > 0.0:
        return dict(networks), {}
    known: dict[MemoryFormat, dict[str, float]] = {}
    for name, network in {} if request.remeasure else networks.items():
        if (took := known_us(list(network.layers.values()), request.methods)) is not None:
            known[name] = dict(zip(network.layers, took, strict=True))
    slower: dict[MemoryFormat, str] = {}
    # In channels_last those of a squeeze-excitation are one launch.
    shared = [name for name in networks["contiguous"].layers if name in networks["channels_last"].layers]
    if len(known) == 1:
        reason = f"the plans of all layers are known in {next(iter(known))} alone"
        slower = {name: reason for name in networks if name not in known}
    elif known:
        of_both = {name: [times_us[layer] for layer in shared] for name, times_us in known.items()}
        slower = _slower(of_both["contiguous"], of_both["channels_last"], _NCHW_PAID, "took")
    else:
        sparse = [name for name in shared if networks["contiguous"].layers[name].sparse_filter.sparsity >= 0.5]
        layers = {name: [network.layers[layer] for layer in sparse] for name, network in networks.items()}
        predicted = {name: predicted_us(layers[name], request.methods) for name in networks}
        slower = _slower(predicted["contiguous"], predicted["channels_last"], _NCHW_PAYS, "are predicted to take")
    kept = {name: network for name, network in networks.items() if name not in slower}
    return kept, {name: f"{reason}; effort='best' tries it" for name, reason in slower.items()}


def _slower(
    nchw_us: Sequence[float | None], last_us: Sequence[float | None], bounds: tuple[float, float], take: str
) -> dict[MemoryFormat, str]:
    """The memory format that is not worth planning, and why, where the time in NCHW is beyond bounds.

    Args:
        nchw_us, last_us: of each layer. Where one is not known, it may be anything up to a few times the other.
        bounds: shares of the time in channels_last.
        take: how the layers take it, for the reason.
    """
    pairs = list(zip(nchw_us, last_us, strict=True))
    least = sum(nchw or 0.0 for nchw, _ in pairs), sum(last or 0.0 for _, last in pairs)
    most = (
        sum(nchw or _UNKNOWN * (last or 0.0) for nchw, last in pairs),
        sum(last or _UNKNOWN * (nchw or 0.0) for nchw, last in pairs),
    )
    if least[0] > bounds[1] * most[1]:
        share = f"{'at least ' if least[1] < most[1] else ''}{least[0] / most[1]:.2f}"
        return {"contiguous": f"its layers {take} {share} of the time in channels_last"}
    if most[0] < bounds[0] * least[1]:
        share = f"{'at most ' if least[0] < most[0] else ''}{most[0] / least[1]:.2f}"
        return {"channels_last": f"layers in NCHW {take} {share} of its time"}
    return {}


def swap(unplanned: Unplanned, request: Request) -> Swapped:
    """Plans the layers of a network, and puts a :class:`SparseConv2d` in the place of each."""
    return Swapped(unplanned.network, plan_into(unplanned.network, unplanned.layers, request), unplanned.skipped)


def plan_into(network: nn.Module, layers: Mapping[str, Layer], request: Request) -> dict[str, Plan]:
    """Plans layers of a network, and puts a :class:`SparseConv2d` in the place of each."""
    plans: dict[str, Plan] = {}
    estimate = request.progress.estimate
    estimate.begin(len(layers))
    watch = Watch()
    if request.pinned is not None:
        planned = follow(list(layers.values()), [request.pinned.layers[name] for name in layers])
    else:
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
            plans[name], prepared = next(planned)
            unfolded = getattr(old, "unfolded", None)
            sparse = SparseConv2d(layer.sparse_filter, layer.bias, plans[name], name, unfolded, layer.slope)
            sparse.run_by(prepared)
        adopt(sparse, old)
        replace_module(network, name, sparse)
        estimate.layer()
        _log.debug("layer %s: %s", name, _summary(plans[name]))
    if request.device.type == "cpu":
        if request.pinned is None:
            _warn_if_busy(plans, watch.others_share())
    else:  # any stream may read the tables from now on
        for stream in (torch.cuda.default_stream(request.device), torch.cuda.current_stream(request.device)):
            stream.synchronize()
    request.progress.done(f"planned {len(plans)} layers")
    return plans


def alternatives(swapped: Swapped, request: Request) -> list[Swapped]:
    """A network on a GPU as it was planned, and with more of its layers by dense methods.

    A layer's times are those of the layer alone. In a network its input may lie in a cache, and kernels overlap: where
    a dense method is nearly as fast alone, it may be the faster one there.
    """
    plans = swapped.layers
    denser = {name: plan for name, old in plans.items() if (plan := _by_dense_method(old)) is not None}
    close = {name: plan for name, plan in denser.items() if _time_us([plan]) <= _CLOSE * _time_us([plans[name]])}
    sets = [close]
    if len(denser) > len(close) and _time_us({**plans, **denser}.values()) <= _CLOSE * _time_us(plans.values()):
        sets.append(denser)
    if request.device.type == "cpu" or request.pinned is not None or (not close and len(sets) == 1):
        return [swapped]
    made: dict[str, nn.Module] = {}
    try:
        for name, plan in (denser if len(sets) > 1 else close).items():
            made[name] = _rerun(swapped.network.get_submodule(name), plan, name)
        torch.cuda.current_stream(request.device).synchronize()  # any stream may read the tables from now on
    except (ImportError, RuntimeError, ValueError) as error:  # there may be no memory for more
        _log.info("no layer was tried by a dense method in the network: %s", error)
        return [swapped]
    own = {name: swapped.network.get_submodule(name) for name in made}
    return [replace(swapped, modules=own)] + [
        replace(swapped, layers={**plans, **chosen}, modules=own | {name: made[name] for name in chosen})
        for chosen in sets
        if chosen
    ]


def _by_dense_method(plan: Plan) -> Plan | None:
    """A layer's plan by the fastest dense method; None where it is chosen already, or none was timed.

    What is tried by its first call does not count: that takes long in each process, also where plans are known.
    """
    device = plan.problem.device
    if by_name(plan.method, device).is_dense or plan.time_us is None:
        return None
    best = min(
        (c for c in plan.candidates if c.time_us is not None and _is_plain_dense(c, device)),
        key=lambda candidate: candidate.time_us or 0.0,
        default=None,
    )
    return None if best is None else replace(plan, method=best.method, config=dict(best.config or {}))


def _is_plain_dense(candidate: Candidate, device: str) -> bool:
    method = by_name(candidate.method, device)
    if not method.is_dense or candidate.config is None:
        return False
    config = method.config_type(**candidate.config)
    return bool(method.without_trying(config) == config)


def _time_us(plans: Iterable[Plan]) -> float:
    return sum(plan.time_us or 0.0 for plan in plans)


def _rerun(old: nn.Module, plan: Plan, name: str) -> SparseConv2d:
    """A layer like another one, that runs by another plan of it."""
    assert isinstance(old, SparseConv2d)
    method = by_name(plan.method, plan.problem.device)
    layer = Layer(plan.problem, old.filter, old.bias, old.slope)
    new = SparseConv2d(*layer[1:3], plan, name, old.unfolded, layer.slope)
    new.run_by(layer.prepare(method, method.config_type(**plan.config)))
    adopt(new, old)
    return new


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
