"""Whole networks: converted ones are compared with the original, all are timed, and the fastest is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from escort.network import batching
from escort.network.check import Request
from escort.network.context import dense_in
from escort.network.example import Example
from escort.network.model import ConvertedModel
from escort.network.original import Original
from escort.network.plan import NetworkPlan
from escort.network.swap import Swapped
from escort.network.values import largest_error, tensors_of
from escort.planner import timing
from escort.planner.machine import Machine
from escort.planner.timing import Timer
from escort.problem import Precision

#: Largest relative error of a converted network's outputs: its precision's rounding, summed over the layers. The
#: original that it is compared with rounds too, by as much, but never to TF32.
NETWORK_ERROR_BOUND: dict[str, float] = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 7.5e-2}

#: How many times the original's own error a converted network may have, beyond the bound.
_AS_GOOD = 3.0
_SAMPLES = (1, 2, 4)  # how many samples at a time are tried


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
    ways: list[tuple[Swapped, float, int | None]] = []  # with the error, and how many samples run at a time
    runs: list[Callable[[], Any]] = [partial(example.run, dense)]
    wrong: dict[int, tuple[float, str]] = {}
    with dense_in(request.precision, request.device):
        for number, candidate in enumerate(candidates):
            error, reason = _judge(candidate.network, original, request)
            if reason is not None:
                wrong[number] = error, reason
                continue
            whole = original.expected if request.widened is None else original.run_afresh(candidate.network)
            samples = samples_to_try(candidate.network, example, whole, request.rounding)
            runs += [partial(run_in_parts, candidate.network, example, count) for count in samples]
            ways += [(candidate, error, count) for count in samples]
        request.progress.done("compared with the original")
        with torch.inference_mode():
            (dense_us, *times_us), timer = race(runs, request.device)
    converted_us = min(times_us, default=dense_us)
    best, error, count = ways[times_us.index(converted_us)] if ways else (candidates[0], wrong[0][0], None)
    kept_dense = not ways or converted_us >= dense_us
    plan = NetworkPlan(
        layers=best.layers,
        skipped=best.skipped,
        not_tried=dict(not_tried),
        refused=None if ways else wrong[0][1],
        input_shapes=tuple(tuple(x.shape) for x in example.tensors),
        input_dtypes=tuple(str(x.dtype).removeprefix("torch.") for x in example.tensors),
        input_names=tuple(example.kwargs) if example.is_plain else (),
        packed_inputs=not example.is_plain,
        dense_time_us=dense_us,
        converted_time_us=converted_us,
        rel_error=error,
        kept_dense=kept_dense,
        machine=Machine.here(str(request.device)),
        samples=None if kept_dense else count,
        precision=request.precision,
        device=str(request.device),
        timer=timer,
        methods=tuple(method.name for method in request.methods or ()),
        widened="" if request.widened is None else str(request.widened).removeprefix("torch."),
    )
    why = plan.reason or f"{converted_us:.1f} us, the original {dense_us:.1f} us"
    request.progress.done(f"chosen the {'original' if kept_dense else 'converted'} network ({why})")
    network = dense if kept_dense else best.network
    if original.state is not None:
        original.state.restore(network)
    return ConvertedModel(network, plan, original.model)


def samples_to_try(
    network: nn.Module, example: Example, whole: list[Tensor], rounding: Precision = "fp32"
) -> list[int | None]:
    """How many samples of the batch may run at a time: all, and on the CPU, where samples do not mix, a few.

    Broadcasting may mix them where no operation does, so what runs in parts must give the whole batch's outputs.

    Args:
        whole: what the network makes of the whole batch.
        rounding: what its outputs are rounded to.
    """
    is_one = example.is_plain and len(example.tensors) == len(example.args) == 1
    if example.device.type != "cpu" or not is_one or batching.mixing(network) is not None:
        return [None]
    counts = [count for count in _SAMPLES if count < len(example.args[0])]
    return [None, *(count for count in counts if _gives(whole, network, example, count, rounding))]


def _gives(whole: list[Tensor], network: nn.Module, example: Example, count: int, rounding: Precision) -> bool:
    try:
        parts = run_in_parts(network, example, count)
    except (RuntimeError, ValueError):
        return False
    if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(parts)):
        return False  # a number may be that of the batch
    return largest_error(tensors_of(parts), whole) <= NETWORK_ERROR_BOUND[rounding]


def run_in_parts(network: nn.Module, example: Example, samples: int | None) -> Any:
    """Runs a network on the example, so many samples at a time, or all of them at once."""
    if not samples:
        return example.run(network)
    x = example.args[0]
    return batching.run_in_parts(network, x.clone() if example.is_written else x, samples)


def race(runs: list[Callable[[], Any]], device: torch.device) -> tuple[list[float], Timer]:
    """The median time of each in microseconds, and how all of them were taken."""
    if device.type == "cpu":
        return timing.race(runs, budget_s=2.0), "calls"
    timings = timing.race_on_gpu(runs, device, budget_s=2.0)
    if any(each.timer != "graph" or each.time_us is None for each in timings):
        timings = timing.race_on_gpu(runs, device, budget_s=2.0, capture=False)
    times_us = [each.time_us for each in timings if each.time_us is not None]
    if len(times_us) < len(runs):
        reason = next(each.reason for each in timings if each.time_us is None)
        raise RuntimeError(f"the whole network cannot be timed: {reason}; pass an example of a smaller batch")
    return times_us, timings[0].timer


def _judge(network: nn.Module, original: Original, request: Request) -> tuple[float, str | None]:
    """The largest relative error of a converted network's outputs, and why it is not taken, None where it is right.

    It is right where it is as close to the original as its precision's rounding explains. Beyond that, where the model
    itself amplifies rounding, it is right where it is about as close as the original is to what a finer type gives.
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
    own, ours = largest_error(original.expected, exact), largest_error(outputs, exact)
    if ours <= max(bound, _AS_GOOD * own):
        return error, None
    return error, f"its outputs are off by {ours:.1e} (bound {bound:.0e}), the original's by {own:.1e}"
