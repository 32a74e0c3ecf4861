"""What a change of one field of a configuration costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.suite import Row


@dataclass(frozen=True)
class Change:
    """One field of a layer's chosen configuration set to another value, and what that costs."""

    network: str
    layer: str
    field: str
    chosen: str
    value: str
    time_us: float
    cost: float


def changes_of(rows: Iterable[Row]) -> list[Change]:
    """A layer's first row is the chosen configuration, the others are changes of it."""
    chosen: dict[tuple[str, str], Row] = {}
    changes = []
    for row in rows:
        base = chosen.setdefault((row.network, row.layer), row)
        changed = [name for name, value in row.config.items() if value != base.config.get(name)]
        if changed:
            before, after = (
                ", ".join(str(config.get(name)) for name in changed) for config in (base.config, row.config)
            )
            cost = row.time_us / base.time_us
            changes.append(Change(row.network, row.layer, " and ".join(changed), before, after, row.time_us, cost))
    return changes
