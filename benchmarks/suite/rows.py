"""Rows, one per timed way to run something: how they come to be, what they say together, and files of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from platform import python_version
from statistics import geometric_mean
from typing import Any, Literal

from escort.cli.doctor import installed_version
from escort.methods import Method
from escort.planner.machine import Machine

#: How a whole network is timed, see :class:`Row`.
NetworkTimer = Literal["graph", "call", "pipelined", "host"]
#: The `layer` of a row that is about a whole network.
WHOLE = "all"
#: Names the commit of a tree that is no repository.
COMMIT_VARIABLE = "ESCORT_COMMIT"


@dataclass(frozen=True)
class Row:
    """One timed way to run a layer or a network; the fields of a result file.

    Attributes:
        time_us: median time of a call; of a conversion or a load its wall time.
        rel_error: ``||out - ref|| / ||ref||`` against float64, checked before timing; of a conversion, of what was
            converted in it and of a load against the original.
        timer: how a whole network was timed: "graph" by replays of a CUDA graph, "call" by calls of which each is
            waited for, "pipelined" by calls back to back, "host" by what the host takes for a call that replays no
            graph and that nobody waits for. None for layers, and in files of before there was a choice.
        rounds_us: of a whole network on the CPU the median of each round, each in a process of its own; `time_us` is
            their median. Empty in files of before that.
        others: the largest share of the cores' time that other processes took in one of them.
    """

    network: str
    weights: str
    layer: str
    batch: int
    dtype: str
    method: str
    config: dict[str, Any]
    time_us: float
    rel_error: float
    timer: NetworkTimer | None = None
    rounds_us: tuple[float, ...] = ()
    others: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds_us", tuple(self.rounds_us))  # a list, out of a file

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; the last three where they say anything."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


def config_of(method: Method, row: Row) -> Any:
    """The configuration of a method in a row, which may say more besides."""
    names = [field.name for field in fields(method.config_type)]
    return method.config_type(**{name: row.config[name] for name in names if name in row.config})


def check(error: float, bound: float, what: str) -> None:
    """Raises RuntimeError where an output's error exceeds its bound or is NaN."""
    if not error <= bound:
        raise RuntimeError(f"{what}: relative error {error:.1e} exceeds {bound:.0e}; please report it")


def leave_out(what: str, reason: str | None) -> None:
    """Warns that something has no row."""
    warnings.warn(f"{what} is left out: {reason}", stacklevel=3)


def best_times(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[str, float]]:
    """(network, layer, batch) to method to the time in microseconds of its fastest configuration."""
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        times = best.setdefault((row.network, row.layer, row.batch), {})
        times[row.method] = min(row.time_us, times.get(row.method, math.inf))
    return best


def geometric_means(rows: Iterable[Row], ours: str) -> dict[str, dict[str, float]]:
    """How many times faster `ours` is than each rival: the geometric mean per network, and under "all" of all rows.

    Each method counts with its fastest configuration; a layer counts where both were timed.
    """
    ratios: dict[str, dict[str, list[float]]] = {}
    for (network, _, _), times in best_times(rows).items():
        for rival, time in times.items():
            if rival != ours and ours in times:
                for name in (network, "all"):
                    ratios.setdefault(name, {}).setdefault(rival, []).append(time / times[ours])
    return {
        name: {rival: geometric_mean(of_rival) for rival, of_rival in rivals.items()}
        for name, rivals in sorted(ratios.items(), key=lambda item: item[0] == "all")
    }


#: Variables that hold torch and OpenVINO to some instructions of the processor.
_HELD_BY = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def header(command: str, device: str = "cpu") -> dict[str, Any]:
    """What a result is measured on and by: device, versions, commit, date and command.

    Made before the timing: its load average tells whether other processes kept the cores busy. OpenMP code waits for
    threads that are not running then, which makes torch, and dense convolutions above all, slower many times over.
    """
    machine = Machine.here(device)
    if device == "cpu":
        hardware: dict[str, Any] = {"device": "cpu", "cpu": machine.device, "isa": machine.isa}
        hardware["threads"] = machine.threads
        hardware["cores"] = sorted(os.sched_getaffinity(0))
        if held := {name: os.environ[name] for name in _HELD_BY if name in os.environ}:
            hardware["held_to"] = held
        packages = "numpy", "onnxruntime", "openvino", "ai-edge-litert"
        libraries: dict[str, str | None] = {name: installed_version(name) for name in packages}
        timing = (
            "median in microseconds of calls after warm-up, of layers taken in turn; of whole networks each engine "
            "alone, in a fresh process each round, engines taking turns: median of the rounds' medians (rounds_us); "
            "outputs checked first"
        )
    else:
        hardware = {"device": "cuda", "gpu": machine.device, "isa": machine.isa, "driver": machine.driver}
        others = {name: installed_version(name) for name in ("numpy", "cuda-core", "triton")}
        libraries = {"cuda": machine.cuda, "cudnn": machine.cudnn, **others}
        timing = (
            "device time of a call in microseconds: median of CUDA graph replays taken in turn after warm-up, over "
            "inputs and outputs twice the L2 cache where one call's are smaller; outputs checked first; whole networks "
            "by their timer: such replays on one input, calls each waited for (call) or back to back (pipelined) by "
            "the host's clock"
        )
    return {
        **hardware,
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": python_version(), "torch": machine.torch, "escort": machine.escort, **libraries},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "timing": timing,
    }


def write_results(path: Path, head: dict[str, Any], rows: Iterable[Row]) -> None:
    """Writes a result file: ``{"header": ..., "rows": [...]}``, one row a line."""
    write_lines(path, head, (row.to_json() for row in rows))


def write_lines(path: Path, head: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """The same of rows of any kind, as JSON values."""
    lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
    path.write_text(f'{{"header": {json.dumps(head, indent=2)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def commit() -> str | None:
    """The commit that this file was run from, "-dirty" where tracked files differ.

    Outside of its repository the one that the environment names, for a copy of a tree without its history; or None.
    """
    # An installed copy may lie inside another project's repository: only a tracked file tells of the right one.
    tracked = ["git", "ls-files", "--error-unmatch", __file__]
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    try:
        subprocess.run(tracked, cwd=Path(__file__).parent, capture_output=True, check=True)
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE)
    return done.stdout.strip()
