"""Two models on data of yours: how far the outputs of one are from those of the other, sample by sample."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, IterableDataset

from escort import report
from escort.arguments import is_whole
from escort.network.example import Example
from escort.network.model import ConvertedModel
from escort.network.values import output_error, tensors_of
from escort.report import Table

_REMEDY = (
    "say what the models take of a batch, such as inputs=lambda batch: batch['image'], or a tuple of all arguments"
)
_COLUMNS = ("Output", "Shape", "Top-1 agreement", "Mean error", "Largest error", "Worst sample")


@dataclass(frozen=True)
class OutputComparison:
    """How far one output is from the model's, over all samples.

    Attributes:
        shape: of the output in the first batch.
        top1_agreement: the share of samples, or of their pixels, whose largest class is the same. Classes are the
            second axis; None where the output has no such axis of more than one, or no floating-point numbers. One
            whose classes hold NaN in the model's output has no largest, and is not counted.
        mean_error, largest_error: of the samples' relative errors, ``||out - ref|| / ||ref||``. One is infinite where
            the two have not the same NaNs and infinities.
        worst_sample: which sample has the largest error, counted through all batches from 0.
    """

    shape: tuple[int, ...]
    top1_agreement: float | None
    mean_error: float
    largest_error: float
    worst_sample: int


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Printed, it is a table.

    Attributes:
        samples: how many samples were compared.
        outputs: each of the model's output tensors, in order.
    """

    samples: int
    outputs: tuple[OutputComparison, ...]

    def __str__(self) -> str:
        return report.text(self._table())

    def _repr_html_(self) -> str:
        """For notebooks."""
        return report.html(self._table())

    def _table(self) -> Table:
        rows = [
            (
                str(number),
                "x".join(map(str, each.shape)),
                "-" if each.top1_agreement is None else f"{100 * each.top1_agreement:.2f} %",
                f"{each.mean_error:.1e}",
                f"{each.largest_error:.1e}",
                str(each.worst_sample),
            )
            for number, each in enumerate(self.outputs)
        ]
        caption = f"Relative errors of {self.samples:,} samples, against the outputs of the model."
        return Table("Comparison", _COLUMNS, tuple(rows), caption)


def compare(
    model: nn.Module,
    fast: nn.Module,
    loader: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    batches: int | None = None,
) -> Comparison:
    """How far the outputs of a converted model are from those of the model, on real data.

    Each of the two may be on a device and in a precision of its own: floating-point inputs are given to it as it takes
    them. What the model's convolutions are multiplied in on a GPU is what torch's settings say.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        >>> compare(model, model, [torch.randn(4, 3, 16, 16)]).outputs[0].top1_agreement
        1.0

    Args:
        model: in eval mode; its outputs are what the others are compared with.
        fast: what :func:`escort.convert` or :func:`escort.load` returned, or another model of like outputs.
        loader: batches, such as a DataLoader has them.
        inputs: what the models are called with, given a batch: a tensor, or a tuple of all arguments. By default the
            first item of a list or tuple, as loaders make them of images and labels, else the batch itself.
        batches: how many batches to take; all by default.

    Raises:
        TypeError: where one of the two is no model, the loader holds no batches, `batches` is no whole number, or there
            is no tensor in what the models are called with.
        ValueError: where a model is in training mode, there is no batch, a model does not take one, the models do not
            return as many tensors of the same shapes, or the model returns no finite number.
    """
    for name, each in (("model", model), ("fast", fast)):
        if not isinstance(each, nn.Module):
            raise TypeError(f"{name} is a model, got {type(each).__name__}; a file's comes from escort.load")
        if each.training:
            raise ValueError(f"{name} is in training mode; call {name}.eval() first")
    _check_loader(loader, batches)
    sums: list[_Sums] = []
    samples = 0
    with torch.inference_mode():
        for number, batch in enumerate(itertools.islice(loader, batches)):
            example = _example(batch, inputs, number)
            expected = _outputs("model", model, example, number)
            outputs = _outputs("fast", fast, example, number)
            sums = sums or [_Sums(tuple(x.shape)) for x in expected]
            if not len(outputs) == len(expected) == len(sums):
                raise ValueError(
                    f"batch {number}: the model returns {len(expected)} tensors, fast {len(outputs)}, and there were "
                    f"{len(sums)} before; compare models that return the same"
                )
            count = len(example.tensors[0]) if example.tensors[0].ndim else 1
            for output, (so_far, out, ref) in enumerate(zip(sums, outputs, expected, strict=True)):
                if out.shape != ref.shape:
                    raise ValueError(
                        f"batch {number}: output {output} of the model has shape {tuple(ref.shape)}, that of fast "
                        f"{tuple(out.shape)}; compare models that return the same"
                    )
                so_far.add(out.to(ref.device), ref, count, samples)
            samples += count
    if not samples:
        raise ValueError("the loader has no batch; pass at least one")
    if not any(each.is_judged for each in sums):
        raise ValueError(
            f"of {samples:,} samples the model makes no finite number, so that nothing can be judged by it; pass "
            "batches as the model gets them, or a model whose type holds its numbers"
        )
    return Comparison(samples, tuple(each.comparison() for each in sums))


