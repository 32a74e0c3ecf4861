"""What `escort run --engine ray` does: the images of a folder by many workers, into a folder of Parquet files."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from escort.cli.console import Output
from escort.cli.images import Inputs
from escort.cli.options import SavedOptions
from escort.network.model import ConvertedModel
from escort.report import Console

if TYPE_CHECKING:
    from escort.integrations.ray.job import Report

_ROWS = 1024
_LITTLE = 0.5  # of the workers' time


class Engine(StrEnum):
    """What runs the inputs, as Typer wants it."""

    HERE = "here"
    RAY = "ray"


@dataclass(frozen=True)
class ManyOptions:
    """How many processes work on the images, and how."""

    engine: Annotated[
        Engine,
        typer.Option(
            help="here is this process. ray has workers of Ray Data, here or on the cluster that RAY_ADDRESS names, "
            "write a folder of Parquet files; run again, it does what is left."
        ),
    ] = Engine.HERE
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers of --engine ray; by default one per GPU, or as cores allow.")
    ] = None
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each worker of --engine ray on a CPU; by default 1.")
    ] = None
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Predictions in a file of --engine ray at least, which a crash may lose; by default 1024."
        ),
    ] = None

    def check(self, output: Path | None) -> bool:
        """Whether Ray runs it. Raises ValueError where other options do not go with that, ImportError without Ray."""
        given = {"--workers": self.workers, "--threads": self.threads, "--rows": self.rows}
        if self.engine is Engine.HERE:
            if names := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{', '.join(names)} is for --engine ray; leave it out, or add that")
            return False
        if output is None or output.suffix in (".npz", ".csv", ".parquet"):
            raise ValueError("--engine ray writes a folder of Parquet files; name one, such as --output predictions/")
        if output.exists() and not output.is_dir():
            raise NotADirectoryError(f"{output} is a file; name a folder for the predictions")
        if find_spec("ray") is None or find_spec("pyarrow") is None:
            raise ImportError("--engine ray takes Ray Data: pip install 'escort-sparse[ray]'")
        return True

    def set_threads(self) -> None:
        """Gives this process the threads of a worker, so that what is measured in it holds for them."""
        torch.set_num_threads(self.threads or 1)

    def run(
        self, saved: SavedOptions, model: ConvertedModel, inputs: Inputs, folder: Path, batch: int, output: Output
    ) -> None:
        """Predicts the images that are not done yet, and says how that went."""
        from escort.integrations.ray.blocks import FAILED, Blocks
        from escort.integrations.ray.job import Job, Workers
        from escort.integrations.ray.workers import Reader

        if inputs.preparation is None or inputs.folder is None:
            raise ValueError("--engine ray takes images; leave it out for an array, which one process reads anyway")
        on_gpus = model.plan.device != "cpu"
        if on_gpus and self.threads is not None:
            raise ValueError("--threads are of workers on a CPU; leave it out, or add --device cpu")
        preparation, threads = inputs.preparation, self.threads or 1
        output.text.print(f"images are {preparation}")
        blank = preparation.blank()
        reader = Reader(preparation.read, tuple(blank.shape), str(blank.numpy().dtype), threads)
        predictor: dict[str, Any] = {
            "path": saved.saved.resolve(),
            "model": saved.original_model(),
            "device": None if saved.device is None else torch.device(saved.device).type,
            "kernels": saved.kernels,
            "threads": None if on_gpus else threads,
        }
        images = dict(zip(inputs.names, (path.absolute() for path in inputs.paths), strict=True))
        made_by = {
            "network": _digest(saved.saved.read_bytes()),
            "preparation": repr(preparation),
            "folder of images": _digest(os.fsencode(inputs.folder.resolve())),  # which has names of its own
        }
        blocks = Blocks(folder, made_by)
        job = Job(images, reader, predictor, blocks, batch, self.rows or _ROWS)
        report = job.run(Workers(self.workers, on_gpus, threads))
        output.result = {
            "inputs": len(images),
            "done_before": report.done_before,
            "done": report.done,
            "failed": report.written.failed,
            "batch": batch,
            "device": model.plan.device,
            "workers": report.workers,
            "threads": threads,
            "total_seconds": report.seconds,
            "working_seconds": report.working_s,
            "reading_seconds": report.written.reading_s,
            "predicting_seconds": report.written.predicting_s,
            "inputs_per_second": report.per_second,
            "output": str(folder),
        }
        output.failed = bool(report.written.failed)
        _print(report, folder / FAILED, output.text)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _print(report: Report, listed: Path, console: Console) -> None:
    failed = report.written.failed
    console.print(
        f"{report.done} images done, {report.done_before} were before, {len(failed)} could not be read"
        + (f": see {listed}" if failed else "")
    )
    if report.workers:
        console.print(
            f"{report.per_second:.1f} per second by {report.workers} workers, which predicted "
            f"{report.predicting_share:.0%} of the time"
            + ("; reading is the limit" if report.predicting_share < _LITTLE else "")
        )
    console.print(f"wrote {listed.parent}")
