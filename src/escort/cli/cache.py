"""escort cache: the compiled GPU kernels that this machine keeps."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from escort import report
from escort.cli.console import Output
from escort.cli.options import command
from escort.cuda import cache

_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


@command
def main(
    output: Output,
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all of them; each is compiled anew when needed.")
    ] = False,
) -> None:
    """List the compiled GPU kernels that this machine keeps, or remove them."""
    folder, limit = cache.folder(), cache.limit_bytes()
    if clear:
        removed, size = cache.clear()
        output.result = {"folder": str(folder), "removed": removed, "bytes": size}
        output.text.print(f"removed {removed} kernels, {_mb(size)}, from {folder}")
        return
    entries = cache.entries()
    total = sum(entry.size_bytes for entry in entries)
    output.result = {
        "folder": str(folder),
        "total_bytes": total,
        "limit_bytes": limit,
        "entries": [
            {"file": entry.path.name, "bytes": entry.size_bytes, "used": entry.used, **entry.description}
            for entry in entries
        ],
    }
    caption = f"Kernels: {len(entries)}, {_mb(total)} of at most {_mb(limit)}, in {folder}"
    columns = ("Kernel", "For", "Defines", "Registers", "kB", "Used", "Entry")
    table = report.Table("Compiled kernels", columns, tuple(map(_line, entries)), caption)
    output.text.print(report.terminal(table))


def _line(entry: cache.Entry) -> tuple[str, ...]:
    size, age, name = f"{entry.size_bytes / 1000:,.0f}", _age(time.time() - entry.used), entry.path.name[:12]
    match entry.description:
        case {"source": str(source), "arch": str(arch), "defines": dict(defines), "registers": int(registers)}:
            macros = " ".join(f"{key}={value}" for key, value in defines.items())
            return source, arch, macros, str(registers), size, age, name
    return "damaged", "-", "-", "-", size, age, name


def _age(seconds: float) -> str:
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
