"""A process that loads changed files and runs what it could load; it reports each of them in a line.

python -m tests.fuzz.worker FILE FIRST COUNT
"""

from __future__ import annotations

import json
import re
import resource
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from escort.artifact import ArtifactError, load
from tests.artifact.networks import X
from tests.fuzz.mutate import mutate

_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: What a file and a call may take besides what the process has: the largest that docs/format.md allows, and some more.
_LIMIT_BYTES = 6 << 30
_MOST_SECONDS = 120  # of processor time for one file and what it computes: then the process ends


def report(source: Path, seed: int, folder: Path) -> dict[str, object]:
    """What became of one changed file: its outcome, and the memory and time that loading took."""
    path = folder / "changed.escort"
    path.write_bytes(mutate(source.read_bytes(), seed))
    before, start, outcome = _peak_mib(), time.process_time(), "loaded"
    _limit(resource.RLIMIT_CPU, int(start) + _MOST_SECONDS)
    network: nn.Module | None = None
    try:
        network = load(path, remeasure=False)
    except ArtifactError as error:
        remedy = re.search(r"; (save|load|convert|pass|leave|get) [^;]*$", str(error))
        outcome = "refused" if remedy else f"no remedy: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    result = {"seed": seed, "outcome": outcome[:500], "mib": _peak_mib(reset=False) - before}
    result["seconds"] = time.process_time() - start  # of this process: others may have the processor
    if network is not None:
        with suppress(Exception), torch.inference_mode():  # a graph may be wrong in itself, and torch then says so
            network(X)
    return result


def _peak_mib(*, reset: bool = True) -> int:
    """The most memory that this process had at a time; since now, if it is reset."""
    if reset:
        _REFS.write_text("5")
    return int(re.findall(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())[0]) >> 10


def _limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def main() -> None:
    source, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    size = int(re.findall(r"VmSize:\s*(\d+) kB", _STATUS.read_text())[0]) << 10
    _limit(resource.RLIMIT_AS, size + _LIMIT_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            print(f"start {seed}", flush=True)  # the one that ends the process is known by it
            print(json.dumps(report(source, seed, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
