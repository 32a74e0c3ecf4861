"""The zoo's result file: one row a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suite.rows import write_lines
from escort.artifact.files import replace_file

#: The committed file.
ZOO = Path(__file__).parents[1] / "results" / "zoo.json"


#: A converted network may be off by this much, or by so many times the original's own error.
BOUND, AS_GOOD = 1e-4, 3.0


@dataclass(frozen=True)
class ZooRow:
    """What became of a network.

    Attributes:
        network: library/name.
        input: the shapes of the example.
        convolutions: how many modules of the model are convolutions, of any number of dimensions, transposed too.
        swapped: how many layers of the converted network run sparse. A convolution that is called several times may
            have become several.
        fused: how many of these have a norm folded into them, or an activation or a residual fused.
        left: how many convolutions were left alone, by the reason.
        traced: "whole", "around n" modules that are called as they are, "in n parts" or "not".
        errors: for the example and two other sizes, by their shapes: the relative errors of the converted network and
            of the original, against the original in float64; that against the original alone, where it does not run
            in float64; a message where the converted network does not run.
        saved: "loaded" where another process loads the file and computes the same; else why not.
        failed: why there is no converted network; empty where there is one.
        seconds: what all of it took, on a machine that may have been busy.
        commit: what it was run from.
    """

    network: str
    input: list[list[int]] = field(default_factory=list)
    convolutions: int = 0
    swapped: int = 0
    fused: int = 0
    left: dict[str, int] = field(default_factory=dict)
    traced: str = ""
    why_not_whole: str = ""
    errors: dict[str, list[float] | str] = field(default_factory=dict)
    saved: str = ""
    failed: str = ""
    seconds: float = 0.0
    commit: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it was converted, and agrees with float64 wherever the original does."""
        return not self.failed and bool(self.errors) and all(map(_agrees, self.errors.values()))


def _agrees(error: list[float] | str) -> bool:
    """Whether the errors at one size are those of a network that is right."""
    if isinstance(error, str):
        return False
    ours, *own = error
    return ours <= max([BOUND, *(AS_GOOD * each for each in own)])


def read_zoo(path: Path = ZOO) -> tuple[dict[str, Any], list[ZooRow]]:
    """Header and rows. Raises ValueError, naming the file, where it is not one of these."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return dict(data["header"]), [ZooRow(**row) for row in data["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result file of the zoo: {error}") from error


def write_zoo(path: Path, head: Mapping[str, Any], rows: list[ZooRow]) -> None:
    """Replaces the file."""
    replace_file(path, lambda unfinished: write_lines(unfinished, head, map(asdict, rows)))
