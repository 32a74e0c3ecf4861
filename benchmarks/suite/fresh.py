"""What a fresh process measures for :mod:`benchmarks.suite.conversions`: one task, told as JSON, answered as JSON."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import escort
from benchmarks.suite.conversions import Conversion
from benchmarks.suite.exhaustive import convert_and_search
from benchmarks.suite.rows import NetworkTimer, check
from benchmarks.suite.subjects import Subject
from escort.cli.rivals import dense_at_its_best
from escort.cuda.compiler import compiler_version
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.model import ConvertedModel
from escort.network.values import output_error, tensors_of
from escort.planner import timing
from escort.planner.timing import Timing
from escort.problem import TORCH_DTYPE

_HOST_ROUNDS, _HOST_CALLS = 50, 4  # of calls without a graph


def convert(conversion: Conversion, saved: str | None = None) -> dict[str, Any]:
    """Times a conversion, and writes what came out, an input and its output to a new folder `saved`."""
    subject, model, x = _placed(conversion)
    _wait(x.device)
    begin = time.perf_counter()
    converted = escort.convert(model, x, precision=conversion.precision, effort=conversion.effort)
    _wait(x.device)
    seconds = time.perf_counter() - begin
    peak_bytes = torch.cuda.max_memory_allocated(x.device) if x.is_cuda else 0
    if saved is not None:
        os.mkdir(saved)
        about = {"network": subject.name, "weights": subject.weights}
        with torch.inference_mode():
            outputs = [out.cpu() for out in tensors_of(converted(x))]
        torch.save({"x": x.cpu(), "outputs": outputs}, Path(saved) / "tensors.pt")
        (Path(saved) / "about.json").write_text(json.dumps(about))
        if converted.plan.not_saved is None:
            escort.save(converted, Path(saved) / "model.escort", kernels=x.is_cuda)
        else:
            (Path(saved) / "reason").write_text(converted.plan.not_saved)
    return {**_about(subject), **_right(converted), "time_us": seconds * 1e6, "peak_bytes": peak_bytes}


def load(conversion: Conversion, saved: str) -> dict[str, Any]:
    """Times loading and the first call, where there is no compiler; on a GPU with the kernels that were saved."""
    _hide_compiler()
    folder = Path(saved)
    if (reason := folder / "reason").is_file():
        raise RuntimeError(f"not saved: {reason.read_text()}")
    tensors = torch.load(folder / "tensors.pt")
    x = tensors["x"].to(conversion.device)
    _wait(x.device)
    begin = time.perf_counter()
    converted = escort.load(folder / "model.escort", device=conversion.device, kernels=x.is_cuda)
    with torch.inference_mode():
        outputs = tensors_of(converted(x))
    _wait(x.device)
    seconds = time.perf_counter() - begin
    pairs = zip(outputs, tensors["outputs"], strict=True)
    error = max(output_error(out, expected.to(out.device)) for out, expected in pairs)
    check(error, NETWORK_ERROR_BOUND[conversion.precision], "what was loaded")
    _check_compiler_is_hidden()
    return {**json.loads((folder / "about.json").read_text()), "rel_error": error, "time_us": seconds * 1e6}


def choices(conversion: Conversion, search_s: float) -> dict[str, Any]:
    """Converts with little search, searches exhaustively as far as there is time, and races what both choose."""
    subject, model, x = _placed(conversion)
    converted, networks = convert_and_search(model, x, precision=conversion.precision, search_s=search_s)
    plan = converted.plan
    fast = {"effort": "fast", "kept_dense": plan.kept_dense, "memory_format": plan.memory_format}
    ways: list[tuple[dict[str, Any], float, Callable[[], Any]]] = [
        (fast, _right(converted)["rel_error"], partial(converted, x))
    ]
    for searched in networks:
        config = {"effort": "exhaustive", "kept_dense": False, **searched.about}
        ways += [(config, searched.rel_error, run) for run in searched.runs]
    if plan.kept_dense:  # a search may find nothing faster
        ways.append(({**ways[-1][0], "kept_dense": True}, 0.0, ways[0][2]))
    with torch.inference_mode(), dense_at_its_best(conversion.precision):
        timings = _race([run for *_, run in ways], x.device)
    found: dict[str, dict[str, Any]] = {}
    for (config, error, _), taken in zip(ways, timings, strict=True):
        effort = config["effort"]
        if taken.time_us is None or (x.is_cuda and taken.timer != "graph"):
            raise RuntimeError(f"effort {effort}: {taken.reason}")
        if effort not in found or taken.time_us < found[effort]["time_us"]:
            timer = "graph" if x.is_cuda else "call"
            found[effort] = {"config": config, "time_us": taken.time_us, "timer": timer, "rel_error": error}
    return {**_about(subject), "choices": list(found.values())}


def calls(conversion: Conversion) -> dict[str, Any]:
    """Times a call of the converted network as callers make it, and what the host takes of one without a graph."""
    subject, model, x = _placed(conversion)
    converted = escort.convert(model, x, precision=conversion.precision, effort=conversion.effort)
    run, times_us = partial(converted, x), dict[NetworkTimer, float]()
    with torch.inference_mode():
        if x.is_cuda:
            (graph,) = timing.race_on_gpu([run], x.device)
            if graph.time_us is None or graph.timer != "graph":
                raise RuntimeError(graph.reason)
            times_us["graph"] = graph.time_us
            (times_us["call"],) = timing.race_on_host([run], x.device, rounds=25, budget_s=3.0)
            (times_us["pipelined"],) = timing.race_on_host([run], x.device, pipelined=True, budget_s=3.0)
            converted.graphs.policy = "off"
            times_us["host"] = _host_us(run)
        else:
            (times_us["call"],) = timing.race([run])
    layers, plan = len(converted.plan.layers), converted.plan
    config = {"layers": layers, "kept_dense": plan.kept_dense, "memory_format": plan.memory_format}
    taken = [{"timer": timer, "time_us": time_us} for timer, time_us in times_us.items()]
    return {**_about(subject), **_right(converted), "config": config, "calls": taken}


def _host_us(run: Callable[[], Any]) -> float:
    """The median host time of a call to a GPU in us, a few at a time: what is launched fits the driver's queue."""
    seconds = []
    for _ in range(_HOST_ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(_HOST_CALLS):
            run()
        seconds.append((time.perf_counter() - begin) / _HOST_CALLS)
    torch.cuda.synchronize()
    return median(seconds) * 1e6


def _race(runs: list[Callable[[], Any]], device: torch.device) -> list[Timing]:
    if device.type == "cpu":
        return [Timing(time_us, "calls") for time_us in timing.race(runs, rounds=8, budget_s=10.0)]
    return timing.race_on_gpu(runs, device, rounds=25, budget_s=10.0)


def _placed(conversion: Conversion) -> tuple[Subject, nn.Module, Tensor]:
    """The network on its device, and an input for it."""
    torch.manual_seed(conversion.seed)
    patterns = None if conversion.patterns is None else Path(conversion.patterns)
    sizes: Any = {"sparsity": conversion.sparsity, "patterns": patterns, "input_size": conversion.input_size}
    subject = Subject.load(conversion.network, **sizes)
    x = torch.randn(conversion.batch, *subject.input_size)
    storage = TORCH_DTYPE[conversion.precision]
    return subject, subject.model.to(conversion.device, storage), x.to(conversion.device, storage)


def _about(subject: Subject) -> dict[str, Any]:
    return {"network": subject.name, "weights": subject.weights}


def _right(converted: ConvertedModel) -> dict[str, Any]:
    """The error of what was converted. Raises RuntimeError where it is wrong, whatever is kept."""
    if converted.plan.refused is not None or not math.isfinite(converted.plan.rel_error):
        raise RuntimeError(converted.plan.refused or "the outputs of the original are not finite")
    return {"rel_error": converted.plan.rel_error}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _hide_compiler() -> None:
    """Lets NVRTC not be found in this process, as where it is not installed."""
    try:
        pathfinder: Any = importlib.import_module("cuda.pathfinder")
    except ImportError:
        return
    find = pathfinder.load_nvidia_dynamic_lib

    def find_others(name: str) -> Any:
        if name == "nvrtc":
            raise pathfinder.DynamicLibNotFoundError("hidden")
        return find(name)

    pathfinder.load_nvidia_dynamic_lib = find_others


def _check_compiler_is_hidden() -> None:
    try:
        version = compiler_version()
    except ImportError:
        return
    raise RuntimeError(f"{version} was there although it was hidden")


#: By the names of :data:`benchmarks.suite.conversions.Task`.
_TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "convert": convert,
    "load": load,
    "choices": choices,
    "calls": calls,
}


def main(job: str) -> None:
    warnings.simplefilter("ignore")  # what matters is in the answer
    options = json.loads(job)
    task = _TASKS[options.pop("task")]
    conversion = Conversion.from_json(options.pop("conversion"))
    print(json.dumps(task(conversion, **options)))


if __name__ == "__main__":
    main(*sys.argv[1:])
