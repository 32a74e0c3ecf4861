"""Where Ray Data writes predictions to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from ray.data import Datasink
from ray.data.block import BlockAccessor

from escort.integrations.ray.blocks import Blocks
from escort.integrations.ray.workers import BEGUN, ENDED, ID, OUTPUTS, PREDICTING_S, READING_S, REASON, Written


class Sink(Datasink[Written]):  # type: ignore[misc]  # Ray is not there where types are checked
    """Writes a file per task, and sums up what all tasks say, in `written`, on the driver.

    Args:
        least_rows: how many predictions a file has at least, but for the last one.
    """

    def __init__(self, blocks: Blocks, least_rows: int) -> None:
        self._blocks, self._least_rows, self.written = blocks, least_rows, Written()

    @property
    def min_rows_per_write(self) -> int:
        return self._least_rows

    def write(self, blocks: Iterable[Any], ctx: Any) -> Written:
        parts = [BlockAccessor.for_block(block).to_numpy() for block in blocks]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        is_read = columns[REASON] == ""
        if is_read.any():
            self._blocks.write(columns[ID][is_read].tolist(), columns[OUTPUTS][is_read])
        return Written(
            dict(zip(columns[ID][~is_read].tolist(), columns[REASON][~is_read].tolist(), strict=True)),
            columns[READING_S].sum().item(),
            columns[PREDICTING_S].sum().item(),
            columns[BEGUN].min().item(),
            columns[ENDED].max().item(),
        )

    def on_write_complete(self, write_result: Any) -> None:
        self.written = sum(write_result.write_returns, Written())
