"""Result files with the names that configurations have today: python -m benchmarks.migrate FOLDER.

Fields of configurations were renamed after these results were measured. This rewrites the configs of their rows, and
says so in the header; times, methods and all other keys stay. A file that has today's names already stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import suite
from benchmarks.result_files import Result
from benchmarks.suite import Row

#: By method the keys of its configs that have another name today.
KEYS = {
    "direct": {
        "rows": "out_channels",
        "row_warps": "out_channel_warps",
        "channel_warps": "in_channel_warps",
        "blocks": "occupancy",
    },
    "generated": {
        "rows": "out_channels",
        "blocks": "occupancy",
        "entries": "start_points",
        "together": "multicast",
        "scouts": "prefetch_warps",
    },
    "sparse_tc": {"fill": "tap_group", "blocks": "m_blocks", "images": "samples", "layout": "memory_format"},
    "escort": {"images": "samples"},
}
#: By method and key the values that have another name today.
VALUES = {("cublas", "unfold"): {"by_image": "by_sample"}, ("cusparse", "unfold"): {"by_image": "by_sample"}}


def migrated(result: Result) -> Result:
    """A result with today's names; the same where it has them already."""
    rows = [replace(row, config=_config(row)) for row in result.rows]
    if rows == result.rows:
        return result
    changed = {old.method for old, new in zip(result.rows, rows, strict=True) if old != new}
    return Result({**result.header, "migrated": f"config keys renamed: {_renamed(changed)}"}, rows)


def _config(row: Row) -> dict[str, Any]:
    keys = KEYS.get(row.method, {})
    return {
        keys.get(key, key): VALUES.get((row.method, key), {}).get(value, value) if isinstance(value, str) else value
        for key, value in row.config.items()
    }


def _renamed(methods: set[str]) -> str:
    """What was renamed of these methods, for the header."""
    notes = []
    for method in sorted(methods):
        names = [*KEYS.get(method, {}).items()]
        names += [pair for (of, _), values in VALUES.items() if of == method for pair in values.items()]
        notes.append(f"{method}: {', '.join(f'{old} -> {new}' for old, new in names)}")
    return "; ".join(notes)


def migrate(folder: Path) -> list[Path]:
    """Rewrites the result files in a folder and below, and returns those that changed."""
    changed = []
    for path in sorted(folder.rglob("*.json")):
        if "rows" not in json.loads(path.read_text(encoding="utf-8")):
            continue  # the aims
        result = Result.read(path)
        today = migrated(result)
        if today is not result:
            suite.write_results(path, today.header, today.rows)
            changed.append(path)
    return changed


def main(arguments: Sequence[str]) -> None:
    """Migrates the folders that are named."""
    for name in arguments:
        for path in migrate(Path(name)):
            print(f"migrated {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
