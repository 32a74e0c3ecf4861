"""A network against the other ways to run it: eager torch, torch.compile and ONNX Runtime."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from escort import convert
from escort.methods.precision import float32_convolutions, float32_products
from escort.network.check import Effort
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.example import Example
from escort.network.rivals import compiled, laid_out
from escort.network.values import output_error, tensors_of
from escort.planner import timing
from escort.planner.timing import Timer, Timing
from escort.problem import TORCH_MEMORY_FORMAT, Precision

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Way:
    """One way to run a network: the method, "escort" or a rival, how it is set up, and a forward on the inputs."""

    method: str
    config: Mapping[str, Any]
    run: Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """What became of a way to run a network.

    Attributes:
        time_us: median time of a forward; None where it is missing.
        rel_error: ``||out - ref|| / ||ref||`` against the model in float64.
        timer: how it was timed (see :mod:`escort.planner.timing`), the same for all.
        reason: why it is missing.
    """

    method: str
    config: Mapping[str, Any]
    time_us: float | None = None
    rel_error: float | None = None
    timer: Timer = "calls"
    reason: str | None = None


def measure(
    model: nn.Module,
    inputs: Inputs,
    against: Sequence[str],
    precision: Precision = "fp32",
    effort: Effort = "fast",
    *,
    progress: bool = False,
) -> list[Result]:
    """The model converted, and raced against some rivals. Every output is checked before anything is timed.

    On the CPU calls are timed, in turn. On a GPU it is CUDA graphs, or calls where one of them cannot be captured.

    Args:
        model: in eval mode, on the device of the inputs; the zeros are already in its weights.
        against: some of :data:`RIVALS`. What cannot run is a result with a reason.
        precision: of all; fp32 is strict.
        effort: as of :func:`escort.convert`.
        progress: show a progress bar while converting.

    Returns:
        A result for each way, the converted model's first.

    Raises:
        ValueError: where there is no such rival, or as :func:`escort.convert` does.
        RuntimeError: where the converted model computes something else than the model.
    """
    if unknown := sorted(set(against) - set(RIVALS)):
        raise ValueError(f"there is no rival {', '.join(unknown)}; there are {', '.join(RIVALS)}")
    converted = convert(model, inputs, precision=precision, effort=effort, progress=progress)
    with torch.inference_mode():
        expected = tensors_of(copy.deepcopy(model).double()(*(x.double() for x in inputs)))
    choice = {"kept_dense": converted.plan.kept_dense, "memory_format": converted.plan.memory_format}
    ways = [Way("escort", choice, partial(converted, *inputs))]
    missing = []
    for name in against:
        try:
            ways += RIVALS[name](model, inputs)
        except (ImportError, RuntimeError, ValueError) as error:
            missing.append(Result(name, {}, reason=_first_line(error)))
    with torch.inference_mode(), dense_at_its_best(precision):
        results = [check(way, expected, NETWORK_ERROR_BOUND[precision]) for way in ways]
        if results[0].reason is not None:
            raise RuntimeError(f"the converted model: {results[0].reason}; please report this with the model")
        right = [index for index, result in enumerate(results) if result.reason is None]
        for index, taken in zip(right, race([ways[index].run for index in right], inputs[0].device), strict=True):
            results[index] = replace(results[index], time_us=taken.time_us, timer=taken.timer, reason=taken.reason)
    return results + missing


def eager(model: nn.Module, inputs: Inputs) -> list[Way]:
    """The model as it is, in both memory formats."""
    ways = []
    for name, memory_format in TORCH_MEMORY_FORMAT.items():
        network, example = laid_out(model, Example(inputs), memory_format)
        ways.append(Way("eager", {"memory_format": name}, partial(example.run, network)))
    return ways


def in_inductor(model: nn.Module, inputs: Inputs) -> list[Way]:
    """The model as torch.compile makes it, in channels_last. It is compiled when it first runs."""
    return [Way("compile", {"memory_format": "channels_last"}, compiled(model, Example(inputs)))]


def in_onnxruntime(model: nn.Module, inputs: Inputs) -> list[Way]:
    """ONNX Runtime on the CPU, with as many threads as torch has. Raises ImportError where it is not installed."""
    if inputs[0].device.type != "cpu":
        raise ValueError("ONNX Runtime is timed on the CPU only")
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install escort-sparse[bench]") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads = torch.get_num_threads()
    # Rivals take turns: its threads must not go on spinning on the cores while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own future
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(model, inputs, path, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {source.name: x.numpy() for source, x in zip(session.get_inputs(), inputs, strict=True)}

    def run() -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, feed)]

    return [Way("onnxruntime", {"intra_op_num_threads": threads}, run)]


#: The rivals by name.
RIVALS = {"eager": eager, "compile": in_inductor, "onnxruntime": in_onnxruntime}


@contextmanager
def dense_at_its_best(precision: Precision) -> Iterator[None]:
    """Lets torch's own operators compute in a precision, and cuDNN choose its algorithms by trying them."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with float32_products(precision), float32_convolutions(precision):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def check(way: Way, expected: Sequence[Tensor], bound: float) -> Result:
    """Runs it once, and compares its outputs with what is expected. The result has no time yet."""
    try:
        pairs = list(zip(tensors_of(way.run()), expected, strict=True))
    except Exception as failure:  # of many kinds: compilers may be missing, or fail
        return Result(way.method, way.config, reason=_first_line(failure))
    error = max((output_error(out, ref) for out, ref in pairs), default=0.0)
    reason = None if error <= bound else f"differs from the model in float64 by {error:.1e} (bound {bound:.0e})"
    return Result(way.method, way.config, rel_error=error, reason=reason)


def race(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[Timing]:
    """The median time of each, all taken in the same way."""
    if device.type == "cpu":
        return [Timing(time_us, "calls") for time_us in timing.race(runs, rounds=8, burst=4, budget_s=30.0)]
    timings = timing.race_on_gpu(runs, device, rounds=8, budget_s=30.0)
    all_captured = all(taken.timer == "graph" for taken in timings)
    return timings if all_captured else timing.race_on_gpu(runs, device, rounds=8, budget_s=30.0, capture=False)


def _first_line(error: Exception) -> str:
    line = Text.from_ansi(str(error)).plain.partition("\n")[0]
    return line if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: {line}"
