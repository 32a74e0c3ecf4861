"""Subjects measured again, each kind by the code that made its rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import counters, study, suite
from benchmarks.ahead import Ahead
from benchmarks.checks.sample import Key, Subject
from benchmarks.commands.speed import SpeedOptions
from benchmarks.findings.break_even import sparsity_of
from benchmarks.networks import NETWORKS
from benchmarks.study import Study
from benchmarks.suite import WHOLE, Conversion, Layer, Limited, NetworkRace, Row
from escort.cli.engines import placed_on
from escort.methods import by_name
from escort.planner.machine import Machine
from escort.problem import TORCH_DTYPE, MemoryFormat, Precision

_DENSE_DEPTHWISE = "-dense-depthwise"


class NotHereError(Exception):
    """Why something cannot be measured on this machine."""


@dataclass(frozen=True)
class Bench:
    """Where things are measured again.

    Attributes:
        gpu: its name in torch.
        patterns: the folder of files of real patterns.
        limit_s: seconds that a conversion's process may take.
    """

    gpu: str = "cuda:0"
    patterns: Path = Path("shared/data/patterns")
    limit_s: float = 300.0

    def device(self, subject: Subject) -> str:
        return "cpu" if subject.header.get("device") == "cpu" else self.gpu

    def file(self, weights: str) -> Path:
        """The file of patterns that weights come from. Raises NotHereError."""
        path = self.patterns / f"{weights}.npz"
        if not path.is_file():
            raise NotHereError(f"there is no {path}; name the folder that holds it with --patterns")
        return path


def why_not_here(header: Mapping[str, Any], bench: Bench) -> str | None:
    """Why a file's rows cannot be measured on this machine, or None."""
    if header.get("device") != "cpu":
        if not torch.cuda.is_available():
            return f"it was measured on {header.get('gpu')}, and there is no GPU here"
        here: Any = Machine.here(bench.gpu).device
        return None if header.get("gpu") == here else f"it was measured on {header.get('gpu')}, and here is {here}"
    machine = Machine.here()
    measured, here = (header.get("cpu"), header.get("isa")), (machine.device, machine.isa)
    if measured != here:
        return f"it was measured on {' with '.join(map(str, measured))}, and here is {' with '.join(here)}"
    cores = len(os.sched_getaffinity(0))
    threads = int(header.get("threads", 1))
    return None if threads <= cores else f"it was measured with {threads} threads, and here are {cores} cores"


