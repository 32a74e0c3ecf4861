"""The options that several commands take, declared once, and the decorator that makes a function a command."""

from __future__ import annotations

import inspect
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from escort.cli.console import JsonOption, Output, numbers
from escort.cli.console import command as reporting
from escort.planner.machine import find_device
from escort.problem import Precision


class PrecisionName(str, Enum):
    """The precisions of a Problem, as Typer wants them."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"


EffortOption = Annotated[
    str,
    typer.Option(
        metavar="fast|best|SECONDS",
        help="Time for compiling GPU kernels for a network: fast compiles none, best takes up to five minutes.",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of random positions, weights and inputs.")]


@dataclass(frozen=True)
class RunOptions:
    """What layers and networks are run on and in, and where the rows go."""

    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "8"
    device: Annotated[str, typer.Option(help="What to measure: cpu, cuda, or cuda:1 and so on.")] = "cpu"
    precision: Annotated[
        PrecisionName, typer.Option(help="What convolutions compute in: fp32 is strict; the others are for GPUs.")
    ] = PrecisionName.FP32
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Result file, benchmarks/results/DEVICE/NAME.json by default.",
        ),
    ] = None
    seed: SeedOption = 0

    @property
    def batches(self) -> tuple[int, ...]:
        return numbers(self.batch, "--batch")

    @property
    def dtype(self) -> Precision:
        """As a Problem and rows have it."""
        return self.precision.value

    def find_device(self) -> str:
        """The device with its number. Raises ValueError where it is not here or does not know the precision."""
        device = str(find_device(self.device))
        if device == "cpu" and self.precision is not PrecisionName.FP32:
            raise ValueError(
                f"--precision {self.precision.value} is for GPUs, the CPU computes in fp32; add --device cuda"
            )
        return device


def effort_of(text: str) -> str | float:
    """ "fast", "best", or a number of seconds. Raises ValueError for anything else."""
    if text in ("fast", "best"):
        return text
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0.0:
        raise ValueError(f"--effort takes fast, best or a number of seconds, got {text!r}")
    return seconds


def command_line() -> str:
    """This process's, for results. Files by name: where they lie on this machine is nobody's business."""
    words = [",".join(Path(name).name for name in word.split(",")) if "/" in word else word for word in sys.argv[1:]]
    return f"python -m benchmarks {shlex.join(words)}"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as a command of Typer, with --json and with errors as one message.

    A parameter whose type is a dataclass stands for the options that are its fields. The parameter of type
    :class:`Output` is what the function prints to; on the command line --json takes its place.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    expanded = [option for parameter in parameters.values() for option in _options(parameter)]

    @wraps(function)
    def run(*, as_json: bool, **values: Any) -> None:
        with reporting(as_json) as output:
            function(**{name: _value(parameter, values, output) for name, parameter in parameters.items()})

    run.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in expanded}
    return run


def _options(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """What a parameter of a command becomes on the command line. All are given by keyword, so that any may default."""
    kind, cls = inspect.Parameter.KEYWORD_ONLY, parameter.annotation
    if cls is Output:
        yield inspect.Parameter("as_json", kind, default=False, annotation=JsonOption)
    elif is_dataclass(cls):
        types = get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield inspect.Parameter(field.name, kind, default=default, annotation=types[field.name])
    else:
        yield parameter.replace(kind=kind)


def _value(parameter: inspect.Parameter, values: Mapping[str, Any], output: Output) -> Any:
    """The argument of a command, from what the command line gave."""
    cls = parameter.annotation
    if cls is Output:
        return output
    if is_dataclass(cls):
        return cls(**{field.name: values[field.name] for field in fields(cls)})  # type: ignore[operator]
    return values[parameter.name]
