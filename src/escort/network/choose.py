"""Whole networks: converted ones are compared with the original, all are timed, and the fastest is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from escort import reference
from escort.network import batching
from escort.network.check import Request, tensors_of
from escort.network.context import dense_in
from escort.network.example import Example
from escort.network.model import ConvertedModel, NetworkPlan
from escort.network.swap import Swapped
from escort.planner import timing
from escort.planner.machine import Machine
from escort.planner.timing import Timer

#: Largest relative error of a converted network's outputs: its precision's rounding, summed over the layers. The
#: original that it is compared with rounds too, by as much, but never to TF32.
NETWORK_ERROR_BOUND: dict[str, float] = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 7.5e-2}

_SAMPLES = (1, 2, 4)  # how many samples at a time are tried


def choose(
    original: nn.Module,
    candidates: Sequence[Swapped],
    not_tried: Mapping[str, str],
    example: Example,
    expected: list[Tensor],
    request: Request,
) -> ConvertedModel:
    """The fastest of the original and the converted networks, once these are known to be right.

    Args:
        not_tried: the ways to run the network for which there is no candidate, and why.
        expected: what the original makes of the example.

    Raises:
        RuntimeError: where a converted network differs from the original, or none can be timed.
    """
    ways: list[tuple[Swapped, float, int | None]] = []  # with the error, and how many samples run at a time
    runs: list[Callable[[], Any]] = [partial(example.run, original)]
    with torch.inference_mode(), dense_in(request.precision, request.device):
        for candidate in candidates:
            error = _checked_error(candidate.network, example, expected, request)
            samples = samples_to_try(candidate.network, example)
            runs += [partial(run_in_parts, candidate.network, example, count) for count in samples]
            ways += [(candidate, error, count) for count in samples]
        (dense_us, *times_us), timer = race(runs, request.device)
    converted_us = min(times_us)
    best, error, count = ways[times_us.index(converted_us)]
    kept_dense = converted_us >= dense_us
    plan = NetworkPlan(
        layers=best.layers,
        skipped=best.skipped,
        not_tried=dict(not_tried),
        input_shapes=tuple(tuple(x.shape) for x in example.tensors),
        input_dtypes=tuple(str(x.dtype).removeprefix("torch.") for x in example.tensors),
        input_names=tuple(example.kwargs),
        dense_time_us=dense_us,
        converted_time_us=converted_us,
        rel_error=error,
        kept_dense=kept_dense,
        machine=Machine.here(str(request.device)),
        samples=None if kept_dense else count,
        precision=request.precision,
        device=str(request.device),
        timer=timer,
    )
    return ConvertedModel(original if kept_dense else best.network, plan)


def samples_to_try(network: nn.Module, example: Example) -> list[int | None]:
    """How many samples of the batch may run at a time: all, and on the CPU, where samples do not mix, a few.

    Broadcasting may mix them where no operation does, so what runs in parts must give the whole batch's outputs.
    """
    if example.device.type != "cpu" or example.kwargs or batching.mixing(network) is not None:
        return [None]
    whole = tensors_of(example.run(network))
    counts = [count for count in _SAMPLES if count < len(example.args[0])]
    return [None, *(count for count in counts if _gives(whole, network, example, count))]


def _gives(whole: list[Tensor], network: nn.Module, example: Example, count: int) -> bool:
    try:
        parts = tensors_of(run_in_parts(network, example, count))
    except (RuntimeError, ValueError):
        return False
    bound = NETWORK_ERROR_BOUND["fp32"]  # all that the CPU computes in
    return all(output_error(out, ref) <= bound for out, ref in zip(parts, whole, strict=True))


def run_in_parts(network: nn.Module, example: Example, samples: int | None) -> Any:
    """Runs a network on the example, so many samples at a time, or all of them at once."""
    return batching.run_in_parts(network, example.args[0], samples) if samples else example.run(network)


def race(runs: list[Callable[[], Any]], device: torch.device) -> tuple[list[float], Timer]:
    """The median time of each in microseconds, and how all of them were taken."""
    if device.type == "cpu":
        return timing.race(runs, rounds=4, burst=3, budget_s=2.0), "calls"
    timings = timing.race_on_gpu(runs, device, budget_s=2.0)
    if any(each.timer != "graph" or each.time_us is None for each in timings):
        timings = timing.race_on_gpu(runs, device, budget_s=2.0, capture=False)
    times_us = [each.time_us for each in timings if each.time_us is not None]
    if len(times_us) < len(runs):
        reason = next(each.reason for each in timings if each.time_us is None)
        raise RuntimeError(f"the whole network cannot be timed: {reason}; pass an example of a smaller batch")
    return times_us, timings[0].timer


def _checked_error(network: nn.Module, example: Example, expected: list[Tensor], request: Request) -> float:
    """The largest relative error of a converted network's outputs. Raises RuntimeError where it is not right."""
    bound = NETWORK_ERROR_BOUND[request.precision]
    pairs = zip(tensors_of(example.run(network)), expected, strict=True)
    error = max((output_error(out, ref) for out, ref in pairs), default=0.0)
    if not error <= bound:
        raise RuntimeError(
            f"the converted network differs from the original by {error:.1e} (bound {bound:.0e}); "
            "please report this with the model"
        )
    return error


def output_error(out: Tensor, ref: Tensor) -> float:
    """The relative error of an output. Infinities and NaN are right where both have the same at the same places."""
    if out.shape != ref.shape or not ref.is_floating_point():
        return reference.compare(out, ref)
    finite = torch.isfinite(ref)
    if not torch.allclose(out[~finite].double(), ref[~finite].double(), equal_nan=True):
        return float("inf")
    return reference.compare(out.where(finite, 0.0), ref.where(finite, 0.0))
