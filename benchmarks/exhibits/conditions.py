"""What results were measured on, and at which commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        commits = ", ".join(commits_of(result))
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


def sources(files: Sequence[str], results: Mapping[str, Result]) -> str:
    """In a sentence the files that something is made of, with their commits; what is older than its folder says so.

    Args:
        files: names in results, of which those of a folder have its name before a slash.
    """
    by_commit: dict[str, list[str]] = {}
    for file in files:
        by_commit.setdefault(_provenance(file, results), []).append(f"`{file}`")
    told = (f"{', '.join(names)} ({commit})" for commit, names in by_commit.items())
    return f"From {'; '.join(told)}."


def _provenance(file: str, results: Mapping[str, Result]) -> str:
    """The commits of a file, with the day and the folder's last commit where that is another one."""
    beside = [result for name, result in results.items() if name.partition("/")[0] == file.partition("/")[0]]
    last = max(beside if "/" in file else results.values(), key=_date)
    commits = commits_of(results[file])
    text = ", ".join(commits)
    newest = commits_of(last)[-1]
    return text if commits == [newest] else f"{text} of {_date(results[file])[:10]}; the last here is {newest}"


def commits_of(result: Result) -> list[str]:
    """The commits of all runs that a file's rows come from, in short, the last one last."""
    return list(dict.fromkeys(_short(run["commit"]) for run in runs_of(result.header)))


def _date(result: Result) -> str:
    return str(result.header.get("date"))


def _short(commit: str | None) -> str:
    """The commit's first digits, and whether tracked files differed from it."""
    return "unknown" if commit is None else commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
