"""The table of how workers of Ray Data scale."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from escort.report import Table

#: The committed file.
SCALING = Path(__file__).parents[1] / "results" / "scaling.json"
_COLUMNS = (
    *("On", "Network", "Samples", "Source", "Workers"),
    *("Threads each", "Per second", "Of one call's rate each", "Of the fewest workers' rate each"),
)
_CAPTION = (
    "Samples per second. `calls` are those of one process in a loop; workers of Ray Data get arrays that are decoded, "
    "or JPEG files of 500x375. The last two columns are per worker: against such calls, and against the row of that "
    "source with the fewest workers."
)


def read_scaling(path: Path = SCALING) -> list[dict[str, Any]]:
    """The committed rows."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def scaling_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All rows, by machine and network; within these by source and workers."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((_machine(row), row["network"], row["weights"], row["batch"], row["threads"]), []).append(row)
    return Table("Workers", _COLUMNS, tuple(line for group in groups.values() for line in _lines(group)), _CAPTION)


def _lines(group: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    per_call = next((row["per_second"] for row in group if row["source"] == "calls"), None)
    fewest: dict[str, Mapping[str, Any]] = {}
    lines: list[tuple[str, ...]] = []
    for row in sorted(group, key=lambda row: (("calls", "arrays", "images").index(row["source"]), row["workers"])):
        least = fewest.setdefault(row["source"], row)
        each = row["per_second"] / row["workers"]
        is_call = row["source"] == "calls"
        lines.append(
            (
                _machine(row),
                f"{row['network']} {row['weights']} {row['precision']}",
                str(row["batch"]),
                row["source"],
                "-" if is_call else str(row["workers"]),
                str(row["threads"]) if row["run"]["device"] == "cpu" else "-",
                f"{row['per_second']:.1f}",
                "-" if is_call or per_call is None else f"{each / per_call:.0%}",
                "-" if is_call or least is row else f"{each * least['workers'] / least['per_second']:.0%}",
            )
        )
    return lines


def _machine(row: Mapping[str, Any]) -> str:
    run = row["run"]
    return str(run["gpu"]) if run["device"] == "cuda" else f"{run['cpu']}, {run['isa']}, {len(run['cores'])} cores"