def measure_again(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    """Rows of the same subject, with the keys in them, and what they are compared with.

    Raises:
        NotHereError: where something of that is not on this machine, or not of today.
        RuntimeError: where something is wrong, or fails.
    """
    if reason := why_not_here(subject.header, bench):
        raise NotHereError(reason)
    kind: Callable[[Subject, Sequence[Key], Bench], list[Row]]
    kind = _layer if subject.rows[0].layer != WHOLE else _network
    kind = _KINDS.get(subject.stem, kind)
    on_cpu = subject.header.get("device") == "cpu"
    with placed_on(int(subject.header["threads"]) if on_cpu else None):
        return kind(subject, keys, bench)


def _seed(subject: Subject) -> int:
    return int(subject.header.get("study", {}).get("seed", 0))


def _precision(subject: Subject) -> Precision:
    return subject.rows[0].dtype  # type: ignore[return-value]


def _best(subject: Subject, method: str) -> Row:
    return min((row for row in subject.rows if row.method == method), key=lambda row: row.time_us)


def _layer(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    """The fastest configuration of each method that is wanted, and of ours where ratios are."""
    wanted = dict.fromkeys(key[0] for key in keys)
    if any(subject.clock(key) == "ratio" for key in keys):
        wanted[subject.ours] = None
    layer = _layer_of(subject, bench)
    methods = [_limited(subject, method, bench) for method in wanted]
    return suite.measure_layer(layer, methods=methods, seed=_seed(subject))


def _limited(subject: Subject, name: str, bench: Bench) -> Limited:
    row = _best(subject, name)
    try:
        method = by_name(name, bench.device(subject))
        return Limited(method, [suite.config_of(method, row)])
    except (ValueError, KeyError, TypeError) as error:
        raise NotHereError(f"{name} {row.config} is nothing of today: {error}") from error


def _layer_of(subject: Subject, bench: Bench) -> Layer:
    row, seed = subject.rows[0], _seed(subject)
    on: dict[str, Any] = {"precision": _precision(subject), "device": bench.device(subject)}
    if row.weights != "paper" and not row.weights.startswith("random-"):
        layers = _pattern_layers(bench.file(row.weights), row.batch, seed, subject.stem == "patterns", **on)
    else:
        layers = suite.paper_layers(row.batch, seed, **on)
    found = next((layer for layer in layers if (layer.network, layer.name) == (row.network, row.layer)), None)
    if found is None:
        raise NotHereError(f"{row.network} has no layer {row.layer} today")
    if row.weights.startswith("random-"):
        random = suite.random_filter(found.problem, sparsity_of(row.weights), seed)
        return replace(found, weights=row.weights, sparse_filter=random)
    return found


@cache
def _pattern_layers(path: Path, batch: int, seed: int, in_order: bool, **on: Any) -> list[Layer]:
    layers = suite.pattern_layers(path, batch, seed, **on)
    return study.in_order_of_channels_last(layers) if in_order else layers


def _network(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    row, precision = subject.rows[0], _precision(subject)
    rivals = [m for m in dict.fromkeys(row.method for row in subject.rows) if m not in ("escort", "eager")]
    rounds = max(len(row.rounds_us) for row in subject.rows)
    race = NetworkRace(rivals, precision, _effort(subject))
    if rounds:
        race = replace(race, rounds=rounds)
    model, x = _subject_of(row, _seed(subject), bench, bench.device(subject))
    return suite.measure_network(model, x, network=row.network, weights=row.weights, race=race)


def _subject_of(row: Row, seed: int, bench: Bench, device: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    plain = row.weights.removesuffix(_DENSE_DEPTHWISE)
    of: dict[str, Any] = {"sparsity": sparsity_of(plain)} if "-" in plain else {}
    if row.weights != "random" and not row.weights.startswith("random-"):
        of = {"patterns": bench.file(row.weights)}
    subject = suite.Subject.load(row.network, dense_depthwise=plain != row.weights, **of)
    storage = TORCH_DTYPE[row.dtype]
    return subject.model.to(device, storage), torch.randn(row.batch, *subject.input_size).to(device, storage)


def _effort(subject: Subject) -> Any:
    if "effort" not in subject.header and subject.header.get("device") != "cpu":
        raise NotHereError("its header does not say with what effort networks were converted")
    return subject.header.get("effort", "best")


def _study(subject: Subject, bench: Bench) -> Study:
    row = subject.rows[0]
    about: dict[str, Any] = {"networks": (row.network,), "batch": row.batch, "effort": subject.header.get("effort")}
    about["formats"] = _formats(subject)
    return Study(device=bench.device(subject), budget_s=0.25, seed=_seed(subject), factories=NETWORKS, **about)


def _formats(subject: Subject) -> tuple[MemoryFormat, ...]:
    """The memory formats in which torch.compile was tried."""
    found = dict.fromkeys(row.config.get("memory_format") for row in subject.rows if row.method == "compile")
    return tuple(name for name in suite.BOTH_FORMATS if name in found) or suite.BOTH_FORMATS


def _inference(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    _effort(subject)
    (item,) = study.race_inference(_study(subject, bench), _precision(subject))
    return item.measure()


def _networks(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    if "search" not in subject.header.get("study", {}):  # of engines that raced, not of the paper's study
        return _network(subject, keys, bench)
    _effort(subject)
    at = replace(_study(subject, bench), sparsities=(sparsity_of(subject.rows[0].weights),))
    (item,) = study.sweep_networks(at, _precision(subject))
    return item.measure()


def _speed(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    row, device = subject.rows[0], bench.device(subject)
    of: dict[str, Any] = {"patterns": bench.patterns, "device": device, "seed": _seed(subject)}
    of["against"] = ",".join(dict.fromkeys(row.method for row in subject.rows if row.method in suite.BY_METHOD))
    effort = subject.header.get("effort")
    options = SpeedOptions(formats=",".join(_formats(subject)), effort=effort and str(effort), budget_s=0.5, **of)
    if not options.has_file(row.weights):
        bench.file(row.weights)
    return options.item((row.network, row.weights, row.batch), _precision(subject), device, Ahead()).measure()


def _breakdown(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    row = subject.rows[0]
    if row.layer == WHOLE:
        model, x = study.pruned(_study(subject, bench), row.network, sparsity_of(row.weights), _precision(subject))
        return study.parts_of_network(model, x, row.network, _precision(subject))
    layer = _layer_of(subject, bench)
    methods = dict.fromkeys(key[0] for key in keys)
    return [part for name in methods for part in study.parts_of_layer(layer, _best(subject, name), _seed(subject))]


def _counters(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    if reason := counters.unavailable():
        raise NotHereError(reason)
    row = subject.rows[0]
    config = suite.config_of(by_name(row.method, bench.device(subject)), row)
    time_us, _ = counters.read(_layer_of(subject, bench), row.method, config, _seed(subject))
    return [replace(row, time_us=round(time_us, 2))]


def _conversion(subject: Subject, keys: Sequence[Key], bench: Bench) -> list[Row]:
    row = subject.rows[0]
    is_random = row.weights.startswith("random-")
    conversion = Conversion(
        network=row.network,
        batch=row.batch,
        device=bench.device(subject),
        precision=_precision(subject),
        effort=row.config["effort"] if row.method in ("convert", "load") else "fast",
        sparsity=sparsity_of(row.weights) if is_random else None,
        patterns=None if is_random else str(bench.file(row.weights).resolve()),
        seed=_seed(subject),
    )
    if subject.kind == "choices":
        return suite.measure_choices(conversion, limit_s=bench.limit_s)
    if subject.kind == "calls":
        return suite.measure_calls(conversion, limit_s=bench.limit_s)
    with_load = any(key[0] == "load" for key in keys)
    return suite.measure_conversion(conversion, with_load=with_load, limit_s=bench.limit_s)


#: What measures subjects of files of these kinds again; layers and whole networks of all others go by their rows.
_KINDS = {
    "networks": _networks,
    "inference": _inference,
    "speed": _speed,
    "breakdown": _breakdown,
    "counters": _counters,
    "conversions": _conversion,
}
