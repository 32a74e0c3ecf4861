"""Conversions and loads in fresh processes, and what conversions of little and of much search choose.

A conversion's time is the wall time of `escort.convert` alone: importing torch and Escort, building the model and
starting the device are over by then. :mod:`benchmarks.suite.fresh` is what runs in the processes.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.suite.rows import WHOLE, Row, leave_out
from escort.network.check import Effort
from escort.problem import Precision

#: What a fresh process measures.
Task = Literal["convert", "load", "choices", "calls"]
_PROCESS = "benchmarks.suite.fresh"
#: Where Escort keeps what it compiled and measured.
CACHE_VARIABLE = "ESCORT_CACHE_DIR"
#: How long an exhaustive search lasts where it is not said.
SEARCH_S = 30.0
#: Where others than Escort keep what they compile: conversions with empty caches find nothing there either.
_OTHER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


@dataclass(frozen=True)
class Conversion:
    """A network to be converted in a process of its own; plain values, for its command line.

    Attributes:
        network, sparsity, patterns, input_size: as of :meth:`Subject.load`; patterns is a path.
        batch: samples of the example.
        device: with its number.
        seed: of weights and example.
    """

    network: str
    batch: int
    device: str = "cpu"
    precision: Precision = "fp32"
    effort: Effort = "fast"
    sparsity: float | None = None
    patterns: str | None = None
    input_size: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def label(self) -> str:
        """Tells it from the others of a file."""
        weights = "random" if self.sparsity is None else f"random-{self.sparsity:.2f}"
        if self.patterns is not None:
            weights = Path(self.patterns).stem
        return f"{self.network} {weights} N={self.batch} {self.effort}"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Conversion:
        size = data["input_size"]
        return cls(**{**data, "input_size": None if size is None else tuple(size)})


def measure_conversion(
    conversion: Conversion, *, with_load: bool, limit_s: float, say: Callable[[str], object] = lambda line: None
) -> list[Row]:
    """The network converted twice, each time in a fresh process: with empty caches, and with what the first left.

    With a load, a third process without a compiler, caches and a home that it could write to loads what was converted
    and calls it once. A load that fails is left out with a warning.

    Args:
        limit_s: seconds that a process may take.
        say: is told of each time, and of the GPU's memory.

    Raises:
        RuntimeError: where a process fails, or converts into something wrong.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="escort-") as folder:
        saved = Path(folder) / "saved"
        for caches in ("empty", "filled"):
            keep = {"saved": str(saved)} if with_load and caches == "filled" else {}
            found = _in_a_process("convert", conversion, _environment(Path(folder) / "caches"), limit_s, **keep)
            memory = f", {found['peak_bytes'] / 2**20:,.0f} MiB of the GPU at most" if found["peak_bytes"] else ""
            say(f"{conversion.label}, {caches} caches: {found['time_us'] / 1e6:.2f} s{memory}")
            rows.append(_row(conversion, "convert", {"caches": caches, "effort": conversion.effort}, found))
        if with_load:
            try:
                found = _in_a_process("load", conversion, _bare_environment(), limit_s, saved=str(saved))
            except RuntimeError as failure:
                leave_out(f"{conversion.label}, load", str(failure))
            else:
                say(f"{conversion.label}, load and first call: {found['time_us'] / 1e6:.2f} s")
                rows.append(_row(conversion, "load", {"effort": conversion.effort}, found))
    return rows


def measure_choices(
    conversion: Conversion,
    *,
    limit_s: float,
    search_s: float = SEARCH_S,
    say: Callable[[str], object] = lambda line: None,
) -> list[Row]:
    """What the effort "fast" chooses and what an exhaustive search does, found in one process and raced in turn.

    Neither compiles anything for the weights. On a GPU they are raced by replays of CUDA graphs.

    Args:
        search_s: seconds after which no further layer is searched exhaustively; the row says how many were.

    Raises:
        RuntimeError: where the process fails, or one of them is wrong or cannot be captured.
    """
    with tempfile.TemporaryDirectory(prefix="escort-") as folder:
        found = _in_a_process("choices", conversion, _environment(Path(folder)), limit_s, search_s=search_s)
    rows = [_row(conversion, "escort", choice["config"], {**found, **choice}) for choice in found["choices"]]
    fast, exhaustive = (row.time_us for row in rows)
    about = rows[1].config
    said = f"{conversion.label}: {fast:,.1f} us, {fast / exhaustive:.3f} of what an exhaustive search chooses takes"
    say(f"{said} ({about['searched_layers']} of {about['all_layers']} layers, {about['candidates']} candidates)")
    return rows


def measure_calls(
    conversion: Conversion, *, limit_s: float, say: Callable[[str], object] = lambda line: None
) -> list[Row]:
    """What a caller of the converted network sees, by all timers; on the CPU by calls alone.

    Raises:
        RuntimeError: where the process fails, or what was converted is wrong or cannot be captured.
    """
    with tempfile.TemporaryDirectory(prefix="escort-") as folder:
        found = _in_a_process("calls", conversion, _environment(Path(folder)), limit_s)
    rows = [_row(conversion, "escort", found["config"], {**found, **call}) for call in found["calls"]]
    times = ", ".join(f"{row.timer} {row.time_us:,.1f} us" for row in rows)
    say(f"{conversion.label}, {found['config']['layers']} layers: {times}")
    return rows


def _row(conversion: Conversion, method: str, config: dict[str, Any], found: Mapping[str, Any]) -> Row:
    about = found["network"], found["weights"], WHOLE, conversion.batch, conversion.precision
    return Row(*about, method, config, round(found["time_us"], 2), found["rel_error"], found.get("timer"))


def _in_a_process(
    task: Task, conversion: Conversion, environment: Mapping[str, str], limit_s: float, **options: str | float
) -> dict[str, Any]:
    """What a fresh process found. Raises RuntimeError with the last that it said where it found nothing."""
    job = json.dumps({"task": task, "conversion": asdict(conversion), **options})
    words = [sys.executable, "-m", _PROCESS, job]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, env=dict(environment))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took more than {limit_s:.0f} s") from None
    lines = (done.stderr.strip() or "without a word").splitlines()
    if done.returncode != 0:
        raise RuntimeError(f"its process ended with {done.returncode}: {lines[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _environment(folder: Path) -> dict[str, str]:
    """This process's, with every cache in a folder. Escort's own variables keep their defaults."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("ESCORT_")}
    return {**plain, CACHE_VARIABLE: str(folder), **{name: str(folder / name) for name in _OTHER_CACHES}}


def _bare_environment() -> dict[str, str]:
    """This process's, without programs that compile, caches, and a home in which anything could be written."""
    gone = ("PATH", "XDG_CACHE_HOME", *_OTHER_CACHES)
    plain = {n: value for n, value in os.environ.items() if not n.startswith("ESCORT_") and n not in gone}
    # Nothing can be made below a file, whoever tries. Packages of the user's stay where they are.
    return {**plain, "HOME": os.devnull, "PATH": os.devnull, "PYTHONUSERBASE": site.getuserbase()}
