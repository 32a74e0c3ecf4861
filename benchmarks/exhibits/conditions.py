"""The table of what results were measured on."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.result_files import Result, runs_of
from escort.report import Table


def conditions_table(results: Mapping[str, Result]) -> Table:
    """A line per result file: its device, versions, date, commit and command."""
    lines = []
    for stem, result in results.items():
        head = result.header
        versions = head.get("versions", {})
        runs = runs_of(head)
        libraries = ("torch", "cudnn", "onnxruntime", "openvino")
        told = ", ".join(f"{name} {versions[name]}" for name in libraries if versions.get(name))
        commits = ", ".join(dict.fromkeys(_short(run["commit"]) or "unknown" for run in runs))
        earlier = f" and {len(runs) - 1} before" if len(runs) > 1 else ""
        cells = (stem, device_of(result), told or None, str(head.get("date"))[:10], commits)
        command = f"`{head.get('command', '-')}`{earlier}"
        lines.append((*("-" if cell is None else str(cell) for cell in cells), command))
    return Table("Measured on", ("File", "Device", "Versions", "Date", "Commits", "Last command"), tuple(lines))


def device_of(result: Result) -> str:
    """The device of a result, with what its speed depends on."""
    head = result.header
    if "threads" in head:
        return f"{head.get('cpu')}, {head.get('isa')}, {head['threads']} threads"
    driver = f", driver {head['driver']}" if head.get("driver") else ""
    return f"{head.get('gpu') or head.get('cpu')}{driver}"


def _short(commit: str | None) -> str | None:
    """The commit's first digits, and whether tracked files differed from it."""
    return None if commit is None else commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
