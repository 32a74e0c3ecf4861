"""From which share of zeros on the methods are faster than cuDNN, as their models say."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from statistics import median

from benchmarks import suite
from benchmarks.findings.break_even import break_even
from benchmarks.findings.gpus import gpu_of
from benchmarks.findings.methods import ON_FMA, OURS, SPARSE
from benchmarks.paper_layers import LAYERS
from benchmarks.result_files import Result, seed_of
from benchmarks.suite import Row
from escort.cuda.gpu import Gpu
from escort.methods import Method, by_name
from escort.problem import MemoryFormat, Precision, Problem

#: Shares of zeros, rising, at which the models predict, to find out from where on a method pays.
SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
#: What crossings are made of: by network and name some of the paper's layers, one per kind of shape, and two pointwise
#: ones of the pattern files, whose rows do not tell their shapes.
SHAPES: dict[tuple[str, str], Problem] = {
    (network, layer): LAYERS[network, layer].problem(LAYERS[network, layer].batch)
    for network, layer in (
        ("resnet50", "res2b_branch2b"),
        ("resnet50", "res3b_branch2b"),
        ("resnet50", "res4b_branch2b"),
        ("resnet50", "res5b_branch2b"),
        ("googlenet", "conv2/3x3"),
        ("googlenet", "inception_3b/5x5"),
        ("googlenet", "inception_4e/3x3"),
    )
} | {
    ("resnet50", "module9_1_module0_1_conv2d_4"): Problem(128, 256, 14, 14, 1024, (1, 1)),
    ("resnet50", "module9_1_module0_1_conv2d_0"): Problem(128, 1024, 14, 14, 256, (1, 1)),
}


@dataclass(frozen=True)
class Crossing:
    """From which share of zeros on methods are faster than cuDNN, as their models say; nothing of theirs was timed.

    Attributes:
        memory_format: "NCHW" on both ends, or "any": tensors lie as suits each method best, and nothing is converted.
        cudnn_us: measured, microseconds.
        least: by method a share as :func:`break_even` gives it, within :data:`SHARES`.
    """

    problem: Problem
    memory_format: str
    cudnn_us: float
    least: Mapping[str, float]


def crossings(results: Mapping[str, Result], precision: Precision) -> list[Crossing]:
    """A crossing for each of :data:`SHAPES` that cuDNN was timed on, with nonzeros at random positions.

    There is none on GPUs that the models do not know, and none of direct where it was not timed: its times scale its
    model.

    Args:
        results: by the stems of their files, ``layers-fp16`` and the like.
    """
    factors = direct_factors(results[f"layers-{precision}"], precision) if f"layers-{precision}" in results else []
    slower = {name: 1.0 for name in (ON_FMA if precision == "fp32" else SPARSE) if factors or name != OURS}
    if factors:
        slower[OURS] = median(factors)
    predictions: list[Crossing] = []
    for result in (results[stem] for stem in (f"layers-{precision}", f"patterns-{precision}") if stem in results):
        gpu, seed = gpu_of(result), seed_of(result)
        for (problem, memory_format), cudnn_us in _cudnn_us(result.rows, precision).items():
            if gpu is None:
                continue
            formats = _FORMATS if memory_format == "any" else _FORMATS[:1]
            problems = [replace(problem, device="cuda", memory_format=each) for each in formats]
            least = {
                name: _least_share(by_name(name, "cuda"), problems, seed, gpu, cudnn_us / factor)
                for name, factor in slower.items()
            }
            predictions.append(Crossing(problem, memory_format, cudnn_us, least))
    return predictions


#: The models predict both. One that knows NCHW alone predicts the same for both.
_FORMATS: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")


def _cudnn_us(rows: Iterable[Row], precision: Precision) -> dict[tuple[Problem, str], float]:
    """cuDNN's least time by shape and memory format; that of any format only where it is less than in NCHW."""
    times: dict[tuple[Problem, str], float] = {}
    for row in rows:
        shape = SHAPES.get((row.network, row.layer))
        if row.method == "cudnn" and shape is not None and row.batch == shape.batch:
            for memory_format in ("any",) if row.config.get("output") == "as_is" else ("NCHW", "any"):
                key = replace(shape, precision=precision), memory_format
                times[key] = min(row.time_us, times.get(key, math.inf))
    return {key: us for key, us in times.items() if key[1] == "NCHW" or us < times.get((key[0], "NCHW"), math.inf)}


def _least_share(method: Method, problems: Sequence[Problem], seed: int, gpu: Gpu, limit_us: float) -> float:
    """The share of zeros from which one of the problems takes less than a limit, by bisection: more zeros take less."""

    def predicted(sparsity: float) -> float:
        return min(_predicted(method, problem, sparsity, seed, gpu) for problem in problems)

    first = bisect_left(SHARES, True, key=lambda sparsity: predicted(sparsity) < limit_us)
    around = SHARES[max(first - 1, 0) : first + 1]
    return break_even([(sparsity, predicted(sparsity), limit_us) for sparsity in around])


@cache
def _predicted(method: Method, problem: Problem, sparsity: float, seed: int, gpu: Gpu) -> float:
    random = _random_filter(replace(problem, memory_format="contiguous"), sparsity, seed)
    time_us = method.predict_us(problem, random, gpu)
    assert time_us is not None, f"{method.name} has no model"
    return time_us


_random_filter = lru_cache(maxsize=len(SHARES))(suite.random_filter)


def direct_factors(result: Result, precision: Precision) -> list[float]:
    """The time measured of direct by the time that its model predicts, for each of the paper's layers.

    None on GPUs that the model does not know.
    """
    gpu, seed = gpu_of(result), seed_of(result)
    return [
        times[OURS] / _direct_us(network, layer, batch, precision, seed, gpu)
        for (network, layer, batch), times in suite.best_times(result.rows).items()
        if gpu and OURS in times and (network, layer) in LAYERS
    ]


@cache
def _direct_us(network: str, layer: str, batch: int, precision: Precision, seed: int, gpu: Gpu) -> float:
    measured = suite.paper_layers_by_name(seed)[network, layer]
    problem = replace(measured.problem, batch=batch, precision=precision)
    time_us = by_name(OURS, "cuda").predict_us(problem, measured.sparse_filter, gpu)
    assert time_us is not None
    return time_us
