"""Whole networks, converted and raced against what one would run them with otherwise."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suite.rows import WHOLE, Row, check, leave_out
from escort import prune, reference
from escort.methods.base import float32_convolutions, float32_products
from escort.network.check import EFFORT_S
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.convert import convert
from escort.planner import timing as bench
from escort.planner.timing import Timing
from escort.problem import Precision

#: The rivals that :func:`measure_network` knows besides eager torch, by type of device.
RIVALS = {"cpu": ("onnxruntime",), "cuda": ("graph", "compile")}


@dataclass(frozen=True)
class _Way:
    """One way to run a network: the method and config of its row, and whether a CUDA graph is made of it."""

    method: str
    config: dict[str, Any]
    run: Callable[[], Tensor]
    captured: bool = False


def measure_network(
    model: nn.Module,
    x: Tensor,
    *,
    network: str,
    weights: str,
    against: Sequence[str] = (),
    precision: Precision = "fp32",
    rounds: int = 8,
    budget_s: float = 30.0,
    compile_budget_s: float = EFFORT_S["best"],
    progress: bool = False,
) -> list[Row]:
    """The model converted, raced against itself in eager mode (both memory formats) and against other engines.

    On a GPU calls are timed as a user makes them, with the host's work; ``graph`` times the same in CUDA graphs, and
    ``compile`` what torch.compile makes of the model, in a graph; either times the converted network so, too. What
    cannot be timed so is left out with a warning.

    Args:
        model: dense modules in eval mode, on the device of x; the zeros are already in its weights.
        x: (N, C, H, W), what all run on.
        network, weights: for the rows.
        against: some of the device's :data:`RIVALS`; onnxruntime gets as many threads as torch has.
        precision: of all; fp32 is strict.
        compile_budget_s: the effort of :func:`escort.convert`, in seconds.
        progress: show a progress bar while converting.

    Raises:
        RuntimeError: where one computes something else than the model in float64; nothing is timed then.
        ImportError: if an engine to run against is not installed.
    """
    unknown = set(against) - set(RIVALS[x.device.type])
    if unknown:
        there = ", ".join(RIVALS[x.device.type])
        raise ValueError(f"there is no rival {', '.join(sorted(unknown))}; there are {there}")
    engines = [_onnxruntime(model, x) for name in against if name == "onnxruntime"]  # first: it may not be installed
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x.double())
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)
    converted = convert(model, x, precision=precision, effort=compile_budget_s, progress=progress)
    plan = converted.plan
    choice = {"kept_dense": plan.kept_dense, "images": plan.samples, "memory_format": plan.memory_format}
    threads = {"intra_op_num_threads": torch.get_num_threads()}
    ways = [
        _Way("escort", choice, lambda: converted(x)),
        _Way("eager", {"memory_format": "contiguous"}, lambda: model(x)),
        _Way("eager", {"memory_format": "channels_last"}, lambda: channels_last(x_last)),
        *(_Way("onnxruntime", threads, run) for run in engines),
    ]
    if "graph" in against:
        ways += [replace(way, method=way.method.replace("eager", "graph"), captured=True) for way in ways]
    bound = NETWORK_ERROR_BOUND[precision]
    with torch.inference_mode(), dense_at_its_best(precision):
        if "compile" in against:
            for way in (
                _Way("compile", {"memory_format": "channels_last"}, _compiled(channels_last, x_last), captured=True),
                _Way("escort", choice | {"compiled": True}, _compiled(converted, x), captured=True),
            ):
                try:
                    way.run()
                    ways.append(way)
                except Exception as failure:  # of many kinds: compilers may be missing, or fail
                    reason = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
                    leave_out(f"{network} in {way.method} by torch.compile", reason)
        errors = [_checked(way.run(), expected, bound, f"{network} in {way.method}") for way in ways]
        timings = _race_network(ways, x.device, rounds, budget_s)
    rows = []
    for way, timing, error in zip(ways, timings, errors, strict=True):
        if timing.time_us is None or (way.captured and timing.timer != "graph"):
            leave_out(f"{network} in {way.method} {way.config}", timing.reason)
            continue
        config = way.config | ({"graph": way.captured} if x.is_cuda else {})
        time_us = round(timing.time_us, 2)
        rows.append(Row(network, weights, WHOLE, len(x), precision, way.method, config, time_us, error))
    return rows


def _compiled(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    compiled = torch.compile(network, dynamic=False)
    return lambda: compiled(x)


@contextmanager
def dense_at_its_best(precision: Precision) -> Iterator[None]:
    """Torch's own operators in the precision, and cuDNN's algorithms chosen by trying them."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with float32_products(precision), float32_convolutions(precision):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def _race_network(ways: Sequence[_Way], device: torch.device, rounds: int, budget_s: float) -> list[Timing]:
    if device.type == "cpu":
        times = bench.race([way.run for way in ways], rounds=rounds, burst=4, budget_s=budget_s)
        return [Timing(time_us, "calls") for time_us in times]
    timings: dict[int, Timing] = {}
    for captured in (False, True):
        group = [index for index, way in enumerate(ways) if way.captured is captured]
        runs = [ways[index].run for index in group]
        found = bench.race_on_gpu(runs, device, rounds=rounds, budget_s=budget_s, capture=captured)
        timings |= zip(group, found, strict=True)
    return [timings[index] for index in range(len(ways))]


def prune_all_but_first(model: nn.Module, sparsity: float) -> None:
    """Prunes every convolution but the first, which sees the image and has few weights, by magnitude and for good."""
    prune.uniform(model, sparsity, skip=next(iter(prune.convolutions(model))))
    prune.make_permanent(model)


def _onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install escort-sparse[bench]") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Rivals take turns: its threads must not go on spinning on the cores while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own future
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _checked(out: Tensor, expected: Tensor, bound: float, what: str) -> float:
    error = reference.compare(out, expected)
    check(error, bound, what)
    return error
