"""Whether the planner ranks candidates as loops of their own do: each of a network's layers, both ways.

The planner times a layer's candidates in one process, in turn. Here each of them is timed again in a process of its
own, forked from one that has computed nothing yet, on inputs that are written anew as the planner does. What counts is
what a wrong choice costs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from escort import convert
from escort.layers.conv import SparseConv2d
from escort.methods import by_name
from escort.network.memory import keep_freed_memory
from escort.planner import timing
from escort.planner.measure import rewriting
from escort.planner.plan import Candidate, Layer

#: A candidate counts up to so many times the time of the one that was chosen: the others could not have won.
_CLOSE = 1.5
#: Pairs whose own times are closer than this are neither in the right order nor in the wrong one.
_ALIKE = 1.05
_WARM_S, _TIMED_S = 0.05, 0.1
_ROUNDS = 2  # processes of each candidate, of which the less disturbed counts


@dataclass(frozen=True)
class Ranked:
    """A layer whose candidates were timed both ways.

    Attributes:
        name: the layer's path.
        in_turn_us, alone_us: the candidates' times by the planner and in processes of their own, the chosen one first.
    """

    name: str
    in_turn_us: tuple[float, ...]
    alone_us: tuple[float, ...]

    @property
    def loss(self) -> float:
        """What the choice takes longer than the best, as a share of the best's time."""
        return self.alone_us[0] / min(self.alone_us) - 1.0

    @property
    def pairs(self) -> tuple[int, int]:
        """How many pairs that differ are in the same order by both, and how many there are."""
        both = list(zip(self.in_turn_us, self.alone_us, strict=True))
        apart = [(a, b) for a, b in combinations(both, 2) if max(a[1], b[1]) > _ALIKE * min(a[1], b[1])]
        return sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in apart), len(apart)


def rank(model: nn.Module, x: Tensor, say: Callable[[str], object] = lambda line: None) -> list[Ranked]:
    """The layers of a network on the CPU that were measured when it was converted, one of each kind.

    Args:
        say: is told of each layer.

    Raises:
        RuntimeError: where no layer has several candidates that are close, as in a network that is kept dense.
    """
    begin = time.perf_counter()
    converted = convert(model, x, remeasure=True)
    say(f"converted in {time.perf_counter() - begin:.1f} s")
    modules = [module for module in converted.modules() if isinstance(module, SparseConv2d)]
    ranked = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for module in modules:
        plan = module.plan
        if plan.times_from != "measured":
            continue
        timed = sorted((c for c in plan.candidates if c.time_us is not None), key=lambda c: c.time_us or 0.0)
        close = [c for c in timed if (c.time_us or 0.0) <= _CLOSE * (timed[0].time_us or 0.0)]
        if len(close) < 2:
            continue
        layer, threads = Layer(plan.problem, module.filter, module.bias), torch.get_num_threads()
        jobs = [(layer, candidate, threads) for candidate in close]
        alone: list[list[float]] = [[] for _ in close]
        for _ in range(_ROUNDS):
            for job, times in zip(jobs, alone, strict=True):
                with context.Pool(1) as pool:
                    times.append(pool.apply(alone_us, job))
        each = Ranked(module.name, tuple(c.time_us or 0.0 for c in close), tuple(map(min, alone)))
        ranked.append(each)
        agree, pairs = each.pairs
        say(f"{each.name}: {close[0].method}, loss {each.loss:.1%}, {agree} of {pairs} pairs in the same order")
    if not ranked:
        kept = "the network was kept dense" if converted.plan.kept_dense else "no layer has candidates that are close"
        raise RuntimeError(f"there is nothing to rank: {kept}; run it on an idle machine, or on another network")
    return ranked


def alone_us(layer: Layer, candidate: Candidate, threads: int) -> float:
    """The median time of a candidate's calls in a loop of its own, in a process that has run nothing else."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as converting does before it times anything
    method = by_name(candidate.method, layer.problem.device)
    config: Any = method.config_type(**(candidate.config or {}))
    with torch.inference_mode():
        x, residual = timing.example_inputs(layer.problem)[0]
        run = layer.prepare(method, config).run
        before = rewriting([tensor for tensor in (x, residual) if tensor is not None])
        _loop(lambda: run(x, residual), before, _WARM_S)
        return median(_loop(lambda: run(x, residual), before, _TIMED_S)) * 1e6


def _loop(run: Callable[[], object], before: Callable[[], object], seconds: float) -> list[float]:
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times
