"""The options that several commands take, declared once, and the decorator that makes a function a command."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import wraps
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from torch import nn

import escort
from escort import artifact, report
from escort.cli import models
from escort.cli.console import Output, check_is_file, note_if_busy, reporting
from escort.cli.engines import ENGINES, placed_on
from escort.layers import Images
from escort.network.check import Effort
from escort.network.model import ConvertedModel
from escort.network.plan import NetworkPlan
from escort.planner.machine import find_device
from escort.problem import TORCH_DTYPE
from escort.runtime import Favor

_MOST = (1 << 31) - 1  # of a size, or a number of samples
#: What a saved model is, for messages.
SAVED = "one that escort convert wrote"


class PrecisionName(StrEnum):
    """The precisions of a Problem, as Typer wants them."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"


class FavorName(StrEnum):
    """What threads of a CPU may do for, as Typer wants it."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Weights for the factory's model: .safetensors, or a state dict of torch, Lightning and the like (.pt, "
        ".pth, .ckpt, .bin), of which nothing but tensors and plain values is loaded.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="What to convert for: cpu, cuda, or cuda:1 and so on.")]
PrecisionOption = Annotated[
    PrecisionName, typer.Option(help="What convolutions compute in: fp32 is strict; the others are for GPUs.")
]
EffortOption = Annotated[
    str,
    typer.Option(
        metavar="fast|best|SECONDS",
        help="Time for compiling GPU kernels for the weights: fast compiles none, best takes up to five minutes.",
    ),
]
FavorOption = Annotated[
    FavorName | None,
    typer.Option(
        help="What threads of a CPU do for: latency has all of them share each layer, throughput has each take samples "
        "of its own where a batch has enough for all. By default what is faster on the input.",
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What runs each layer: the plan of an earlier conversion of this model, in MODEL.escort or in JSON, as "
        "escort plan --json writes it. Nothing is timed then, and every process computes alike.",
    ),
]
VerboseOption = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, help="Say on stderr what is done and how long it takes; -vv for each layer."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, and nothing else, to stdout.")]


@dataclass(frozen=True)
class SourceOptions:
    """Where a model comes from."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="package.module:factory, which is imported and called; an ONNX file (.onnx); or a torch.export "
            "archive (.pt2), which may call any operator of torch and have Python evaluated: use those of people you "
            "trust.",
        ),
    ]
    checkpoint: CheckpointOption = None

    def load(self) -> nn.Module:
        """The dense model in eval mode, on the CPU."""
        return models.load(self.model, self.checkpoint)


@dataclass(frozen=True)
class SavedOptions:
    """A converted model in a file."""

    saved: Annotated[Path, typer.Argument(metavar="MODEL.escort", help="What escort convert wrote.")]
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, or cuda:1; by default what the model was converted for.")
    ] = None
    original: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODULE:FACTORY", help="The dense model, where it could not be traced to a graph."
        ),
    ] = None
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Use the compiled kernels in MODEL.escort.kernels. They are code that runs on the GPU: use those of "
            "people you trust.",
        ),
    ] = False
    verbose: VerboseOption = 0

    def load(self) -> ConvertedModel:
        """The model, ready to run."""
        check_is_file(self.saved, SAVED)
        return artifact.load(self.saved, self.original_model(), device=self.device, kernels=self.kernels)

    def original_model(self) -> nn.Module | None:
        """The dense model, where one was named."""
        return None if self.original is None else models.load(self.original)


@dataclass(frozen=True)
class ModelOptions(SourceOptions):
    """A model to convert: where it comes from, a typical input, and what :func:`escort.convert` takes besides."""

    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="N,C,H,W",
            help="Shape of a typical input; repeat it for a model of several. By default what an ONNX file says.",
        ),
    ] = None
    device: DeviceOption = "cpu"
    precision: PrecisionOption = PrecisionName.FP32
    effort: EffortOption = "fast"
    favor: FavorOption = None
    verbose: VerboseOption = 0

    @property
    def favored(self) -> Favor | None:
        """The choice of `favor` as :func:`escort.convert` takes it."""
        return None if self.favor is None else self.favor.value

    @property
    def are_default(self) -> bool:
        """Whether none was given that says what to convert but the model."""
        return replace(self, shapes=self.shapes or None, verbose=0) == type(self)(self.model)

    def load_with_inputs(self, *, is_timed: bool = True) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The model and random inputs for it, the same each time, on the device and as the precision is stored."""
        shapes = [numbers(shape, "--input") for shape in self.shapes or []]
        if not shapes and Path(self.model).suffix != models.ONNX_SUFFIX:
            raise ValueError("give the shape of a typical input, for example --input 1,3,224,224")
        model = self.load()
        inputs = _drawn(shapes or models.declared_shapes(model), models.input_types(model))
        placed = place(model, inputs, self.device, self.precision)
        if is_timed:
            note_if_busy(placed[1][0].device.type)
        return placed


@dataclass(frozen=True)
class ConvertOptions(ModelOptions):
    """A model to convert, and a plan that it may follow."""

    plan: PlanOption = None

    def convert(self, *, remeasure: bool = False, images: Images | None = None) -> ConvertedModel:
        """The converted model; a progress bar shows on stderr.

        Args:
            images: what is put in front of the model, so that it takes bytes.
        """
        effort = effort_of(self.effort)  # before anything that takes long
        model, inputs = self.load_with_inputs(is_timed=self.plan is None)
        if images is not None:
            model, inputs = _taking_bytes(model, inputs, images)
        return escort.convert(
            model,
            inputs,
            precision=self.precision.value,
            effort=effort,
            favor=self.favored,
            progress=True,
            remeasure=remeasure,
            plan=None if self.plan is None else _read_plan(self.plan),
        )


@dataclass(frozen=True)
class EngineOptions:
    """How engines are timed on the CPU, each alone, and the user's own files for some of them."""

    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of each engine on the CPU, which gets as many cores. By default torch's number, on all cores."
        ),
    ] = None
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each engine on the CPU.")] = 5
    onnx: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same model for ONNX Runtime and OpenVINO, not exported.")
    ] = None
    tflite: Annotated[Path | None, typer.Option(metavar="FILE", help="The same model for LiteRT.")] = None

    @property
    def files(self) -> dict[str, Path]:
        """The user's files by ending. Raises FileNotFoundError where one is none."""
        given = {name: path for name, path in (("onnx", self.onnx), ("tflite", self.tflite)) if path is not None}
        for name, path in given.items():
            check_is_file(path, f"the model in an .{name} file")
        return given

    def default(self, device: str) -> list[str]:
        """All engines that a device and the files allow."""
        on_cpu = [name for name in ENGINES if name != "litert" or self.tflite is not None]
        return on_cpu if device == "cpu" else ["eager", "compile"]

    def placed(self, device: str) -> AbstractContextManager[int]:
        """On the cores for those threads. Raises ValueError where they are for a GPU."""
        if device != "cpu" and (self.threads is not None or self.files):
            raise ValueError("--threads, --onnx and --tflite are for the CPU; leave them out, or give --device cpu")
        return placed_on(self.threads)


