"""escort run: images through a saved model."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.table import Table

from escort.artifact.files import replace_file
from escort.cli.console import Output, note, progress
from escort.cli.images import ImageOptions, Inputs
from escort.cli.many import ManyOptions
from escort.cli.options import SavedOptions, check_writable, command
from escort.layers import Images
from escort.network.model import ConvertedModel
from escort.report import Console, cell

_SHOWN = 10  # predictions on the terminal, and images that could not be read
_OUTPUT_SUFFIXES = (".npz", ".csv")


@command
def main(
    saved: SavedOptions,
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A folder of images, an image, or an .npy / .npz batch.")
    ],
    images: ImageOptions,
    many: ManyOptions,
    output: Output,
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Predictions: .npz (names, top1, outputs), .csv (input, top1, score), or a folder of --engine ray.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs per forward.")] = 8,
) -> None:
    """Run images or a batch through a saved model; write predictions and throughput.

    Images are of any format that Pillow reads by itself (which leaves out EPS, WMF, MPEG, BUFR, GRIB and HDF5), with up
    to 8 bits per channel; of an animation it is the first frame. They are resized, scaled to 0..1 and, by default,
    normalised by ImageNet's mean and deviation. One that cannot be read is set aside, with the reason; the exit code is
    1 then. The first forward is a warm-up and not counted.
    """
    by_ray = many.check(output_path)
    if output_path is not None and not by_ray:
        if output_path.suffix not in _OUTPUT_SUFFIXES:
            raise ValueError(f"--output {output_path}: predictions are {' or '.join(_OUTPUT_SUFFIXES)}; name it so")
        check_writable(output_path, source, saved.saved)
    if not source.is_dir() and not source.is_file():
        raise FileNotFoundError(f"{source}: there is no such folder or file; name images, or an .npy or .npz batch")
    if by_ray:
        many.set_threads()
    model = saved.load()
    layer = next((module for module in model.network.modules() if isinstance(module, Images)), None)
    inputs = images.inputs(source, _image_shape(model, saved.saved, layer), layer)
    if by_ray:
        assert output_path is not None
        many.run(saved, model, inputs, output_path, batch, output)
        return
    if inputs.preparation is not None:
        output.text.print(f"images are {inputs.preparation}")
    classes_only = output_path is not None and output_path.suffix == ".csv"
    predictions = _predict(model, inputs, batch, classes_only=classes_only)
    if output_path is not None:
        replace_file(output_path, predictions.write)
    output.result = {
        "inputs": len(predictions.names),
        "batch": batch,
        "device": model.plan.device,
        "threads": torch.get_num_threads(),
        "model_seconds": predictions.model_seconds,
        "total_seconds": predictions.total_seconds,
        "inputs_per_second": predictions.per_second,
        "output": None if output_path is None else str(output_path),
        "preparation": None if inputs.preparation is None else str(inputs.preparation),
        "failed": predictions.failed,
        "predictions": [dict(zip(("input", "top1", "score"), row, strict=True)) for row in predictions.rows()],
    }
    _print(predictions, batch, output.text)
    if output_path is not None:
        output.text.print(f"wrote {output_path}")
    output.failed = bool(predictions.failed)


@dataclass(frozen=True, eq=False)
class _Predictions:
    """What a model said, and how long that took; top1 is None where the outputs are not (N, classes).

    Attributes:
        failed: the inputs that could not be read, by name with the reason.
    """

    names: list[str]
    outputs: NDArray[np.float32]
    top1: NDArray[np.int64] | None
    model_seconds: float
    total_seconds: float
    failed: dict[str, str]

    @property
    def per_second(self) -> float:
        """Inputs per second in the model."""
        return len(self.names) / self.model_seconds

    def rows(self) -> list[tuple[str, int, float]]:
        """(input, most likely class, its output) each; empty where outputs are not classes."""
        if self.top1 is None:
            return []
        scores = self.outputs[np.arange(len(self.top1)), self.top1]
        return list(zip(self.names, self.top1.tolist(), scores.tolist(), strict=True))

    def write(self, path: Path) -> None:
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                rows = ((cell(name), top1, score) for name, top1, score in self.rows())
                csv.writer(file).writerows([("input", "top1", "score"), *rows])
            return
        arrays: dict[str, Any] = {"names": np.array(self.names), "outputs": self.outputs}
        if self.top1 is not None:
            arrays["top1"] = self.top1
        np.savez_compressed(path, **arrays)


def _print(predictions: _Predictions, batch: int, console: Console) -> None:
    rows = predictions.rows()
    if rows:
        table = Table("input", "top1", "score")
        for name, top1, score in rows[:_SHOWN]:
            table.add_row(name, str(top1), f"{score:.3g}")
        console.print(table)
        if len(rows) > _SHOWN:
            console.print(f"... and {len(rows) - _SHOWN} more")
    count = len(predictions.names)
    with_reading = count / predictions.total_seconds
    console.print(
        f"{count} input{'' if count == 1 else 's'} at batch {batch}: {predictions.per_second:.1f} per second in the "
        f"model, {with_reading:.1f} with reading them"
    )
    for reason in list(predictions.failed.values())[:_SHOWN]:
        note(f"set aside: {reason}")
    if failed := len(predictions.failed):
        more = f", the first {_SHOWN} above; --json lists all" if failed > _SHOWN else ""
        note(f"{failed} of {failed + len(predictions.names)} images could not be read{more}")


def _predict(model: ConvertedModel, inputs: Inputs, batch: int, *, classes_only: bool) -> _Predictions:
    """Runs all batches.

    Raises:
        ValueError: where nothing can be read, or at the first batch whose outputs are no tensor, or no classes if
            needed.
    """
    names, failed = list[str](), dict[str, str]()
    collected: list[NDArray[np.float32]] = []
    model_seconds = 0.0
    device, dtype = torch.device(model.plan.device), model.plan.input_types[0]
    begin = time.perf_counter()
    with progress() as bar, torch.inference_mode():
        task = bar.add_task("running", total=len(inputs.names))
        for of_batch, x in inputs.batches(batch, failed):
            names += of_batch
            x = x.to(device, dtype)
            if not collected:  # the first forward lays out tables and compiles kernels
                begin += _forward(model, x)[1]
            y, seconds = _forward(model, x)
            model_seconds += seconds
            if classes_only and y.ndim != 2:
                raise ValueError(
                    f"the model returns shape {tuple(y.shape)}, no classes; write an .npz instead of a .csv"
                )
            if y.is_floating_point():  # numpy has no bfloat16
                y = y.to(torch.promote_types(y.dtype, torch.float32))
            collected.append(y.cpu().numpy())
            bar.advance(task, len(x))
    if not collected:
        more = f"; nor can the {len(failed) - 1} others" if len(failed) > 1 else ""
        raise ValueError(next(iter(failed.values())) + more)
    outputs = np.concatenate(collected)
    top1 = outputs.argmax(axis=1) if outputs.ndim == 2 else None
    return _Predictions(names, outputs, top1, model_seconds, time.perf_counter() - begin, failed)


def _forward(model: ConvertedModel, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What a model makes of a batch, and the seconds that it took."""
    start = time.perf_counter()
    y = model(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    if not isinstance(y, torch.Tensor):
        raise ValueError(
            f"the model returns a {type(y).__name__}, and run takes models of one tensor; call it in Python"
        )
    return y, time.perf_counter() - start


def _image_shape(model: ConvertedModel, saved: Path, layer: Images | None) -> tuple[int, int, int]:
    """The (C, H, W) that the model was planned for, whose images `layer` normalises."""
    shapes = model.plan.input_shapes
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise ValueError(f"{saved} takes inputs of shapes {shapes}; run feeds models of one image; call it in Python")
    _, *sizes = shapes[0]
    channels = sizes.pop(2 if layer is not None and layer.channels_last else 0)
    return channels, sizes[0], sizes[1]
