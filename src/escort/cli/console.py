"""What all commands share: options of the same name, errors as one message, and where text and JSON go."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from escort import artifact
from escort.cli import models
from escort.network.model import ConvertedModel
from escort.planner.machine import find_device
from escort.problem import TORCH_DTYPE

#: Exit codes.
FAILED, BAD_INPUT = 1, 2

_NAMED_BY_THE_USER = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_PIPE_WIDTH = 160  # columns of a table that no terminal shows

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:factory, or a torch.export archive (.pt2); both are code, so use what you trust.",
    ),
]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Weights for the factory's model: .safetensors, or .pt / .pth with a state dict.")
]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="N,C,H,W", help="Shape of a typical input; repeat it for a model of several."),
]
OriginalOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODULE:FACTORY", help="The dense model, where it could not be traced to a graph."),
]
DeviceOption = Annotated[str, typer.Option(help="What to convert for: cpu, cuda, or cuda:1 and so on.")]


def command_line() -> str:
    """This process's, for results. Files by name: where they lie on this machine is nobody's business."""
    words = [",".join(Path(name).name for name in word.split(",")) if "/" in word else word for word in sys.argv[1:]]
    return f"escort {shlex.join(words)}"


class Dtype(str, Enum):
    """The precisions of a Problem."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"


DtypeOption = Annotated[
    Dtype, typer.Option(help="What convolutions compute in: fp32 is strict; the others are for GPUs.")
]
CompileBudgetOption = Annotated[
    float,
    typer.Option(
        "--compile-budget",
        metavar="SECONDS",
        help="Time that compiling GPU kernels for the weights may take; a layer beyond its share runs without.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, and nothing else, to stdout.")]


class Output:
    """What a command has to say.

    Attributes:
        text: for people: stdout, or stderr where stdout is for JSON.
        result: what --json prints once the command is through.
        failed: set for a negative finding: the result is printed, and the exit code is 1.
    """

    def __init__(self) -> None:
        self.text = Console()
        if not self.text.is_terminal:
            self.text = Console(width=_PIPE_WIDTH)
        self.result: Mapping[str, Any] = {}
        self.failed = False


@contextmanager
def command(as_json: bool) -> Iterator[Output]:
    """Runs a command's body: errors become one message and an exit code, JSON goes to stdout at the end."""
    stdout = sys.stdout
    try:
        # A model's own code may print: under --json that goes to stderr too.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            output = Output()
            yield output
    except (ValueError, TypeError) as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        _fail(told, BAD_INPUT if isinstance(error, _NAMED_BY_THE_USER) else FAILED)
    except (ImportError, MemoryError) as error:
        _fail(str(error) or type(error).__name__, FAILED)
    except RuntimeError as error:
        if isinstance(error, typer.Exit):
            raise
        _fail(str(error), FAILED)
    if as_json:
        # JSON has no word for the infinite error of a candidate whose output held NaN.
        finite = json.loads(json.dumps(output.result), parse_constant=lambda _: None)
        print(json.dumps(finite, indent=2), file=stdout)
    if output.failed:
        raise typer.Exit(FAILED)


def _fail(message: str, code: int) -> NoReturn:
    console = Console(stderr=True, highlight=False)
    console.print("[bold red]error:[/] ", end="")
    console.print(message, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def progress() -> Progress:
    """A progress bar on stderr."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def note(message: str) -> None:
    """A line about what is going on, on stderr."""
    Console(stderr=True, highlight=False).print(message, markup=False, soft_wrap=True)


def load_saved(path: Path, original: str | None, device: str | None = None) -> ConvertedModel:
    """A model that `escort convert` wrote; `original` names the dense one, for networks saved without their graph."""
    check_saved(path)
    return artifact.load(path, None if original is None else models.load(original), device=device)


def check_saved(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; name one that escort convert wrote")


def place(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], device: str, dtype: Dtype
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model and inputs for it, moved to a device and into the type in which a precision is stored."""
    there, stored = find_device(device), TORCH_DTYPE[dtype.value]
    if there.type == "cpu" and dtype is not Dtype.FP32:
        raise ValueError(f"--dtype {dtype.value} is for GPUs, the CPU computes in fp32; add --device cuda")
    return model.to(there, stored), tuple(x.to(there, stored) for x in inputs)


def examples(shapes: list[str] | None) -> tuple[torch.Tensor, ...]:
    """Random inputs of the shapes given with --input, the same each time."""
    if not shapes:
        raise ValueError("give the shape of a typical input, for example --input 1,3,224,224")
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(numbers(shape, "--input"), generator=generator) for shape in shapes)


def numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """ "1,8" as (1, 8)."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < least:
        raise ValueError(f"{option} takes integers from {least} up, separated by commas, got {text!r}")
    return values


def check_writable(path: Path) -> None:
    """Says before the work, not after it, that a result has nowhere to go."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it or write elsewhere")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder {path.parent} is not writable; write elsewhere")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path` and moves it there once complete, so that an interrupted write leaves the old one."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        os.replace(temporary, path)