def _check_loader(loader: Any, batches: int | None) -> None:
    """Raises TypeError or ValueError where there are no batches to take."""
    if isinstance(loader, Tensor):
        raise TypeError("loader has batches, got a tensor; pass a list with it in it, [x]")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(f"loader has batches, got the samples of a {type(loader).__name__}; pass a DataLoader of it")
    if not isinstance(loader, Iterable) or isinstance(loader, Mapping | str):
        raise TypeError(f"loader has batches, got {type(loader).__name__}; pass a DataLoader, or a list of tensors")
    if batches is not None and not is_whole(batches):
        raise TypeError(f"batches is how many to take, a whole number, got {batches!r}; leave it out for all")
    if batches is not None and batches < 1:
        raise ValueError(f"batches is how many to take, got {batches}; leave it out for all")


def _example(batch: Any, inputs: Callable[[Any], Any] | None, number: int) -> Example:
    """What the models are called with. Raises TypeError where there is no tensor in it."""
    if inputs is not None:
        given, source = inputs(batch), "what inputs(batch) returns"
    elif isinstance(batch, list | tuple) and batch:
        given, source = batch[0], f"the first item of a {type(batch).__name__}"
    else:
        given, source = batch, "the batch itself"
    try:
        return Example.of(given)
    except TypeError as error:
        raise TypeError(
            f"batch {number}: the models are called with {source}, and there is no tensor in {reprlib.repr(given)}; "
            f"{_REMEDY}"
        ) from error


def _outputs(name: str, model: nn.Module, example: Example, number: int) -> list[Tensor]:
    """The tensors that a model makes of an example. Raises ValueError where it does not take it."""
    try:
        return tensors_of(_placed(example, model).run(model))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's forward may raise anything
        raise ValueError(f"batch {number}: {name} does not take {example}: {error}; {_REMEDY}") from error


def _placed(example: Example, model: nn.Module) -> Example:
    """The example on the device and in the floating-point type that a model takes."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else example.device
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)
    if isinstance(model, ConvertedModel):  # a layer's parameters need not be of the type of what it takes
        dtype = next((each for each in model.plan.input_types if each.is_floating_point), None)

    def place(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else None, copy=True)  # a model may write to it

    args, kwargs = tree_map_only(Tensor, place, (example.args, dict(example.kwargs)))
    return Example(args, kwargs)


class _Sums:
    """What is summed over the samples of an output."""

    is_judged = False  # whether the model made a finite number, or had none to make

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._errors, self._largest, self._worst, self._samples = 0.0, -1.0, 0, 0
        self._agreeing, self._classified = 0, 0

    def add(self, out: Tensor, ref: Tensor, count: int, first: int) -> None:
        """Takes in an output of a batch.

        Args:
            count: the batch's samples. Where the output has no axis of so many, it counts as one sample.
            first: the number of the first of them.
        """
        self.is_judged = self.is_judged or not ref.numel() or bool(torch.isfinite(ref).any())
        by_sample = ref.ndim > 0 and len(ref) == count
        pairs = zip(out, ref, strict=True) if by_sample else [(out, ref)]
        for number, (one, other) in enumerate(pairs, first):
            error = output_error(one, other)
            self._errors += error
            self._samples += 1
            if error > self._largest:
                self._largest, self._worst = error, number
        if by_sample and ref.is_floating_point() and ref.ndim > 1 and ref.shape[1] > 1:
            has_largest = ~ref.isnan().any(1)
            self._agreeing += int(((out.argmax(1) == ref.argmax(1)) & has_largest).sum())
            self._classified += int(has_largest.sum())

    def comparison(self) -> OutputComparison:
        agreement = self._agreeing / self._classified if self._classified else None
        mean = self._errors / self._samples if self._samples else math.nan
        return OutputComparison(self._shape, agreement, mean, max(self._largest, 0.0), self._worst)
