"""escort cache: the compiled GPU kernels and the measured plans that this machine keeps."""

from __future__ import annotations

import time
from enum import StrEnum
from itertools import starmap
from pathlib import Path
from typing import Annotated

import typer

from escort import artifact, cache, report
from escort.cli.console import Output
from escort.cli.options import check_writable, command
from escort.network.wording import convolution
from escort.planner import store

_KERNEL = ("Kernel", "For", "Defines", "Registers", "kB", "Used", "Entry")
_PLAN = ("Convolution", "Batch", "Nonzeros", "For", "Method", "µs", "Dense µs", "kB", "Used", "Entry")
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


class Action(StrEnum):
    """What is done with what is kept, as Typer wants it."""

    LIST = "list"
    EXPORT = "export"
    IMPORT = "import"
    CLEAR = "clear"


@command
def main(
    output: Output,
    action: Annotated[
        Action,
        typer.Argument(
            help="list shows kernels and plans; export writes all plans to a file, and import takes in those of such a "
            "file that are not there yet; clear removes kernels and plans, each of which is made anew when needed.",
        ),
    ] = Action.LIST,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="JSON, for export and import.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="The same as clear.")] = False,
) -> None:
    """List the compiled GPU kernels and the measured plans that this machine keeps, share the plans, or remove all."""
    if clear and action is Action.LIST:
        action = Action.CLEAR
    if (file is None) is (action in (Action.EXPORT, Action.IMPORT)) or (clear and action is not Action.CLEAR):
        raise ValueError("give a FILE to export and import, and to nothing else: escort cache export FILE")
    cache.limit_bytes()  # which says what is wrong with it
    if file is None:
        _clear(output) if action is Action.CLEAR else _list(output)
    elif action is Action.EXPORT:
        if file.suffix != ".json":
            raise ValueError(f"{file}: the plans are written to a .json file; name it so")
        check_writable(file)
        count = artifact.export_plans(file)
        output.result = {"file": str(file), "exported": count}
        output.text.print(f"wrote {_count(count, 'plan')} to {file}")
    else:
        taken, known, without_room = artifact.import_plans(file)
        output.result = {"file": str(file), "imported": taken, "known": known, "without_room": without_room}
        text = f"took in {_count(taken, 'plan')} of {file}, and left out {known} that were there already"
        if without_room:
            limit = f"the cache holds {_mb(cache.limit_bytes())}; set {cache.LIMIT_VARIABLE} to a larger size"
            text += f" and {without_room} for which there is no room: {limit}"
        output.text.print(text)


def _clear(output: Output) -> None:
    removed = {kind: cache.clear(kind) for kind in cache.KINDS}
    size = sum(size for _, size in removed.values())
    counts: dict[str, int] = {kind: count for kind, (count, _) in removed.items()}
    output.result = {"folder": str(cache.folder()), "removed": sum(counts.values()), **counts, "bytes": size}
    texts = " and ".join(_count(count, kind) for kind, count in counts.items())
    output.text.print(f"removed {texts}, {_mb(size)}, from {cache.folder()}")


def _list(output: Output) -> None:
    kernels, plans = cache.entries("kernel"), store.entries()
    sizes = sum(entry.size_bytes for entry in kernels), sum(entry.size_bytes for entry, _ in plans)
    output.result = {
        "folder": str(cache.folder()),
        "total_bytes": sum(sizes),
        "limit_bytes": cache.limit_bytes(),
        "entries": [
            {"file": f"{entry.key}.kernel", "bytes": entry.size_bytes, "used": entry.used, **entry.description}
            for entry in kernels
        ],
        "plans": [
            {"file": f"{entry.key}.plan", "bytes": entry.size_bytes, "used": entry.used}
            | ({} if stored is None else store.to_json(*stored))
            for entry, stored in plans
        ],
    }
    where = f"of at most {_mb(cache.limit_bytes())} in all, in {cache.folder()}"
    tables = (
        ("Compiled kernels", _KERNEL, map(_kernel, kernels), f"Kernels: {len(kernels)}, {_mb(sizes[0])} {where}"),
        ("Measured plans", _PLAN, starmap(_plan, plans), f"Plans: {len(plans)}, {_mb(sizes[1])} {where}"),
    )
    for heading, columns, rows, caption in tables:
        output.text.print(report.terminal(report.Table(heading, columns, tuple(rows), caption)))


def _kernel(entry: cache.Entry) -> tuple[str, ...]:
    match entry.description:
        case {"source": str(source), "arch": str(arch), "defines": dict(defines), "registers": int(registers)}:
            macros = " ".join(f"{key}={value}" for key, value in defines.items())
            return source, arch, macros, str(registers), *_file(entry)
    return "damaged", "-", "-", "-", *_file(entry)


def _plan(entry: cache.Entry, stored: tuple[store.Key, store.Hint] | None) -> tuple[str, ...]:
    if stored is None:
        return "damaged, or of another version", *6 * ("-",), *_file(entry)
    key, hint = stored
    problem = f"{convolution(key.problem)}, {key.problem.precision}"
    times = (f"{time_us:,.1f}" if time_us else "-" for time_us in (hint.plan.time_us, hint.plan.dense_time_us))
    about = f"{key.about_nonzeros:,}"
    return problem, str(key.problem.batch), about, key.machine.device, hint.plan.method, *times, *_file(entry)


def _file(entry: cache.Entry) -> tuple[str, str, str]:
    return f"{entry.size_bytes / 1000:,.0f}", _age(time.time() - entry.used) if entry.used else "never", entry.key[:12]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _age(seconds: float) -> str:
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
