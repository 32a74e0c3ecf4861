"""Hardware counters of one launch, read by Nsight Compute (``ncu``) from a process of its own.

    python -m benchmarks.counters '{"network": "resnet50", "layer": "res4a_branch2b", ...}'

runs one layer once between ``cudaProfilerStart`` and ``cudaProfilerStop``, which is all that ncu looks at.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from typing import Any

import torch

from benchmarks import suite
from benchmarks.suite import Layer
from escort.methods import by_name

_TIME = "gpu__time_duration.sum"
#: ncu's name of each counter, and ours for the columns of a table.
METRICS = {
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots %",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "FMA pipe %",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": "shared memory %",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
}
_TIMEOUT_S = 120


def unavailable() -> str | None:
    """Why counters cannot be read on this machine, or None."""
    if shutil.which("ncu") is None:
        return "ncu is not on the PATH; install NVIDIA Nsight Compute"
    return None


def command(layer: Layer, method: str, config: Any, seed: int) -> list[str]:
    """The command that prints the counters of one launch as CSV."""
    what = {
        "network": layer.network,
        "layer": layer.name,
        "batch": layer.problem.batch,
        "precision": layer.problem.precision,
        "device": layer.problem.device,
        "seed": seed,
        "method": method,
        "config": asdict(config),
    }
    ncu = "ncu --clock-control none --profile-from-start off --csv --print-units base --metrics".split()
    return [*ncu, ",".join((_TIME, *METRICS)), sys.executable, "-m", "benchmarks.counters", json.dumps(what)]


def read(layer: Layer, method: str, config: Any, seed: int) -> tuple[float, dict[str, float]]:
    """Runs :func:`command`: the time in microseconds, and the counters by ncu's names.

    Raises:
        RuntimeError: with what ncu said, where it failed.
    """
    words = command(layer, method, config, seed)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"ncu took more than {_TIMEOUT_S} s for {layer.name}") from error
    said = done.stdout + done.stderr
    if "ERR_NVGPUCTRPERM" in said:
        raise RuntimeError("the driver keeps hardware counters for administrators (ERR_NVGPUCTRPERM); run as root")
    if done.returncode:
        raise RuntimeError(f"ncu failed on {layer.name}: {said.strip()[-400:]}")
    counters = longest_launch(done.stdout)
    return counters.pop(_TIME) / 1e3, counters


def longest_launch(text: str) -> dict[str, float]:
    """The counters of the launch that took longest, from what ``ncu --csv --print-units base`` printed.

    ncu prints one line per launch and counter, behind lines of its own and of the program's. Counters that the device
    does not have are left out.

    Raises:
        RuntimeError: where no launch was seen.
    """
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, float]] = {}
    for record in csv.DictReader(StringIO("\n".join(lines[start:]))):
        try:
            value = float(record["Metric Value"].replace(",", ""))
        except (KeyError, ValueError, AttributeError):
            continue
        launches.setdefault(record["ID"], {})[record["Metric Name"]] = value
    timed = [counters for counters in launches.values() if _TIME in counters]
    if not timed:
        raise RuntimeError(f"ncu saw no launch; it said: {text.strip()[-400:]}")
    return max(timed, key=lambda counters: counters[_TIME])


def main(arguments: Sequence[str]) -> None:
    """Runs the layer that the JSON in the first argument describes, once within the profiler's range."""
    what = json.loads(arguments[0])
    layers = suite.paper_layers(what["batch"], what["seed"], precision=what["precision"], device=what["device"])
    layer = next(layer for layer in layers if (layer.network, layer.name) == (what["network"], what["layer"]))
    problem = layer.problem
    method = by_name(what["method"], problem.device)
    run = method.prepare(problem, layer.sparse_filter, None, method.config_type(**what["config"]))
    x = torch.randn(problem.input_shape, dtype=problem.storage, device=problem.device)
    with torch.inference_mode():
        run(x)
        torch.cuda.synchronize(x.device)
        torch.cuda.profiler.start()
        run(x)
        torch.cuda.synchronize(x.device)
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
