"""The tables of the zoo: per library, per network, and why convolutions were left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.zoo.rows import ZooRow
from escort.report import Table

_LONGEST = 100  # characters of a message in a cell


def zoo_tables(header: Mapping[str, Any], rows: Sequence[ZooRow]) -> dict[str, Table]:
    """By the names that documents call them."""
    return {
        "zoo-totals": _totals(rows),
        "zoo": Table("Networks", _COLUMNS, tuple(_line(row) for row in rows), _CAPTION),
        "zoo-left": _reasons("Convolutions that were left alone", "Reason", _left(rows)),
        "zoo-graphs": _messages("Networks in parts", "Why it is no graph as a whole", rows, "why_not_whole"),
        "zoo-files": _messages("Networks without a file", "Why", rows, "saved"),
        "zoo-failed": _messages("Networks that were not converted", "Why", rows, "failed"),
        "zoo-conditions": _conditions(header, rows),
    }


_COLUMNS = (
    *("Network", "Input", "Convolutions", "Swapped", "Fused", "Left alone", "Graph"),
    *("Error", "More samples", "Another size", "File", "Right"),
)
_CAPTION = (
    "Graph: around n, where the graph of the network calls n modules as they are. "
    "Error: relative, against float64, in brackets that of the original in float32. Swapped counts layers: a "
    "convolution that is called twice may be two. Another size: for those that take one size only, yet more samples."
)


def _line(row: ZooRow) -> tuple[str, ...]:
    shapes = " and ".join("x".join(map(str, shape)) for shape in row.input)
    counts = (str(count) for count in (row.convolutions, row.swapped, row.fused, sum(row.left.values())))
    errors = [_error(error) for error in row.errors.values()]
    errors += ["-"] * (3 - len(errors))
    file = "loaded" if row.saved == "loaded" else row.saved.partition(":")[0] or "-"
    return row.network, shapes, *counts, row.traced or "-", *errors, file, "yes" if row.is_right else "no"


def _error(error: list[float] | str) -> str:
    if isinstance(error, str):
        return "fails"
    ours, *own = (f"{each:.0e}" for each in error)
    return f"{ours} ({own[0] if own else 'no float64'})"


_TOTALS = (
    *("Library", "Networks", "Converted", "Right at all sizes", "Whole graphs", "Saved and loaded"),
    *("Convolutions", "Swapped", "Fused", "Left alone"),
)


def _totals(rows: Sequence[ZooRow]) -> Table:
    lines = []
    libraries = list(dict.fromkeys(row.network.partition("/")[0] for row in rows))
    for library in (*libraries, "all"):
        members = [row for row in rows if library in ("all", row.network.partition("/")[0])]
        counts = (
            len(members),
            sum(not row.failed for row in members),
            sum(row.is_right for row in members),
            sum(row.traced == "whole" for row in members),
            sum(row.saved == "loaded" for row in members),
            sum(row.convolutions for row in members),
            sum(row.swapped for row in members),
            sum(row.fused for row in members),
            sum(sum(row.left.values()) for row in members),
        )
        lines.append((library, *map(str, counts)))
    return Table("The zoo", _TOTALS, tuple(lines))


def _left(rows: Sequence[ZooRow]) -> Iterator[tuple[str, str, int]]:
    for row in rows:
        for reason, count in row.left.items():
            yield reason, row.network, count


def _reasons(title: str, column: str, found: Iterator[tuple[str, str, int]]) -> Table:
    counts: Counter[str] = Counter()
    networks: dict[str, list[str]] = {}
    for reason, network, count in found:
        counts[reason] += count
        networks.setdefault(reason, []).append(network)
    lines = tuple((reason, str(count), _few(networks[reason])) for reason, count in counts.most_common())
    return Table(title, (column, "Convolutions", "In"), lines)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _messages(title: str, column: str, rows: Sequence[ZooRow], field: str) -> Table:
    messages = {row.network: getattr(row, field) for row in rows}
    lines = tuple((name, _short(why)) for name, why in messages.items() if why and why != "loaded")
    return Table(title, ("Network", column), lines)


def _short(message: str) -> str:
    return message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."


def _conditions(header: Mapping[str, Any], rows: Sequence[ZooRow]) -> Table:
    """What the last run was made with; the commits are those of all rows."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    commits = ", ".join(dict.fromkeys(row.commit[:7] for row in rows if row.commit))
    cells = str(header["cpu"]), commits, str(header["date"])[:10], versions
    return Table("Conditions", ("Device", "Commits", "Date", "Versions"), (cells,))