def _drawn(shapes: Sequence[tuple[int, ...]], types: Sequence[torch.dtype]) -> tuple[torch.Tensor, ...]:
    """Random inputs, the same each time: of float32 where the model says nothing of their types."""
    if any(math.prod(shape) > _MOST for shape in shapes):
        raise ValueError(f"no network takes inputs of {shapes[:4]}; give smaller ones")
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randint(256, shape, dtype=dtype, generator=generator)
        if dtype is torch.uint8
        else torch.randn(shape, generator=generator)
        for shape, dtype in zip(shapes, chain(types, repeat(torch.float32)), strict=False)
    )


def _read_plan(path: Path) -> NetworkPlan:
    """The plan in a saved model, or in JSON. Raises ValueError where there is none."""
    check_is_file(path, f"{SAVED}, or the JSON of escort plan")
    if path.suffix != ".json":
        return artifact.load_plan(path)
    try:
        return NetworkPlan.from_json(json.loads(path.read_text()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; write it by escort plan --json") from error


def _taking_bytes(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], images: Images
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model with a layer of images in front of it, and the input that it takes then."""
    x, *others = inputs
    if x.dtype is torch.uint8:
        raise ValueError("the model takes bytes as it is; leave out --mean and --std")
    if others or x.ndim != 4 or x.shape[1] != len(images.mean):
        given = ", ".join(str(tuple(each.shape)) for each in inputs)
        raise ValueError(
            f"--mean and --std have {len(images.mean)} values, for a model of one image of as many channels; its input "
            f"is {given}"
        )
    (pixels,) = _drawn([x.movedim(1, 3).shape], [torch.uint8])
    return nn.Sequential(images.to(x.device, x.dtype), model).eval(), (pixels.to(x.device),)


def effort_of(text: str) -> Effort:
    """ "fast", "best", or a number of seconds. Raises ValueError for anything else."""
    match text:
        case "fast" | "best":
            return text
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0.0:
        raise ValueError(f"--effort takes fast, best or a number of seconds, got {text!r}")
    return seconds


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as a command of Typer, with --json and with errors as one message.

    A parameter whose type is a dataclass stands for the options that are its fields. The parameter of type
    :class:`Output` is what the function prints to; on the command line --json takes its place.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    expanded = [option for parameter in parameters.values() for option in _options(parameter)]
    expanded.sort(key=lambda option: option.annotation is JsonOption)  # --json comes last in the help

    @wraps(function)
    def run(*, as_json: bool, **values: Any) -> None:
        with reporting(as_json, values.get("verbose", 0)) as output:
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


def device_for(precision: PrecisionName, name: str) -> torch.device:
    """The device of that name. Raises ValueError where it is not here or does not compute in the precision."""
    device = find_device(name)
    if device.type == "cpu" and precision is not PrecisionName.FP32:
        raise ValueError(f"--precision {precision.value} is for GPUs, the CPU computes in fp32; add --device cuda")
    return device


def place(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], device: str, precision: PrecisionName
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model and inputs for it, moved to a device and into the type in which a precision is stored."""
    target, storage = device_for(precision, device), TORCH_DTYPE[precision.value]
    return model.to(target, storage), tuple(x.to(target, storage if x.is_floating_point() else None) for x in inputs)


def numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """ "1,8" as (1, 8)."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < least or max(values) > _MOST:
        raise ValueError(f"{option} takes integers from {least} to {_MOST}, separated by commas, got {text!r:.100}")
    return values


def check_writable(path: Path, *sources: str | Path | None) -> None:
    """Says before the work, not after it, that a result has nowhere to go, or would replace one of its sources."""
    if path.exists() and any(source and os.path.exists(source) and path.samefile(source) for source in sources):
        raise ValueError(f"{path} is what is read, and would be overwritten; name another file to write")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not (folder := (path.resolve() if path.is_symlink() else path).parent).is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}; create it or write elsewhere")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path}: the folder {folder} is not writable; write elsewhere")


def check_page(path: Path) -> None:
    """Says before the work that a page cannot be written: for its name, its folder, or for want of matplotlib."""
    report.check_page_name(path)
    check_writable(path)
    report.require_matplotlib()
