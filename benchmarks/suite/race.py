"""Layers with every method's configurations raced on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.layers import Layer
from benchmarks.suite.rows import Row, check, leave_out
from escort import reference
from escort.methods import Method, Runner, for_device
from escort.planner import timing
from escort.planner.timing import Timing
from escort.problem import TORCH_MEMORY_FORMAT, Problem

#: An error within so many times a precision's bound is rounding; what exceeds even that is wrong.
_ROUNDING = 10.0


def measure_layer(
    layer: Layer,
    *,
    methods: Sequence[Method] | None = None,
    seed: int = 0,
    rounds: int = 9,
    budget_s: float = 2.0,
) -> list[Row]:
    """Every configuration of every method that takes the problem, raced on random inputs.

    On a GPU a configuration that the device refuses, that does not fit its memory or that rounds more than its
    precision allows is left out with a warning.

    Args:
        methods: by default all of the problem's device.

    Raises:
        RuntimeError: where one computes something else than the reference; nothing is timed then.
    """
    problem = layer.problem
    with torch.inference_mode():
        inputs = [x for x, _ in timing.example_inputs(problem, seed=seed)]
        entrants = list(_entrants(layer, for_device(problem.device) if methods is None else methods, inputs[0]))
        runs = [[partial(run, as_taken(m, config, x)) for x in inputs] for m, config, run, _ in entrants]
        timings = _race_layer(problem, runs, rounds, budget_s)
    about = layer.network, layer.weights, layer.name, problem.batch, problem.precision
    rows = []
    for (method, config, _, error), taken in zip(entrants, timings, strict=True):
        if taken.time_us is None:
            leave_out(_name(layer, method.name, config), taken.reason)
            continue
        options = asdict(config) | ({"timer": "events"} if taken.timer == "events" else {})
        rows.append(Row(*about, method.name, options, round(taken.time_us, 2), error))
    return rows


def _entrants(layer: Layer, methods: Sequence[Method], x: Tensor) -> Iterator[tuple[Method, Any, Runner, float]]:
    """Method, config, runner and relative error of all that compute the layer, as :func:`measure_layer` says."""
    problem, on_gpu = layer.problem, layer.problem.device_type == "cuda"
    expected = reference.conv2d(problem, x, layer.sparse_filter.to_dense())
    bound = reference.ERROR_BOUND[problem.precision]
    for method in methods:
        if method.unsupported(problem) is not None:
            continue
        configs = method.configs(problem, layer.sparse_filter)
        for config in (*configs, *method.benchmark_configs(problem, layer.sparse_filter)):
            what = _name(layer, method.name, config)
            try:
                run = method.prepare(problem, layer.sparse_filter, None, config).run
                out = run(as_taken(method, config, x))
            except (RuntimeError, ValueError) as failure:
                if not on_gpu:
                    raise
                leave_out(what, timing.survived(failure))
                continue
            error = reference.compare(out, expected)
            if on_gpu and bound < error <= _ROUNDING * bound:
                leave_out(what, f"relative error {error:.1e} exceeds {bound:.0e}")
                continue
            check(error, bound, what)
            yield method, config, run, error


def as_taken(method: Method, config: Any, x: Tensor) -> Tensor:
    """x in the memory format in which a config takes it without conversion."""
    return x.contiguous(memory_format=TORCH_MEMORY_FORMAT[method.input_format(config)])


def _name(layer: Layer, method: str, config: Any) -> str:
    return f"{layer.network} {layer.name}, {method} {asdict(config)}"


def _race_layer(
    problem: Problem, runs: Sequence[Sequence[Callable[[], object]]], rounds: int, budget_s: float
) -> list[Timing]:
    if problem.device_type == "cpu":
        times = timing.race([run for (run,) in runs], rounds=rounds, budget_s=budget_s)
        return [Timing(time_us, "calls") for time_us in times]
    return timing.race_on_gpu(runs, problem.device, rounds=rounds, budget_s=budget_s)
