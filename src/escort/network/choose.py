"""Whole networks: converted ones are compared with the original, all are timed, and the fastest is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from escort.layers import SparseConv2d
from escort.network.check import Request
from escort.network.context import dense_in
from escort.network.example import Example
from escort.network.model import ConvertedModel
from escort.network.original import Original
from escort.network.plan import NetworkPlan
from escort.network.swap import Swapped
from escort.network.values import largest_error
from escort.planner import timing
from escort.planner.machine import Machine
from escort.planner.timing import Timer
from escort.problem import torch_name
from escort.runtime import Batching, Favor, programs_in

#: Largest relative error of a converted network's outputs: its precision's rounding, summed over the layers. The
#: original that it is compared with rounds too, by as much, but never to TF32.
NETWORK_ERROR_BOUND: dict[str, float] = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 7.5e-2}

#: How many times the original's own error a converted network may have, beyond the bound.
_AS_GOOD = 3.0
_SAMPLES = (1, 2, 4)  # how many samples are tried to go through a network together


def choose(
    dense: nn.Module,
    candidates: Sequence[Swapped],
    not_tried: Mapping[str, str],
    original: Original,
    request: Request,
) -> ConvertedModel:
    """The fastest of the dense network and the converted ones that are right.

    Args:
        dense: the network before it was converted, which stays where nothing else is faster and right.
        not_tried: the ways to run the network for which there is no candidate, and why.

    Raises:
        RuntimeError: where the networks cannot be timed.
    """
    example = original.example
    ways: list[tuple[Swapped, float, Batching]] = []  # with the error
    runs: list[Callable[[], Any]] = [partial(example.run, dense)]
    wrong: dict[int, tuple[float, str]] = {}
    with dense_in(request.precision, request.device):
        for number, candidate in enumerate(candidates):
            candidate.put_in_place()
            error, reason = judge(candidate.network, original, request)
            if reason is not None:
                wrong[number] = error, reason
                continue
            batchings = batchings_to_try(candidate.network, example, request.favor)
            runs += [partial(run_by, candidate, example, batching) for batching in batchings]
            ways += [(candidate, error, batching) for batching in batchings]
        request.progress.done("compared with the original")
        with torch.inference_mode():
            (dense_us, *times_us), timer = race(runs, request.device)
    converted_us = min(times_us, default=dense_us)
    best, error, batching = ways[times_us.index(converted_us)] if ways else (candidates[0], wrong[0][0], Batching())
    best.put_in_place()
    kept_dense = not ways or converted_us >= dense_us
    if kept_dense:
        batching = Batching()
    plan = NetworkPlan(
        layers=best.layers,
        skipped=best.skipped,
        not_tried=dict(not_tried),
        refused=None if ways else wrong[0][1],
        input_shapes=tuple(tuple(x.shape) for x in example.tensors),
        input_dtypes=tuple(torch_name(x.dtype) for x in example.tensors),
        input_names=tuple(example.kwargs) if example.is_plain else (),
        packed_inputs=not example.is_plain,
        dense_time_us=dense_us,
        converted_time_us=converted_us,
        rel_error=error,
        kept_dense=kept_dense,
        machine=Machine.here(str(request.device)),
        samples=batching.samples,
        favor=batching.favor,
        is_favor_asked=request.favor is not None and not kept_dense,
        precision=request.precision,
        device=str(request.device),
        timer=timer,
        methods=tuple(method.name for method in request.methods or ()),
        sparsities=sparsities(best.network),
        widened="" if request.widened is None else torch_name(request.widened),
    )
    why = plan.reason or f"{converted_us:.1f} us, the original {dense_us:.1f} us"
    request.progress.done(f"chosen the {'original' if kept_dense else 'converted'} network ({why})")
    network = dense if kept_dense else best.network
    if original.state is not None:
        original.state.restore(network)
    return ConvertedModel(network, plan, original.model)


def sparsities(network: nn.Module) -> dict[str, float]:
    """The share of zeros of each converted layer."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, SparseConv2d)}
    return {name: round(layer.filter.sparsity, 4) for name, layer in layers.items()}


def batchings_to_try(network: nn.Module, example: Example, favor: Favor | None) -> list[Batching]:
    """The ways in which the example's batch may go through a network.

    Where samples do not depend on each other, a few may run at a time on a CPU, so that their activations stay in
    cache, and with as many of them as threads each thread may take some of its own.

    Args:
        favor: what threads shall do for; None for either.
    """
    if example.device.type != "cpu":
        return [Batching()]
    for program in programs_in(network):
        program.native.batching = Batching(1)
    example.run(network)
    samples = max((form["chunks"] for each in programs_in(network) for form in each.native.stats()["forms"]), default=1)
    threads = torch.get_num_threads()
    sharing = [Batching(), *(Batching(count) for count in _SAMPLES if count < samples)]
    taking = [Batching(count, "throughput") for count in _SAMPLES if 1 < threads <= samples // count]
    if favor == "throughput":
        return taking or [Batching(1, "throughput")]
    return sharing + ([] if favor == "latency" else taking)


def run_by(network: nn.Module | Swapped, example: Example, batching: Batching) -> Any:
    """Runs a network on the example by a batching, which it keeps."""
    if isinstance(network, Swapped):
        network.put_in_place()
        network = network.network
    for program in programs_in(network):
        program.native.batching = batching
    return example.run(network)


def race(runs: list[Callable[[], Any]], device: torch.device) -> tuple[list[float], Timer]:
    """The median time of each in microseconds, and how all of them were taken."""
    if device.type == "cpu":
        return timing.race(runs, rounds=12, budget_s=4.0, narrowing=True), "calls"
    timings = timing.race_on_gpu(runs, device, budget_s=2.0)
    if any(each.timer != "graph" or each.time_us is None for each in timings):
        timings = timing.race_on_gpu(runs, device, budget_s=2.0, capture=False)
    times_us = [each.time_us for each in timings if each.time_us is not None]
    if len(times_us) < len(runs):
        reason = next(each.reason for each in timings if each.time_us is None)
        raise RuntimeError(f"the whole network cannot be timed: {reason}; pass an example of a smaller batch")
    return times_us, timings[0].timer


def judge(network: nn.Module, original: Original, request: Request) -> tuple[float, str | None]:
    """The largest relative error of a converted network's outputs, and why it is not taken, None where it is right.

    It is right where it is as close to the original as its precision's rounding explains. Beyond that, where the model
    itself amplifies rounding, it is right where it is about as close as the original in that precision is to what a
    finer type gives.
    """
    bound = NETWORK_ERROR_BOUND[request.rounding]
    try:
        outputs = original.run_afresh(network)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # the code of the model around converted layers may raise anything
        return math.inf, f"converted, the model does not run on the example: {failure}"
    if len(outputs) != len(original.expected):
        return math.inf, f"converted, it returns {len(outputs)} tensors instead of {len(original.expected)}"
    types, expected = ([x.dtype for x in tensors] for tensors in (outputs, original.expected))
    if types != expected:
        return math.inf, f"converted, it returns tensors of {types} instead of {expected}"
    error = largest_error(outputs, original.expected)
    if error <= bound:
        return error, None
    exact = original.more_exactly(request.rounding)
    if exact is None:
        return error, f"its outputs differ by {error:.1e} (bound {bound:.0e}) from the original's"
    own, ours = largest_error(original.rounded(request.rounding), exact), largest_error(outputs, exact)
    if ours <= max(bound, _AS_GOOD * own):
        return error, None
    return error, f"its outputs are off by {ours:.1e} (bound {bound:.0e}), the original's by {own:.1e}"
