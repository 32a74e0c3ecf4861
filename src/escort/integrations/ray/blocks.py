"""Predictions in a folder: Parquet files, each of which is there as a whole or not at all.

They are the checkpoint, too: what is in them is done. A task that is run again writes the same file again, as a file is
named by what it holds. Beside them lies a list of what could not be read, under a name that readers of folders of
Parquet skip.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from escort.artifact.files import replace_file
from escort.integrations.ray.workers import ID, OUTPUTS
from escort.report import cell

#: The list of what could not be read.
FAILED = "_failed.csv"
_MADE_BY = b"escort"  # the key of what made a file, in its metadata


@dataclass(frozen=True)
class Blocks:
    """The predictions of one network, on inputs that were prepared in one way.

    Attributes:
        folder: where the files lie.
        made_by: what made them, in texts: files of something else are refused.
    """

    folder: Path
    made_by: Mapping[str, str]

    def write(self, names: Sequence[str], outputs: NDArray[Any]) -> None:
        """Writes a file of predictions; outputs are (N, ...), and of (N, classes) the best one is written, too."""
        columns: dict[str, Any] = {ID: pa.array(names, pa.string())}
        if outputs.ndim == 2:
            top1 = outputs.argmax(axis=1)
            columns["top1"] = pa.array(top1, pa.int64())
            columns["score"] = pa.array(outputs[np.arange(len(top1)), top1])
        columns[OUTPUTS] = (
            pa.array(outputs) if outputs.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(outputs)
        )
        table = pa.table(columns).replace_schema_metadata({_MADE_BY: json.dumps(dict(self.made_by))})
        digest = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
        replace_file(self.folder / f"{digest[:32]}.parquet", lambda path: pq.write_table(table, path))

    def settle(self) -> set[str]:
        """The inputs that are done. Where two files hold the same one, the second is written again without it.

        That is so where a task of a run that was killed went on beside the next run.

        Raises:
            ValueError: where a file is none, or predictions of another network or of inputs prepared otherwise.
        """
        done: set[str] = set()
        for path in sorted(self.folder.glob("*.parquet")):
            names = self._names(path)
            kept = [name not in done for name in names]
            if not any(kept):
                path.unlink()
            elif not all(kept):
                rest = pq.read_table(path).filter(pa.array(kept))
                replace_file(path, lambda unfinished, rest=rest: pq.write_table(rest, unfinished))  # type: ignore[misc]
            done.update(names)
        return done

    def _names(self, path: Path) -> list[str]:
        try:
            with pq.ParquetFile(path) as file:
                made_by = (file.schema_arrow.metadata or {}).get(_MADE_BY)
                names = [] if made_by is None else file.read([ID])[ID].to_pylist()
            made = None if made_by is None else json.loads(made_by)
        except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no readable Parquet file of predictions ({error}); remove it") from error
        if not isinstance(made, dict):
            raise ValueError(f"{path} holds something else than predictions of escort run; name another folder")
        if made != self.made_by:
            differing = ", ".join(
                sorted(key for key in {*made, *self.made_by} if made.get(key) != self.made_by.get(key))
            )
            raise ValueError(f"{path} was made by another {differing}; name another folder, or remove its files")
        return names

    def list_failed(self, failed: Mapping[str, str]) -> None:
        """Lists what could not be read, with the reasons; where there is nothing, there is no list."""
        path = self.folder / FAILED
        if failed:
            replace_file(path, lambda unfinished: _write_csv(unfinished, failed))
        else:
            path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes what killed tasks left unfinished."""
        for unfinished in self.folder.glob(".escort-*"):
            shutil.rmtree(unfinished, ignore_errors=True)


def _write_csv(path: Path, failed: Mapping[str, str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = ((cell(name), cell(reason)) for name, reason in sorted(failed.items()))
        csv.writer(file).writerows([(ID, "reason"), *rows])
