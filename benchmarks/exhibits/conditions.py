"""The table of what results were measured on."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.result_files import Result
from escort.report import Table


def conditions_table(results: Mapping[str, Result]) -> Table:
    """A line per result file: its device, versions, date, commit and command."""
    lines = []
    for stem, result in results.items():
        head = result.header
        versions = head.get("versions", {})
        device = head.get("gpu") or head.get("cpu")
        device = f"{device}, driver {head['driver']}" if head.get("driver") else device
        if "threads" in head:
            device = f"{device}, {head.get('isa')}, {head['threads']} threads"
        cells = (stem, device, versions.get("torch"), head.get("date"), _short(head.get("commit")))
        lines.append((*("-" if cell is None else str(cell) for cell in cells), f"`{head.get('command', '-')}`"))
    return Table("Measured on", ("File", "Device", "torch", "Date", "Commit", "Command"), tuple(lines))


def _short(commit: str | None) -> str | None:
    """The commit's first digits, and whether tracked files differed from it."""
    return None if commit is None else commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
