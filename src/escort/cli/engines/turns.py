"""Engines take turns by process: in each round every engine gets a fresh process, runs alone, and ends."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from escort.cli.engines import worker
from escort.cli.engines.engine import Engine
from escort.network.values import output_error
from escort.planner import cores
from escort.planner.timing import Timer

#: The share of the cores' time that others may take in a turn; else it is tried again, so often in all.
DISTURBED = 0.05
_TRIES = 3
#: NHWC as NCHW.
_TO_NCHW = (0, 3, 1, 2)
_MOST_MATCHED = 6  # outputs whose order is looked for


@dataclass(frozen=True)
class Turns:
    """How engines take turns.

    Attributes:
        threads: of each engine.
        rounds: turns of each; a time is the median of its rounds' medians.
        seconds: of timed calls in a turn, after half as many of others.
        limit_s: that a turn may take, loading and compiling included.
        begin: is told which engine begins, and in which round.
    """

    threads: int
    rounds: int = 5
    seconds: float = 1.0
    limit_s: float = 600.0
    begin: Callable[[str, int], object] = lambda method, number: None


@dataclass(frozen=True)
class Result:
    """What became of a way to run a network.

    Attributes:
        time_us: median time of a forward; None where it is missing.
        rel_error: ``||out - ref|| / ||ref||`` against the model in float64.
        timer: how it was timed (see :mod:`escort.planner.timing`), the same for all.
        reason: why it is missing.
        rounds_us: on the CPU the median of each round, each in a process of its own, in their order.
        others: on the CPU the largest share of the cores' time that other processes took in a round.
        version: on the CPU of the engine's package.
    """

    method: str
    config: Mapping[str, Any]
    time_us: float | None = None
    rel_error: float | None = None
    timer: Timer = "calls"
    reason: str | None = None
    rounds_us: tuple[float, ...] = ()
    others: float | None = None
    version: str | None = None


@dataclass
class _Entrant:
    """An engine in the race, with what it has reached so far."""

    engine: Engine
    times_us: list[float] = field(default_factory=list)
    others: float = 0.0
    rel_error: float | None = None
    version: str | None = None
    reason: str | None = None

    def result(self) -> Result:
        about = self.engine.method, self.engine.config
        if self.reason is not None:
            return Result(*about, rel_error=self.rel_error, reason=self.reason)
        times = tuple(self.times_us)
        return Result(
            *about, median(times), self.rel_error, rounds_us=times, others=round(self.others, 3), version=self.version
        )


def take_turns(
    engines: Sequence[Engine], expected: Sequence[Tensor], bound: float, folder: Path, turns: Turns
) -> list[Result]:
    """The engines' times, each alone. An engine that is wrong or fails in its first turn gets no other.

    Args:
        expected: the outputs of the model in float64.
        bound: that the relative errors of an engine's outputs must keep.
        folder: for outputs.
    """
    entrants = [_Entrant(engine) for engine in engines]
    for number in range(turns.rounds):
        for entrant in entrants:
            if entrant.reason is None:
                turns.begin(entrant.engine.method, number)
                _take_turn(entrant, expected, bound, None if number else folder / "outputs.npz", turns)
    return [entrant.result() for entrant in entrants]


def _take_turn(entrant: _Entrant, expected: Sequence[Tensor], bound: float, outputs: Path | None, turns: Turns) -> None:
    """Lets an engine run for a turn, again where others disturbed it, and compares its outputs if wanted."""
    answers: list[Mapping[str, Any]] = []
    while len(answers) < _TRIES and (not answers or answers[-1]["others"] > DISTURBED):
        answer = _in_a_process(entrant.engine, None if answers else outputs, turns)
        entrant.reason = answer.get("reason")
        if entrant.reason is not None:
            return
        if outputs is not None and not answers:
            entrant.rel_error, entrant.reason = _compare(entrant.engine, outputs, expected, bound)
            if entrant.reason is not None:
                return
        answers.append(answer)
    best = min(answers, key=lambda answer: answer["others"])
    entrant.times_us.append(best["time_us"])
    entrant.others = max(entrant.others, best["others"])
    entrant.version = best["version"]


def job(engine: Engine, outputs: Path | None, turns: Turns) -> dict[str, Any]:
    """What the worker is told, as JSON values.

    Args:
        outputs: where the engine's outputs go, None for nowhere.
    """
    return {
        "loader": engine.loader,
        "model": str(engine.model),
        "inputs": None if engine.inputs is None else str(engine.inputs),
        "is_compiled": engine.is_compiled,
        "threads": turns.threads,
        "seconds": turns.seconds,
        "outputs": None if outputs is None else str(outputs),
        "cores": cores.__file__,
    }


def _in_a_process(engine: Engine, outputs: Path | None, turns: Turns) -> dict[str, Any]:
    """What a fresh process says of an engine. Its modules are found where this process finds them."""
    threads = {"OMP_NUM_THREADS": str(turns.threads)}
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    words = [sys.executable, worker.__file__, json.dumps(job(engine, outputs, turns))]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=turns.limit_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"reason": f"it took more than {turns.limit_s:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip() or "without a word").splitlines()[-1]
        return {"reason": f"its process ended with {done.returncode}: {last}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    if "reason" in answer:
        answer["reason"] = Text.from_ansi(answer["reason"]).plain.partition("\n")[0]
    return answer


def _compare(
    engine: Engine, outputs: Path, expected: Sequence[Tensor], bound: float
) -> tuple[float | None, str | None]:
    """The largest error of an engine's outputs, and why it is out, None where they are right."""
    with np.load(outputs) as arrays:
        given = [torch.from_numpy(arrays[name]) for name in arrays.files]
    if not engine.is_ordered:
        given = _arranged(given, expected)
    if len(given) != len(expected):
        return None, f"it returns {len(given)} outputs instead of {len(expected)}"
    error = max(map(_error, given, expected), default=0.0)
    reason = None if error <= bound else f"differs from the model in float64 by {error:.1e} (bound {bound:.0e})"
    return error, reason


def _error(out: Tensor, ref: Tensor) -> float:
    return output_error(out, ref) if out.shape == ref.shape else math.inf


def _arranged(given: Sequence[Tensor], expected: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a user's file in the order and the shapes of the model's; as they are where nothing fits."""
    if len(given) != len(expected) or len(given) > _MOST_MATCHED:
        return list(given)
    orders = ([_shaped(out, ref) for out, ref in zip(order, expected, strict=True)] for order in permutations(given))
    return min(orders, key=lambda order: max(map(_error, order, expected), default=0.0))


def _shaped(out: Tensor, ref: Tensor) -> Tensor:
    """An output with the shape of the model's, where it is that in NHWC or has other axes of size one."""
    if out.shape != ref.shape and out.ndim == 4 and out.permute(_TO_NCHW).shape == ref.shape:
        return out.permute(_TO_NCHW)
    return out.reshape(ref.shape) if out.numel() == ref.numel() else out
