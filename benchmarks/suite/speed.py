"""Whole networks against the fastest dense model there is: torch.compile in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.suite.networks import (
    BOTH_FORMATS,
    NetworkRace,
    Times,
    Way,
    by_methods,
    converted_alone,
    dense_ways,
    of_converted,
    race_in_turn,
)
from benchmarks.suite.rows import Row, leave_out
from escort.planner import timing
from escort.planner.timing import Timing
from escort.problem import MemoryFormat


def measure_speed(
    model: nn.Module,
    x: Tensor,
    *,
    network: str,
    weights: str,
    race: NetworkRace,
    formats: Sequence[MemoryFormat] = BOTH_FORMATS,
) -> list[Row]:
    """The model converted, raced against the dense one, as it is and by torch.compile, in its best memory format.

    On a GPU all are timed in CUDA graphs, by the GPU's clock. By the host's clock plain calls of ours take turns with
    replays of the dense models' graphs, each waited for ("call") and back to back ("pipelined"). A replay copies
    nothing in or out, as our calls do. On a CPU calls of ours and of the model take turns.

    Args:
        network, weights: for the rows.
        race: of the rivals that it is against, those count that run by a method.
        formats: in which the dense model is tried on a GPU, as it is and by torch.compile.

    Raises:
        RuntimeError: where the converted network computes something else than the model in float64; nothing is timed
            then.
        ImportError: where what a rival takes is not installed.
    """
    torch.compiler.reset()  # it gives up on code that it compiled for too many other models
    with torch.no_grad():
        converted = converted_alone(model, x, race)
    ways = [of_converted(converted, x)]
    if x.is_cuda:
        ways += (
            dense_ways(model, x, formats) + dense_ways(model, x, formats, compiled=True) + by_methods(model, x, race)
        )
    else:
        ways += dense_ways(model, x)
    return race_in_turn(ways, model, x, (network, weights), race, _by_every_clock)


def _by_every_clock(ways: Sequence[Way], device: torch.device, race: NetworkRace) -> Times:
    runs, rounds, budget_s = [way.run for way in ways], race.rounds, race.budget_s
    if device.type == "cpu":
        times_us = timing.race(runs, rounds=rounds, budget_s=budget_s)
        return {"call": {index: Timing(time_us, "calls") for index, time_us in enumerate(times_us)}}
    graphs = dict(enumerate(timing.race_on_gpu(runs, device, rounds=rounds, budget_s=budget_s)))
    captured: list[int] = []
    by_host: list[Callable[[], object]] = [runs[0]]
    for index in (i for i in graphs if i > 0 and graphs[i].timer == "graph" and not graphs[i].reason):
        try:
            by_host.append(_replays(runs[index], device))
            captured.append(index)
        except RuntimeError as error:  # there may be no memory for another graph
            leave_out(f"{ways[index].method} {ways[index].config} by the host's clock", timing.survived(error))
    host = partial(timing.race_on_host, by_host, device, rounds=rounds, budget_s=budget_s)

    def by_index(times_us: Sequence[float]) -> dict[int, Timing]:
        ours_us, *replays_us = times_us
        of_replays = zip(captured, replays_us, strict=True)
        return {0: Timing(ours_us, "calls")} | {index: Timing(time_us, "graph") for index, time_us in of_replays}

    return {"graph": graphs, "call": by_index(host()), "pipelined": by_index(host(pipelined=True))}


def _replays(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Captures a call that ran before as a CUDA graph of its own, and returns what replays it."""
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries keep a workspace for each stream
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    return graph.replay
