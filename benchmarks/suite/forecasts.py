"""Forecasts of what pruning gains, and how fast the networks are once they are pruned, by other patterns.

A forecast prunes a network's weights by magnitude, all layers alike. What it is held to has weights of another seed,
and zeros that are spread over the layers in another way. Each is measured in a process of its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import escort
from benchmarks.suite.rows import WHOLE, Row
from benchmarks.suite.subjects import Subject
from escort import prune
from escort.planner.cores import Watch

#: How zeros are spread: each layer alike, by magnitude over all layers, or by a share for each layer drawn at random.
SPREADS = ("uniform-0.75", "uniform-0.90", "global-0.85", "global-0.95", "drawn-0.70-0.98")
_SEED = 0
_OTHER_SEED = 1  # of what a forecast is held to
_MOST_OTHERS = 0.15  # the share of the cores that others may take while something is measured


@dataclass(frozen=True)
class Pruned:
    """A network with zeros that a forecast is held to.

    Attributes:
        network: its name, see :meth:`Subject.load`.
        spread: one of :data:`SPREADS`, or the path of an .npz of sparsity patterns.
    """

    network: str
    spread: str
    batch: int

    @property
    def weights(self) -> str:
        """What rows call it."""
        return Path(self.spread).stem if self.spread.endswith(".npz") else self.spread

    def subject(self) -> Subject:
        """The network with its zeros."""
        torch.manual_seed(_OTHER_SEED)
        if self.spread.endswith(".npz"):
            return Subject.load(self.network, patterns=Path(self.spread))
        subject = Subject.load(self.network)
        kind, *numbers = self.spread.split("-")
        shares = [float(number) for number in numbers]
        stays = usually_dense(subject.model)
        if kind == "drawn":
            names = [name for name in prune.convolutions(subject.model) if name not in stays]
            drawn = torch.empty(len(names)).uniform_(*shares).tolist()
            prune.layerwise(subject.model, dict(zip(names, drawn, strict=True)))
        else:
            recipe = prune.uniform if kind == "uniform" else prune.global_magnitude
            recipe(subject.model, shares[0], skip=stays)
        prune.make_permanent(subject.model)
        return subject


def usually_dense(model: nn.Module) -> list[str]:
    """What is not pruned: the first convolution and depthwise ones."""
    convs = prune.convolutions(model)
    first = next(iter(convs))
    return [name for name, conv in convs.items() if name == first or conv.groups == conv.in_channels > 1]


def measure_forecast(held_to: list[Pruned]) -> list[Row]:
    """Forecasts one network; a row for each of its prunings, with the time of the network as it is."""
    return _in_a_process(_forecast, held_to)


def measure_pruned(pruned: Pruned) -> list[Row]:
    """Converts a pruned network: its time, and that of the original."""
    return _in_a_process(_convert, pruned)


def _forecast(held_to: list[Pruned]) -> list[Row]:
    network, batch = held_to[0].network, held_to[0].batch
    torch.manual_seed(_SEED)
    subject = Subject.load(network)
    found = escort.forecast(subject.model, torch.randn(batch, *subject.input_size))
    about = {
        "dense_us": round(found.dense_us, 1),
        "seconds": round(found.seconds, 1),
        "error": round(found.error, 4),
        "dense_spread": round(found.dense_spread, 4),
        "wins_from": found.wins_from,
        "knee": found.knee,
    }
    shares: dict[str, Any] = {f"{share:.2f}": share for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)}
    shares |= {each.weights: prune.sparsity(each.subject().model) for each in held_to}
    return [
        Row(network, name, WHOLE, batch, "fp32", "forecast", about, round(found.time_us(share), 1), 0.0, "call")
        for name, share in shares.items()
    ]


def _convert(pruned: Pruned) -> list[Row]:
    subject = pruned.subject()
    torch.manual_seed(_OTHER_SEED)
    plan = escort.convert(subject.model, torch.randn(pruned.batch, *subject.input_size)).plan
    about = pruned.network, pruned.weights, WHOLE, pruned.batch, "fp32"
    config = {"zeros": round(prune.sparsity(subject.model)["overall"], 4)}
    assert plan.dense_time_us is not None
    return [
        Row(*about, "eager", config, round(plan.dense_time_us, 1), 0.0, "call"),
        Row(*about, "escort", config, round(plan.converted_time_us, 1), plan.rel_error, "call"),
    ]


def _in_a_process(function: Callable[[Any], list[Row]], argument: object) -> list[Row]:
    """What a function returns in a fresh process, which knows no plans."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), function, argument).result()


def _with_threads(threads: int, function: Callable[[Any], list[Row]], argument: object) -> list[Row]:
    torch.set_num_threads(threads)
    watch = Watch()
    rows = function(argument)
    others = watch.others_share()
    if others > _MOST_OTHERS:
        raise RuntimeError(f"other processes took {others:.0%} of the cores meanwhile; run it again in quiet")
    return [replace(row, others=round(others, 4)) for row in rows]
