"""The measured plans of a machine in a file, for other machines of the same kind: JSON, and no binaries.

The file may come from anywhere. Whatever is wrong with any plan in it, nothing of it is taken in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from escort import cache
from escort.arguments import path_of
from escort.artifact.container import parse_list
from escort.artifact.errors import blaming
from escort.artifact.files import replace_file
from escort.planner import store
from escort.runtime.saved.errors import naming
from escort.runtime.saved.problems import check_problem

FORMAT, VERSION = "escort-plans", 1

_MOST_BYTES = 64 << 20
_MOST_PLANS = 1 << 14
_REMEDY = "export the plans again with this version, or get an undamaged copy of the file"


class Imported(NamedTuple):
    """What became of the plans in a file.

    Attributes:
        taken: how many were taken in.
        known: how many were left out because this machine has its own in their place.
        without_room: how many were left out because the cache has no room for them.
    """

    taken: int
    known: int
    without_room: int


def export_plans(path: str | os.PathLike[str]) -> int:
    """Writes all plans that this machine keeps, and returns how many.

    Raises:
        OSError: where the file cannot be written, or the folder of the plans is not the user's alone.
    """
    target = path_of(path, "plans.json")
    listed = []
    for _, stored in store.entries():
        if stored is not None:
            listed.append({name: value for name, value in store.to_json(*stored).items() if name != "imported"})
    text = json.dumps({"format": FORMAT, "version": VERSION, "plans": listed}, allow_nan=False)
    replace_file(target, lambda unfinished: unfinished.write_text(text))
    return len(listed)


def import_plans(path: str | os.PathLike[str]) -> Imported:
    """Takes in the plans of a file that :func:`export_plans` wrote. One from an untrusted source is safe.

    A plan takes effect where the device, the versions, the problem and the methods are those that it was measured with.
    Then its choice is validated as every stored one, once it was found among those that the method itself offers. None
    takes the room of what this machine keeps.

    Raises:
        ArtifactError: naming the file, the plan in it, what is wrong and the remedy. Nothing is taken in then.
        ValueError: where plans are not kept.
        OSError: where the file cannot be read, or the folder of the plans is not the user's alone.
    """
    path = path_of(path, "plans.json")
    if not store.is_kept():
        raise ValueError(f"plans are not kept here; leave out {store.KEEP_VARIABLE}=0 and {cache.LIMIT_VARIABLE}=0")
    data = _read(path)
    with blaming(path, _REMEDY):
        plans = [_plan(number, entry) for number, entry in enumerate(_entries(data))]
    own = {entry.key for entry, stored in store.entries() if stored is not None and not stored[1].imported}
    new = {key: hint for key, hint in plans if key.digest not in own}
    taken, without_room = store.add(new)  # a warning says why one could not be stored
    return Imported(taken, len(plans) - len(new), without_room)


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file; name one that escort cache export wrote")
    with open(path, "rb") as file:
        return file.read(_MOST_BYTES + 1)


def _entries(data: bytes) -> list[Any]:
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is no text, and none that escort cache export wrote") from error
    return parse_list(text, "plans", (FORMAT, VERSION), _MOST_PLANS, "escort cache export")


def _plan(number: int, data: Any) -> tuple[store.Key, store.Hint]:
    with naming(f"plan {number}"):
        if not isinstance(data, dict) or "imported" in data:
            raise ValueError("it is no plan")
        key, hint = store.from_json(data | {"imported": True})
        check_problem(key.problem)
    return key, hint
