"""Whole models: every convolution swapped for the method that measured fastest, and the proof that it paid."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from escort.layers import SparseConv2d
from escort.methods import Method, for_device
from escort.network.check import (
    Effort,
    Request,
    Skip,
    check_model,
    settle_effort,
    settle_favor,
    settle_methods,
    settle_precision,
    settle_skip,
)
from escort.network.choose import batchings_to_try, choose, race, run_by
from escort.network.context import dense_in, on_device, running_out
from escort.network.example import Example
from escort.network.masks import check_masks, check_zeros
from escort.network.memory import keep_freed_memory
from escort.network.model import ConvertedModel
from escort.network.original import Original, plain_copy, run_original, unwrap
from escort.network.passes import rewrite, widen
from escort.network.passes.channels_last import in_memory_formats
from escort.network.pinned import check_pinned, check_pinned_precision, keep_as_planned, only_planned
from escort.network.plan import NetworkPlan
from escort.network.progress import Progress
from escort.network.rivals import compare_with_compiled, compare_with_eager, compare_with_float32
from escort.network.swap import Swapped, alternatives, check_calls, find_layers, likely, plan_into, record_calls, swap
from escort.network.tracing.state import State, own_draws
from escort.network.tracing.trace import trace
from escort.planner.machine import Machine
from escort.planner.plan import Layer
from escort.problem import Precision
from escort.runtime import Favor, as_programs
from escort.runtime.saved.description import unsavable

_log = logging.getLogger(__name__)
_NOTHING_TO_PLAN = (
    "the original network was kept when this model was converted, so that it has no layer to plan anew; pass the "
    "original to escort.convert(..., remeasure=True)"
)
#: One conversion at a time: torch.fx traces one model at a time, and what is timed must not compete with another.
_turn = threading.RLock()


def convert(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    precision: Precision | None = None,
    effort: Effort = "fast",
    methods: Collection[str] | None = None,
    favor: Favor | None = None,
    skip: Skip | None = None,
    progress: bool = False,
    remeasure: bool = False,
    plan: NetworkPlan | None = None,
) -> ConvertedModel:
    """A faster drop-in for a pruned model.

    It folds batch norms, fuses activations and residual adds, measures every way to run each convolution on the model's
    device and swaps in the fastest. Where tensor cores may be used, it does so once more with all tensors in
    channels_last. The model itself is not changed. Where the whole is no faster, the original network is kept and
    ``.plan.reason`` says so. ``print(converted.plan)`` shows what runs each layer.

    Every convolution that is swapped computes in `precision`, whatever torch's global settings say. What is left alone
    computes as those settings say: linear layers, for example, or the original network where it is kept.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        >>> fast = convert(model, torch.randn(1, 3, 16, 16))
        >>> fast(torch.randn(4, 3, 16, 16)).shape
        torch.Size([4, 8, 14, 14])

    Args:
        model: in eval mode, in float32, float16 or bfloat16, on the CPU or on a GPU. Models that torch.fx cannot trace
            are converted layer by layer. On the CPU a model of 16 bits is computed in float32, which takes a graph of
            the whole; its inputs and outputs stay of its type.
        example_inputs: a typical input: a tensor, a tuple of all arguments, or one argument of another kind, such as a
            list or a dict of tensors. Its shapes are those that are timed; other batch and input sizes stay correct.
            Arguments that are no tensors keep the value that they have here.
        example_kwargs: the arguments that the model takes by name. The converted model takes them by the same names.
        precision: by default that of the model's weights, "fp32", "fp16" or "bf16", and "fp32" on the CPU; float32
            weights are then multiplied as they are. "tf32" allows TF32 products of float32 weights, as torch's own
            convolutions do on GPUs unless ``torch.backends.cudnn.allow_tf32`` is switched off.
        effort: how long compiling kernels for the weights may take on a GPU, by estimate and with all cores at work:
            "fast" compiles none, "best" takes up to five minutes, a number is a number of seconds. By the clock, too,
            none is begun later. The layers come first where such kernels are predicted to save most in a second of
            compiling, and it ends where too little is saved; a layer that gets none runs by the other methods, and its
            plan says why. Unless it is "fast" or 0, the whole network is also compared with torch.compile of the dense
            model, which takes another while: the plan has its time (``.plan.rivals``), and it is never kept. On the CPU
            that is not tried. Kernels and plans stay on disk (`escort cache`): a layer like one that was measured
            before on this machine is not timed again, but its choice is validated. Where the original network would be
            kept with such plans, all layers are measured anew first.
        methods: the names of the methods to choose from, by default all that the device has. The dense one is always
            among them.
        favor: how the threads of a CPU share a batch: all of them each layer, so that a sample takes little time
            ("latency"), or each takes samples of its own through the network where there are as many as threads, so
            that many take little together ("throughput"). By default what is faster on the example.
        skip: is called with the name and the module of each convolution, and true for those to leave alone.
        progress: show a progress bar on stderr.
        remeasure: measure every layer anew, whatever plans are kept, and replace those.
        plan: what an earlier conversion of this model chose, its ``.plan``. It is followed: nothing is timed, so that
            each process computes alike; each layer and the whole are compared with the original all the same, and what
            is not right is refused. It goes with none of the arguments above that say what to choose.

    Raises:
        ValueError, TypeError: naming the layer, the problem and the remedy.
        torch.OutOfMemoryError: naming the layer that did not fit the GPU, which stays usable.
    """
    reports = Progress()
    example = Example.of(example_inputs, example_kwargs)
    model = unwrap(model)
    with running_out("the example"):
        check_model(model, example)
    if plan is not None:
        asked = {"methods": methods, "favor": favor, "remeasure": remeasure or None}
        check_pinned(plan, example, asked | {"effort": None if effort == "fast" else effort})
        precision = precision or (None if plan.widened else plan.precision)
    settled, widened = settle_precision(model, example.device, precision)
    if plan is not None:
        check_pinned_precision(plan, settled, widened)
    request = Request(
        device=example.device,
        precision=settled,
        widened=widened,
        compile_budget_s=settle_effort(effort),
        methods=settle_methods(methods, example.device),
        favor=settle_favor(favor, example.device),
        skip=settle_skip(skip),
        progress=reports,
        remeasure=remeasure,
        pinned=plan,
    )
    reports.done("checked")
    # What is made here is used outside, where tensors of inference mode could not be followed or written to.
    with (
        _turn,
        on_device(request.device),
        torch.inference_mode(False),
        torch.no_grad(),
        own_draws(),
        reports.bar(shown=progress),
    ):
        return _convert(model, example, request)


def _convert(model: nn.Module, example: Example, request: Request) -> ConvertedModel:
    if request.device.type == "cpu":
        keep_freed_memory()  # before anything is timed
    with running_out("the model itself"), dense_in("fp32", request.device):
        original = run_original(model, example)
        request.progress.done("run as it is")
        check_masks(original.model)
        example = original.example
        not_tried: dict[str, str] = {}
        try:
            dense, why_not = trace(plain_copy(model), example, original.stateful)
            not_tried = {} if why_not is None else {"graph": why_not}
            for _ in range(2):  # what a graph keeps between calls shows in the second one
                if not original.is_computed_by(dense):
                    raise ValueError("they compute something else")
            # A graph is rewritten into a new one; other modules are written to, and the original needs its own.
            network = dense
            if request.widened is not None:
                network = _widened(dense, why_not, original, request.widened)
            elif not isinstance(dense, fx.GraphModule):
                network, _ = trace(plain_copy(model), example, original.stateful)
            request.progress.done("traced")
            network, skipped = rewrite(network, request)
            calls = record_calls(network, skipped, original)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the code around a module may ask of it what its graph does not have
            if request.widened is not None:
                raise ValueError(
                    f"a CPU computes a model of {request.widened} in float32, by a graph of the whole, and this one "
                    f"has none: {error}; convert the model in float32, with .float()"
                ) from error
            not_tried = {"graph": f"graphs do not do what its modules do: {error}"}
            dense, network, skipped = plain_copy(model), plain_copy(model), {}
            calls = record_calls(network, skipped, original)
        check_calls(calls, skipped)
        not_saved = unsavable(network, request.device, calls.keys() - skipped.keys())
        networks, not_in_format = in_memory_formats(network, request, original.expected)
        found = {
            memory_format: find_layers(network, calls, memory_format, skipped, request)
            for memory_format, network in networks.items()
        }
        check_zeros([layer.sparse_filter for unplanned in found.values() for layer in unplanned.layers.values()])
        found, unlikely = (only_planned(found, request.pinned), {}) if request.pinned else likely(found, request)
    request.progress.done(f"rewritten for {' and '.join(found)}")
    request.progress.estimate.expect(len(found), len(calls), rival=request.has_rival)
    candidates = [swap(unplanned, request) for unplanned in found.values()]
    candidates = [replace(candidate, network=as_programs(candidate.network)) for candidate in candidates]
    request.progress.estimate.compare()
    with running_out("the whole network"):
        dense = as_programs(dense)
        candidates = [alternative for candidate in candidates for alternative in alternatives(candidate, request)]
        chosen = _choose(dense, candidates, not_tried | not_in_format | unlikely, original, request)
        del candidates, found, networks, network  # what was not chosen lets go of its memory
        if request.pinned is None:
            chosen = _compared(chosen, dense, original, request)
    if chosen.plan.kept_dense:
        not_saved = unsavable(chosen.network, request.device)
    chosen.plan = replace(chosen.plan, not_saved=not_saved)
    return chosen


def _widened(dense: nn.Module, why_not: str | None, original: Original, narrow: torch.dtype) -> fx.GraphModule:
    """The network in float32. Raises ValueError where it takes more than a graph to say what it does."""
    if not isinstance(dense, fx.GraphModule):
        raise ValueError(why_not)
    if original.example.is_written:
        raise ValueError("it writes to its input")
    return widen.rewrite(dense, narrow)


def _choose(
    dense: nn.Module,
    candidates: list[Swapped],
    not_tried: Mapping[str, str],
    original: Original,
    request: Request,
) -> ConvertedModel:
    """The fastest network.

    On a CPU, whose times vary, all layers are measured anew before the original is kept for what stored plans say.
    """
    if request.pinned is not None:
        return keep_as_planned(dense, candidates[0], original, request)
    chosen = choose(dense, candidates, not_tried, original, request)
    stored = any(plan.times_from == "plan store" for candidate in candidates for plan in candidate.layers.values())
    loses = chosen.plan.kept_dense and chosen.plan.refused is None
    if not (stored and loses and request.device.type == "cpu"):
        return chosen
    request.progress.done("found no gain with the stored plans, so that all layers are measured anew")
    request = replace(request, remeasure=True)
    request.progress.estimate.expect(len(candidates), len(candidates[0].layers))
    anew = []
    for candidate in candidates:
        layers = {name: _as_planned(module) for name, module in _sparse(candidate.network).items()}
        plans = plan_into(candidate.network, layers, request)
        anew.append(replace(candidate, layers=plans))
    request.progress.estimate.compare()
    return choose(dense, anew, not_tried, original, request)


def _compared(chosen: ConvertedModel, dense: nn.Module, original: Original, request: Request) -> ConvertedModel:
    """What stays, with the times of the original's rivals in its plan.

    Of 16 bits on a CPU that is the original in float32; on a GPU plain calls of the original, and torch.compile where
    time may be spent on compiling.
    """
    if request.widened is not None:
        chosen.plan = compare_with_float32(chosen, original, request)
    if request.device.type == "cpu":
        return chosen
    chosen = compare_with_eager(chosen, dense, original, request)
    if request.has_rival:
        request.progress.estimate.compare_with_rival()
        chosen.plan = compare_with_compiled(chosen, original, request)
    return chosen


def _sparse(network: nn.Module) -> dict[str, SparseConv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, SparseConv2d)}


def replan(
    model: ConvertedModel,
    *,
    effort: Effort = "fast",
    progress: bool = False,
    whole: bool = True,
    remeasure: bool = True,
) -> ConvertedModel:
    """The same network planned anew on this machine and its present device, for the input sizes of its plan.

    The time of the whole is measured where the plan says how to make inputs, as it does unless they are packed. Where
    the original network was kept, there is no layer to plan, and a warning says so: convert the original once more,
    with ``remeasure=True`` to measure its layers anew. The choice stays restricted to the `methods` of the conversion.

    Args:
        effort, progress: as of :func:`convert`.
        whole: whether to run the whole network for its time; else only its layers are run.
        remeasure: whether to measure every layer; else one that is like another that was measured on this machine takes
            over its plan, as in a conversion.
    """
    if not isinstance(model, ConvertedModel):
        raise TypeError(f"replan takes what escort.convert returned, got {type(model).__name__}; convert it first")
    tensors = (*model.network.parameters(), *model.network.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    methods = _restriction(model.plan, device)
    favor = model.plan.favor if model.plan.is_favor_asked and device.type == "cpu" else None
    request = Request(
        device, model.plan.precision, settle_effort(effort), methods=methods, favor=favor, remeasure=remeasure
    )
    with _turn, on_device(device), own_draws(), request.progress.bar(shown=progress):
        with running_out("the network"):
            network = copy.deepcopy(model.network)
        layers = {name: replace(plan, problem=plan.problem.on(str(device))) for name, plan in model.plan.layers.items()}
        sparse = _sparse(network)
        if model.plan.kept_dense:
            warnings.warn(_NOTHING_TO_PLAN, stacklevel=2)
        request.progress.estimate.expect(1, len(sparse), whole=whole)
        layers |= plan_into(network, {name: _as_planned(module) for name, module in sparse.items()}, request)
        machine = Machine.here(str(device))
        plan = replace(model.plan, layers=layers, machine=machine, device=str(device), rivals={})
        if device.type != "cpu":
            plan = replace(plan, samples=None, favor="latency", is_favor_asked=False)
        example = model.plan.example(device) if whole else None
        if example is not None:
            request.progress.estimate.compare()
            state = State(network)
            with running_out("the network"), torch.inference_mode(), dense_in(request.precision, device):
                batchings = batchings_to_try(network, example, request.favor)
                times_us, timer = race([partial(run_by, network, example, each) for each in batchings], device)
            # The original is not here, so that its time on this machine is not known, unless it is what was kept.
            fastest = min(times_us)
            if plan.kept_dense:
                plan = replace(plan, dense_time_us=fastest, timer=timer)
            else:
                best = batchings[times_us.index(fastest)]
                plan = replace(plan, converted_time_us=fastest, dense_time_us=None, timer=timer)
                plan = replace(plan, samples=best.samples, favor=best.favor)
            state.restore(network)
            request.progress.done("timed as a whole")
    return model.with_network(network, replace(plan, call_time_us=None))


def _restriction(plan: NetworkPlan, device: torch.device) -> tuple[Method, ...] | None:
    """The methods that a conversion was restricted to, as far as this version has them; None for all."""
    here = {method.name for method in for_device(str(device))}
    if missing := ", ".join(name for name in plan.methods if name not in here):
        _log.warning("the choice was restricted to methods of which there is no %s on %s any more", missing, device)
    return settle_methods([name for name in plan.methods if name in here] or None, device)


def _as_planned(module: SparseConv2d) -> Layer:
    """What to plan for a layer, at the size that it was planned for before."""
    planned = module.plan.problem
    problem = module.problem(planned.batch, planned.height, planned.width)
    return Layer(problem, module.filter, module.bias, module.slope)
