"""Whole networks, converted and raced against the other ways to run them."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.ahead import Ahead
from benchmarks.suite.rows import WHOLE, NetworkTimer, Row, check, leave_out
from escort import reference
from escort.cli.engines import ENGINES
from escort.cli.rivals import Race, dense_at_its_best, measure
from escort.methods import by_name
from escort.network.check import Effort
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.convert import convert
from escort.network.example import Example
from escort.network.model import ConvertedModel
from escort.network.rivals import laid_out
from escort.planner import timing
from escort.planner.timing import Timing
from escort.problem import TORCH_MEMORY_FORMAT, MemoryFormat, Precision

#: What a race tells as it goes, which -v shows.
log = logging.getLogger("escort.benchmarks")
#: The dense methods of GPUs by which a rival runs all convolutions of a network: cuDNN's graphs of one kernel each.
BY_METHOD = ("cudnn_graph",)
#: The rivals that :func:`measure_network` knows besides eager torch, by type of device.
RIVALS = {"cpu": tuple(name for name in ENGINES if name != "eager"), "cuda": ("graph", "compile", *BY_METHOD)}

#: The memory formats in which networks are tried on a GPU.
BOTH_FORMATS: tuple[MemoryFormat, ...] = "channels_last", "contiguous"
#: How many times the error of eager torch another way may have, beyond the bound.
_AS_GOOD = 3.0


@dataclass(frozen=True)
class Way:
    """One way to run a network.

    Attributes:
        method, config: of its rows.
        is_compiled: whether torch.compile made it.
    """

    method: str
    config: dict[str, Any]
    run: Callable[[], Tensor]
    is_compiled: bool = False

    def row_method(self, *, in_graph: bool) -> str:
        """Eager torch in a CUDA graph is a method of its own, "graph"."""
        return "graph" if in_graph and self.method == "eager" else self.method


@dataclass(frozen=True)
class NetworkRace:
    """How a network is raced.

    Attributes:
        against: some of the device's :data:`RIVALS`.
        precision: of all; fp32 is strict.
        effort: what compiling kernels for the weights may take, "fast", "best" or seconds, see :func:`escort.convert`.
        rounds: of timed calls at most; on the CPU of processes of each engine.
        eager: whether eager torch is timed; on a GPU it always is.
        budget_s: seconds of timing on a GPU.
        files: on the CPU the user's own files of the model, see :class:`escort.cli.engines.Bench`.
        progress: show a progress bar while converting.
        ahead: what compiles ahead what torch.compile makes, and is stopped while ways are timed.
    """

    against: Sequence[str] = ()
    precision: Precision = "fp32"
    effort: Effort = "best"
    rounds: int = 8
    eager: bool = True
    budget_s: float = 30.0
    progress: bool = False
    files: Mapping[str, Path] = field(default_factory=dict)
    ahead: Ahead = field(default_factory=Ahead)


def measure_network(
    model: nn.Module, x: Tensor, *, network: str, weights: str, race: NetworkRace | None = None
) -> list[Row]:
    """The model converted, raced against itself in eager mode (both memory formats) and against other engines.

    On the CPU each engine runs in processes of its own, one per round, with as many threads as torch has here and on
    the same cores. One that fails is left out with a warning.

    On a GPU calls are timed as a user makes them, the host's work included: each waited for ("call"), and back to back
    ("pipelined"). ``graph`` times the same in CUDA graphs, ``compile`` what torch.compile makes of the model, in all
    three ways. Both also time the converted network so. What cannot be captured is left out with a warning.

    Args:
        model: dense modules in eval mode, on the device of x; the zeros are already in its weights.
        x: (N, C, H, W), what all run on.
        network, weights: for the rows.

    Raises:
        RuntimeError: where the converted network computes something else than the model in float64; nothing is timed
            then.
        ImportError: if an engine to run against is not installed.
    """
    race = race or NetworkRace()
    if unknown := set(race.against) - set(RIVALS[x.device.type]):
        rivals = ", ".join(RIVALS[x.device.type])
        raise ValueError(f"there is no rival {', '.join(sorted(unknown))}; there are {rivals}")
    return (_measure_in_turn if x.is_cuda else _measure_alone)(model, x, (network, weights), race)


def _measure_in_turn(model: nn.Module, x: Tensor, subject: tuple[str, str], race: NetworkRace) -> list[Row]:
    """The rows of a GPU, for a network's name and its weights'."""
    return race_in_turn(_ways(model, x, race), model, x, subject, race, _race_network)


def converted_alone(model: nn.Module, x: Tensor, race: NetworkRace) -> ConvertedModel:
    """The model converted, for a race of its own with torch.compile: the conversion times nothing of that."""
    with mock.patch("escort.network.convert.compare_with_compiled", lambda chosen, *_: chosen.plan):
        return convert(model, x, precision=race.precision, effort=race.effort)


#: What each timer says of the ways, by their index.
Times = dict[NetworkTimer, dict[int, Timing]]
Timers = Callable[[Sequence[Way], torch.device, NetworkRace], Times]


def race_in_turn(
    ways: Sequence[Way], model: nn.Module, x: Tensor, subject: tuple[str, str], race: NetworkRace, timers: Timers
) -> list[Row]:
    """The rows of ways to run a network on x that take turns in this process. All are checked before any is timed.

    A rival that does not run, computes something else, or cannot be captured where it was to be, is left out with a
    warning.

    Args:
        ways: the converted network first.
        model: what all of them must compute.
        subject: the network's name and its weights', for the rows.
        timers: what times those that run, where torch's own operators are at their best.

    Raises:
        RuntimeError: where the converted network computes something else than the model in float64; nothing is timed
            then.
    """
    network, weights = subject
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
    bound = NETWORK_ERROR_BOUND[race.precision]  # or what the model's own rounding, which it may amplify, explains
    with torch.inference_mode(), dense_at_its_best(race.precision):
        ways = [way for number, way in enumerate(ways) if number == 0 or _starts(way, network, race)]
        errors = [reference.compare(way.run(), expected) for way in ways]
        own = [error for way, error in zip(ways, errors, strict=True) if way.method == "eager"]
        bound = max(bound, _AS_GOOD * min(own, default=0.0))
        check(errors[0], bound, f"{network} in {ways[0].method}")
        ways, errors = _right(ways, errors, bound, network)
        begin = time.perf_counter()
        with race.ahead.paused():
            timings = timers(ways, x.device, race)
        log.info("%s: timed %d ways in %.1f s", network, len(ways), time.perf_counter() - begin)
    rows = []
    for timer, by_way in timings.items():
        for index, taken in by_way.items():
            way, in_graph = ways[index], taken.timer == "graph"
            method = way.row_method(in_graph=in_graph or timer == "graph")
            if taken.time_us is None or (timer == "graph" and not in_graph):
                leave_out(f"{network} in {method} {way.config}", taken.reason)
                continue
            about = network, weights, WHOLE, len(x), race.precision, method
            config = way.config | ({"graph": in_graph} if x.is_cuda else {})
            rows.append(Row(*about, config, round(taken.time_us, 2), errors[index], timer))
    return rows


def _measure_alone(model: nn.Module, x: Tensor, subject: tuple[str, str], race: NetworkRace) -> list[Row]:
    """The rows of the CPU, for a network's name and its weights'."""
    against = ("eager", *race.against) if race.eager else tuple(race.against)
    rivals = Race(against, race.precision, race.effort, race.files, race.rounds, race.progress)
    rows = []
    for result in measure(model, (x,), rivals):
        if result.time_us is None:
            leave_out(f"{subject[0]} in {result.method} {dict(result.config)}", result.reason)
            continue
        about = *subject, WHOLE, len(x), race.precision, result.method, dict(result.config)
        rounds_us = tuple(round(time_us, 2) for time_us in result.rounds_us)
        error = 0.0 if result.rel_error is None else result.rel_error
        rows.append(Row(*about, round(result.time_us, 2), error, "call", rounds_us, result.others))
    return rows


def _ways(model: nn.Module, x: Tensor, race: NetworkRace) -> list[Way]:
    """All ways to run the network, the converted one first."""
    converted = convert(model, x, precision=race.precision, effort=race.effort, progress=race.progress)
    ways = [of_converted(converted, x), *dense_ways(model, x)]
    if "compile" in race.against:
        ways += dense_ways(model, x, ("channels_last",), compiled=True)
        ways.append(Way("escort", ways[0].config | {"compiled": True}, _compiled(converted, x), is_compiled=True))
    return ways + by_methods(model, x, race)


def by_methods(model: nn.Module, x: Tensor, race: NetworkRace) -> list[Way]:
    """The model converted with nothing but dense methods to choose from, for each that the race is against.

    Raises:
        ImportError: where what a method takes is not installed.
    """
    ways = []
    for name in (name for name in BY_METHOD if name in race.against):
        if reason := by_name(name, str(x.device)).missing():
            raise ImportError(f"{name}: {reason}")
        try:
            converted = convert(model, x, precision=race.precision, methods=[name])
        except RuntimeError as error:  # there is not memory for everything
            leave_out(f"the network by {name}", str(error))
            continue
        ways.append(replace(of_converted(converted, x), method=name))
    return ways


def of_converted(converted: ConvertedModel, x: Tensor) -> Way:
    """A converted network on x, and what was chosen for it."""
    plan = converted.plan
    choice = {"kept_dense": plan.kept_dense, "samples": plan.samples, "memory_format": plan.memory_format}
    return Way("escort", choice, lambda: converted(x))


def dense_ways(
    model: nn.Module,
    x: Tensor,
    formats: Sequence[MemoryFormat] = ("contiguous", "channels_last"),
    *,
    compiled: bool = False,
) -> list[Way]:
    """The model as it is, or by torch.compile, on x, in some memory formats."""
    ways = []
    for name in formats:
        network, example = laid_out(model, Example((x,)), TORCH_MEMORY_FORMAT[name])
        run = _compiled(network, *example.args) if compiled else partial(network, *example.args)
        ways.append(Way("compile" if compiled else "eager", {"memory_format": name}, run, is_compiled=compiled))
    return ways


def _starts(way: Way, network: str, race: NetworkRace) -> bool:
    """Whether a way runs at all: what torch.compile makes may not, and some take more memory than there is."""
    if way.is_compiled:
        race.ahead.wait()
    begin = time.perf_counter()
    try:
        way.run().flatten()[:1].cpu()  # which waits for it
        log.info("%s in %s %s: ran first in %.1f s", network, way.method, way.config, time.perf_counter() - begin)
    except Exception as failure:  # of many kinds: compilers may be missing, or fail
        reason = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        leave_out(f"{network} in {way.method} {'by torch.compile' if way.is_compiled else way.config}", reason)
        return False
    return True


def _right(ways: Sequence[Way], errors: Sequence[float], bound: float, network: str) -> tuple[list[Way], list[float]]:
    """The ways that compute what the model does, and their errors."""
    right = [error <= bound for error in errors]
    for way, error, is_right in zip(ways, errors, right, strict=True):
        if not is_right:
            leave_out(f"{network} in {way.method} {way.config}", f"its relative error {error:.1e} exceeds {bound:.0e}")
    return [*compress(ways, right)], [*compress(errors, right)]


def _compiled(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    compiled = torch.compile(network, dynamic=False)
    return lambda: compiled(x)


def _race_network(ways: Sequence[Way], device: torch.device, race: NetworkRace) -> Times:
    """Every way by calls, each waited for and back to back; by graphs what is compiled, or all where that is wanted."""
    runs, rounds, budget_s = [way.run for way in ways], race.rounds, race.budget_s
    captured = [index for index, way in enumerate(ways) if way.is_compiled or "graph" in race.against]
    graphs = timing.race_on_gpu([runs[index] for index in captured], device, rounds=rounds, budget_s=budget_s)
    host = partial(timing.race_on_host, runs, device, rounds=rounds, budget_s=budget_s)
    return {
        "call": _by_index(host()),
        "pipelined": _by_index(host(pipelined=True)),
        "graph": dict(zip(captured, graphs, strict=True)),
    }


def _by_index(times_us: Sequence[float]) -> dict[int, Timing]:
    return {index: Timing(time_us, "calls") for index, time_us in enumerate(times_us)}
