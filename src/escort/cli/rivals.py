"""A network against the other ways to run it: eager torch, torch.compile, and other engines on the CPU."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.text import Text
from torch import Tensor, nn

from escort import convert
from escort.cli.engines import ENGINES, Bench, Result, Turns, engine, take_turns
from escort.methods.precision import float32_convolutions, float32_products
from escort.network.check import Effort
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.example import Example
from escort.network.rivals import compiled, laid_out
from escort.network.values import output_error, tensors_of
from escort.planner import timing
from escort.planner.timing import Timing
from escort.problem import TORCH_MEMORY_FORMAT, Precision
from escort.runtime import Favor

_T = TypeVar("_T")
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Way:
    """One way to run a network: the method, "escort" or a rival, how it is set up, and a forward on the inputs."""

    method: str
    config: Mapping[str, Any]
    run: Callable[[], Any]


@dataclass(frozen=True)
class Race:
    """What a model is raced against, and how.

    Attributes:
        against: some of :data:`RIVALS`. What cannot run is a result with a reason.
        precision: of all; fp32 is strict.
        effort: as of :func:`escort.convert`.
        files: on the CPU the user's own files of the model, see :class:`Bench`.
        rounds: on the CPU.
        progress: show a progress bar while converting.
        begin: on the CPU, is told which engine begins, and in which round.
        favor: as of :func:`escort.convert`.
    """

    against: Sequence[str] = ()
    precision: Precision = "fp32"
    effort: Effort = "fast"
    files: Mapping[str, Path] = field(default_factory=dict)
    rounds: int = 5
    progress: bool = False
    begin: Callable[[str, int], object] = lambda method, number: None
    favor: Favor | None = None


def measure(model: nn.Module, inputs: Inputs, race: Race) -> list[Result]:
    """The model converted, and raced against some rivals. Every output is checked before anything is timed.

    On the CPU each engine runs in a process of its own (see :mod:`escort.cli.engines`), with as many threads as torch
    has here and on the same cores. On a GPU they take turns in this process: by CUDA graphs, or by calls where one of
    them cannot be captured.

    Args:
        model: in eval mode, on the device of the inputs; the zeros are already in its weights.

    Returns:
        A result for each way, the converted model's first.

    Raises:
        ValueError: where there is no such rival, or as :func:`escort.convert` does.
        RuntimeError: where the converted model computes something else than the model, or does not run alone.
    """
    if unknown := sorted(set(race.against) - set(RIVALS)):
        raise ValueError(f"there is no rival {', '.join(unknown)}; there are {', '.join(RIVALS)}")
    results = _measure_alone(model, inputs, race) if inputs[0].device.type == "cpu" else _measure(model, inputs, race)
    if results[0].reason is not None:
        raise RuntimeError(f"the converted model: {results[0].reason}; please report this with the model")
    return results


def _measure_alone(model: nn.Module, inputs: Inputs, race: Race) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="escort-") as folder:
        bench = Bench(model, inputs, Path(folder), torch.get_num_threads(), race.files)
        ways, missing = _of_all(race.against, lambda rival: ENGINES[rival](bench))
        converted, config, expected = _converted(model, inputs, race)
        own = engine.escort(bench, converted, config)
        del converted
        turns = Turns(bench.threads, race.rounds, begin=race.begin)
        bound = NETWORK_ERROR_BOUND[race.precision]
        return take_turns([own, *ways], expected, bound, bench.folder, turns) + missing


def _measure(model: nn.Module, inputs: Inputs, race: Race) -> list[Result]:
    converted, config, expected = _converted(model, inputs, race)
    rivals, missing = _of_all(race.against, lambda rival: _on_gpu(rival)(model, inputs))
    ways = [Way("escort", config, partial(converted, *inputs)), *rivals]
    with torch.inference_mode(), dense_at_its_best(race.precision):
        results = [check(way, expected, NETWORK_ERROR_BOUND[race.precision]) for way in ways]
        if results[0].reason is not None:
            return results
        right = [index for index, result in enumerate(results) if result.reason is None]
        timings = race_on_gpu([ways[index].run for index in right], inputs[0].device)
        for index, taken in zip(right, timings, strict=True):
            results[index] = replace(results[index], time_us=taken.time_us, timer=taken.timer, reason=taken.reason)
    return results + missing


def _converted(model: nn.Module, inputs: Inputs, race: Race) -> tuple[nn.Module, dict[str, Any], list[Tensor]]:
    """The converted model, how it is set up, and what the model computes in float64."""
    converted = convert(
        model, inputs, precision=race.precision, effort=race.effort, favor=race.favor, progress=race.progress
    )
    with torch.inference_mode():
        expected = tensors_of(
            copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
        )
    return converted, {name: getattr(converted.plan, name) for name in ("kept_dense", "memory_format")}, expected


def _of_all(names: Sequence[str], make: Callable[[str], Sequence[_T]]) -> tuple[list[_T], list[Result]]:
    """What is made of each rival, and a result for each that cannot be."""
    made: list[_T] = []
    missing = []
    for name in names:
        try:
            made += make(name)
        except (ImportError, RuntimeError, ValueError) as error:
            missing.append(Result(name, {}, reason=_first_line(error)))
    return made, missing


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


#: The rivals by name.
RIVALS = tuple(ENGINES)
#: Those that run on GPUs.
ON_GPU = {"eager": eager, "compile": in_inductor}


def _on_gpu(rival: str) -> Callable[[nn.Module, Inputs], list[Way]]:
    if rival not in ON_GPU:
        raise ValueError(f"{rival} is timed on the CPU only")
    return ON_GPU[rival]


@contextmanager
def dense_at_its_best(precision: Precision) -> Iterator[None]:
    """Lets torch's own operators compute in a precision, and cuDNN choose its algorithms by trying them.

    Torch would go on with those that a convolution took before without trying, as in a conversion, but for asking for
    deterministic ones, which all forward algorithms are.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark = cudnn.deterministic = True
    try:
        with float32_products(precision), float32_convolutions(precision):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def check(way: Way, expected: Sequence[Tensor], bound: float) -> Result:
    """Runs it once, and compares its outputs with what is expected. The result has no time yet."""
    try:
        pairs = list(zip(tensors_of(way.run()), expected, strict=True))
    except Exception as failure:  # of many kinds: compilers may be missing, or fail
        return Result(way.method, way.config, reason=_first_line(failure))
    error = max((output_error(out, ref) for out, ref in pairs), default=0.0)
    reason = None if error <= bound else f"differs from the model in float64 by {error:.1e} (bound {bound:.0e})"
    return Result(way.method, way.config, rel_error=error, reason=reason)


def race_on_gpu(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[Timing]:
    """The median time of each, all taken in the same way."""
    timings = timing.race_on_gpu(runs, device, rounds=8, budget_s=30.0)
    all_captured = all(taken.timer == "graph" for taken in timings)
    return timings if all_captured else timing.race_on_gpu(runs, device, rounds=8, budget_s=30.0, capture=False)


def _first_line(error: Exception) -> str:
    line = Text.from_ansi(str(error)).plain.partition("\n")[0]
    return line if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: {line}"
