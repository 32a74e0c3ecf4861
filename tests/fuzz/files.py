"""Changed files, loaded in processes of their own: each loads and runs, or is refused with a remedy.

python -m tests.fuzz.files --count 10000
python -m tests.fuzz.files --first 1234 --count 1     # the one that failed, as the failure says
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import escort
from escort.planner import timing
from tests.artifact.networks import Residual, X, sparse
from tests.network.models import Small

#: What loading a file may take: more than any small file needs, and less than the limits of docs/format.md allow.
MOST_MIB, MOST_SECONDS = 1024, 20.0
_BATCH = 200  # files of one process
_KEPT = Path("out/fuzz")


def saved(folder: Path) -> list[Path]:
    """Files to be changed, of two networks that hold most of what a file can hold."""
    paths = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(timing, "race", lambda runs, **_: [2.0] + [1.0] * (len(runs) - 1))
        for model in (Residual(), Small()):
            paths.append(folder / f"{type(model).__name__.lower()}.escort")
            escort.save(escort.convert(sparse(model), X, methods=["direct"]), paths[-1])
    return paths


def try_files(source: Path, first: int, count: int) -> Counter[str]:
    """How many files of these seeds were loaded, and how many refused.

    Raises AssertionError about the first other; the file that was changed is then kept, as it holds times.
    """
    outcomes = Counter[str]()
    command = [sys.executable, *_flags(), "-m", "tests.fuzz.worker", str(source), str(first), str(count)]
    process = subprocess.run(command, capture_output=True, text=True)
    seed = first
    for line in process.stdout.splitlines():
        if line.startswith("start "):
            seed = int(line.removeprefix("start "))
            continue
        result = json.loads(line)
        is_good = result["outcome"] in ("loaded", "refused")
        if not is_good or result["mib"] > MOST_MIB or result["seconds"] > MOST_SECONDS:
            raise AssertionError(f"{result}\n{_again(source, seed)}")
        outcomes[result["outcome"]] += 1
    if process.returncode or outcomes.total() != count:
        raise AssertionError(
            f"the process ended with {process.returncode}: {process.stderr[-3000:]}\n{_again(source, seed)}"
        )
    return outcomes


def _again(source: Path, seed: int) -> str:
    """How to run a file again, of which the source is kept."""
    _KEPT.mkdir(parents=True, exist_ok=True)
    kept = _KEPT / source.name
    if kept.resolve() != source.resolve():
        kept.write_bytes(source.read_bytes())
    return f"run it again: python -m tests.fuzz.files --source {kept} --first {seed} --count 1"


def _flags() -> list[str]:
    """With -S, as under the sanitizer, a process of its own must be started so too."""
    return ["-S"] if sys.flags.no_site else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=None, help="the first seed, by default another one each time")
    parser.add_argument("--source", type=Path, help="the file to change, by default new ones")
    options = parser.parse_args()
    first = time.time_ns() % 10**9 if options.first is None else options.first
    outcomes = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        sources = [options.source] if options.source else saved(Path(folder))
        for number, start in enumerate(range(first, first + options.count, _BATCH)):
            count = min(_BATCH, first + options.count - start)
            outcomes += try_files(sources[number % len(sources)], start, count)
    print(f"{outcomes.total()} changed files, from seed {first}: {dict(outcomes)}")


if __name__ == "__main__":
    main()
