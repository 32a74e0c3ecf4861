"""What runs in the processes of a job of images: reading, and predicting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from escort.integrations.ray.predictor import Predictor

#: The columns of predictions: whose one is, and what it is.
ID, OUTPUTS = "input", "outputs"
#: The columns of a batch on its way: where an input lies, what was read, why it could not be read ("" if it could).
PATH, PIXELS, REASON = "path", "x", "reason"
#: Its share of the seconds that reading and predicting its batch took; the clock when that began and ended.
READING_S, PREDICTING_S, BEGUN, ENDED = "reading_s", "predicting_s", "begun", "ended"
Batch = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Reader:
    """Reads the images of a batch. One that cannot be read is zeros, and has a reason.

    Attributes:
        read: an image as the network takes it. Raises ValueError, whose message is the reason.
        shape, dtype: of an image that was read.
        threads: how many read at a time.
    """

    read: Callable[[Path], Tensor]
    shape: tuple[int, ...]
    dtype: str
    threads: int = 1

    def __call__(self, batch: Batch) -> dict[str, NDArray[Any]]:
        begin = time.time()
        pixels = np.zeros((len(batch[PATH]), *self.shape), self.dtype)
        with ThreadPoolExecutor(self.threads) as pool:
            reasons = list(pool.map(self._read_into, pixels, batch[PATH]))
        count = len(pixels)
        seconds = np.full(count, (time.time() - begin) / count)
        return {
            ID: batch[ID],
            PIXELS: pixels,
            REASON: np.array(reasons),
            READING_S: seconds,
            BEGUN: np.full(count, begin),
        }

    def _read_into(self, pixels: NDArray[Any], path: str) -> str:
        try:
            pixels[...] = self.read(Path(path)).numpy()
        except ValueError as error:
            return str(error)
        return ""


class Worker:
    """Predicts, and reads before where it has a reader. Takes what a Predictor takes."""

    def __init__(self, reader: Reader | None = None, **predictor: Any) -> None:
        self._reader, self._predictor = reader, Predictor(columns=[PIXELS], output=OUTPUTS, **predictor)

    def __call__(self, batch: Batch) -> dict[str, NDArray[Any]]:
        if self._reader is not None:
            batch = self._reader(batch)
        begin = time.time()
        result = self._predictor(batch)
        end, count = time.time(), len(batch[ID])
        return {**result, PREDICTING_S: np.full(count, (end - begin) / count), ENDED: np.full(count, end)}


@dataclass(frozen=True)
class Written:
    """What tasks wrote.

    Attributes:
        failed: the inputs that could not be read, by their names, with the reasons.
        reading_s, predicting_s: how long the workers did that, all together.
        begun, ended: the clock at the first and behind the last of it.
    """

    failed: dict[str, str] = field(default_factory=dict)
    reading_s: float = 0.0
    predicting_s: float = 0.0
    begun: float = math.inf
    ended: float = -math.inf

    def __add__(self, other: Written) -> Written:
        return Written(
            self.failed | other.failed,
            self.reading_s + other.reading_s,
            self.predicting_s + other.predicting_s,
            min(self.begun, other.begun),
            max(self.ended, other.ended),
        )
