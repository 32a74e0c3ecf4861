"""python -m benchmarks zoo: networks of other libraries, converted with sparse methods forced; nothing is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import suite
from benchmarks.commands.options import PROGRAM
from benchmarks.exhibits.zoo import zoo_tables
from benchmarks.zoo import ENTRIES, LIBRARIES, ZOO, Entry, ZooRow, read_zoo, write_zoo
from escort import report
from escort.cli.console import Output, note, progress
from escort.cli.doctor import installed_version
from escort.cli.options import check_writable, command


@dataclass(frozen=True)
class ZooOptions:
    """Which networks, and where the results go."""

    only: Annotated[
        str, typer.Option(metavar="GLOB,...", help="Only networks named like these; the file keeps the others' rows.")
    ] = "*"
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time, each with one thread.")] = 2
    limit_s: Annotated[float, typer.Option(min=1.0, help="Seconds after which a network is given up.")] = 600.0
    output_path: Annotated[Path, typer.Option("--output", "-o", help="Result file.")] = ZOO


@command
def main(options: ZooOptions, output: Output) -> None:
    """Convert a zoo of networks, hold them to float64 at three sizes, save them, and load them in another process.

    Each runs in a process of its own; the result file is written after each. `make zoo` has what this needs.
    """
    entries = _chosen(options.only)
    check_writable(options.output_path)
    head = _header(options.only)
    rows: dict[str, ZooRow] = {}
    if options.only != "*" and options.output_path.is_file():
        rows, head = _continued(options.output_path, head)
    with progress() as bar:
        task = bar.add_task("examining", total=len(entries))
        for row in _examined(entries, options):
            rows[row.network] = row
            ordered = [rows[entry.name] for entry in ENTRIES if entry.name in rows]
            write_zoo(options.output_path, head, ordered)
            bar.update(task, advance=1, description=row.network)
            if not row.is_right:
                note(f"{row.network}: {row.failed or row.errors}")
    for name, table in zoo_tables(head, ordered).items():
        if name != "zoo":
            output.text.print(report.terminal(table))
    output.text.print(f"wrote {options.output_path}")
    output.result = {"output": str(options.output_path), "header": head, "rows": [asdict(row) for row in ordered]}
    output.failed = not all(row.is_right for row in ordered)


def _chosen(only: str) -> list[Entry]:
    globs = only.split(",")
    entries = [entry for entry in ENTRIES if any(fnmatch(entry.name, glob) for glob in globs)]
    if not entries:
        raise ValueError(f"--only {only}: no network is named so; they begin with {', '.join(LIBRARIES)}, own")
    libraries = [LIBRARIES[entry.library] for entry in entries if entry.library in LIBRARIES]
    if missing := [name for name in dict.fromkeys(libraries) if find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} not installed; run make zoo, which builds an environment of its own")
    return entries


def _header(only: str) -> dict[str, Any]:
    head = suite.header(f"{PROGRAM} zoo" + ("" if only == "*" else f" --only '{only}'"))
    libraries = {name: installed_version(name) for name in ("torchvision", "timm", *_DISTRIBUTIONS)}
    kept = {name: value for name, value in head.items() if name not in ("timing", "load_average", "threads")}
    return {**kept, "versions": {**head["versions"], **libraries}, "weights": "random, norms made up, 90 % zeros"}


_DISTRIBUTIONS = ("segmentation-models-pytorch", "ultralytics")


def _continued(path: Path, head: dict[str, Any]) -> tuple[dict[str, ZooRow], dict[str, Any]]:
    """The rows of earlier runs, with the same versions of everything, and a header that names the last of them."""
    before, rows = read_zoo(path)
    if before["versions"] != head["versions"]:
        raise ValueError(f"{path} is of other versions ({before['versions']}); run all of the zoo, without --only")
    continues = {name: before[name] for name in ("date", "commit", "command")}
    return {row.network: row for row in rows}, {**head, "continues": continues}


def _examined(entries: Sequence[Entry], options: ZooOptions) -> Iterator[ZooRow]:
    """The rows as they come."""
    with ThreadPoolExecutor(options.jobs) as pool:
        pending = [pool.submit(_in_a_process, entry, options.limit_s) for entry in entries]
        for done in as_completed(pending):
            yield done.result()


def _in_a_process(entry: Entry, limit_s: float) -> ZooRow:
    """A network's row, whatever becomes of its process."""
    words = [sys.executable, "-m", "benchmarks.zoo.examine", entry.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, env=environment)
        return ZooRow(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return ZooRow(entry.name, failed=f"it took more than {limit_s:.0f} s")
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return ZooRow(entry.name, failed=f"its process ended with {done.returncode}: {last}")
