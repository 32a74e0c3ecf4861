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
    """In sentences the files of a table with their commits, and which is the last one beside those that are older.

    Args:
        files: names in results, of which those of a folder have its name before a slash.
    """
    by_commits: dict[str, list[str]] = {}
    last: dict[str, str] = {}
    for file in files:
        folder = _folder(file)
        beside = [name for name in results if _folder(name) == folder]
        commits = commits_of(results[file])
        newest = commits_of(results[max(beside, key=lambda name: _date(results[name]))])[-1]
        is_older = commits != [newest]
        day = f" of {_date(results[file])[:10]}" if is_older else ""
        by_commits.setdefault(", ".join(commits) + day, []).append(f"`{file}`")
        if is_older:
            last[f"of `{folder}`" if folder else "here"] = newest
    told = (f"{', '.join(names)} ({commits})" for commits, names in by_commits.items())
    older = (f" The last commit {where} is {newest}." for where, newest in last.items())
    return f"From {'; '.join(told)}.{''.join(older)}"


def commits_of(result: Result) -> list[str]:
    """The commits of all runs that a file's rows come from, in short, the last one last."""
    return list(dict.fromkeys(_short(run["commit"]) for run in runs_of(result.header)))


def _folder(file: str) -> str:
    """The device's folder of a file, empty where a folder's own files are shown."""
    return file.partition("/")[0] if "/" in file else ""


def _date(result: Result) -> str:
    return str(result.header.get("date"))


def _short(commit: str | None) -> str:
    """The commit's first digits, and whether tracked files differed from it."""
    return "unknown" if commit is None else commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
