"""Models by name: a factory to import, with an optional checkpoint, an ONNX file, or a torch.export archive."""

from __future__ import annotations

import importlib
import operator
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import escort
from escort.cli import checkpoints
from escort.cli.console import check_is_file, note
from escort.integrations.onnx import inputs_of
from escort.layers import Images
from escort.prune import listing

ARCHIVE_SUFFIX, ONNX_SUFFIX = ".pt2", ".onnx"
#: What files of models and weights end in that are not converted.
SUFFIXES = (ARCHIVE_SUFFIX, ONNX_SUFFIX, *checkpoints.SUFFIXES)
#: The members of an archive that are read, behind the name of its root: those of today's torch and of older ones.
#: Torch unpickles constants whose names begin with custom_obj or opaque_obj, in any case and with any ending.
_MEMBER = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|version|\.\w+|\.data/\w+|extra/.*|models/[\w.-]+\.json"
    r"|data/(sample_inputs/[\w.-]+\.pt|weights/weight_\d+|constants/tensor_\d+|(weights|constants)/model\.pt"
    r"|(weights|constants)/(?!(?i:custom_obj|opaque_obj))[\w.-]+\.json))"
    r"|version|extra_files/.*|serialized_exported_program\.json"
    r"|serialized_(state_dict|constants|example_inputs)\.(pt|json)"
)


def load(spec: str, checkpoint: Path | None = None) -> nn.Module:
    """The dense model that `spec` names, in eval mode.

    Args:
        spec: ``package.module:factory``, importable from the working directory, where factory takes no argument and
            returns an nn.Module (or is one); the path of an ONNX file (.onnx); or that of a ``torch.export`` archive
            (.pt2). An archive is code: it calls any operator of torch, and torch evaluates the expressions of its
            shapes in Python. Load only those of people you trust. Anything in it but the graph, texts and tensors is
            refused.
        checkpoint: weights for the factory's model, as :func:`checkpoints.load_into` takes them.

    Raises:
        ValueError, TypeError, FileNotFoundError: naming what is wrong and the remedy.
    """
    if Path(spec).suffix in (ARCHIVE_SUFFIX, ONNX_SUFFIX):
        if checkpoint is not None:
            raise ValueError(f"{spec} holds its own weights; leave out the checkpoint {checkpoint}")
        return _from_archive(Path(spec)) if Path(spec).suffix == ARCHIVE_SUFFIX else escort.from_onnx(spec)
    if Path(spec).suffix in checkpoints.SUFFIXES:
        raise ValueError(
            f"{spec} is a checkpoint, weights without a model; name package.module:factory and pass it along"
        )
    model = _from_factory(spec)
    if checkpoint is not None and (left_out := checkpoints.load_into(model, checkpoint)):
        note(f"{checkpoint}: left out {listing(left_out)}, which the model has not")
    return model.eval()


def input_types(model: nn.Module) -> list[torch.dtype]:
    """The types of a model's inputs, as far as the model says: an ONNX file does, and so does :class:`escort.Images`.

    Raises:
        ValueError: for numbers of which no example can be drawn.
    """
    for name, _, dtype in inputs_of(model):
        if not (dtype.is_floating_point or dtype is torch.uint8):
            raise ValueError(f"its input {name[:100]!r} is of {dtype}; convert it in Python, with escort.from_onnx")
    first = next((module for module in model.modules() if not any(module.children())), None)
    declared = [dtype if dtype is torch.uint8 else torch.float32 for _, _, dtype in inputs_of(model)]
    return declared or ([torch.uint8] if isinstance(first, Images) else [])


def declared_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the inputs of a model of an ONNX file, one sample where the file leaves the batch open.

    Raises:
        ValueError: where it leaves other sizes open.
    """
    shapes = []
    for name, shape, _ in inputs_of(model):
        if None in shape[1:]:
            text = ",".join("?" if size is None else str(size) for size in shape)
            raise ValueError(f"the file leaves sizes of {name[:100]!r} open ({text}); give them with --input")
        shapes.append(tuple(size or 1 for size in shape))
    return shapes


def attribute(spec: str) -> Any:
    """What ``package.module:name`` names, imported from the working directory or from what is installed.

    Raises:
        ValueError: if there is no such module or name, or the module fails while it is imported.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"a model is named package.module:factory or is a {ONNX_SUFFIX} or {ARCHIVE_SUFFIX} file, got {spec!r}"
        )
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").replace("/", ".")
        raise ValueError(f"{spec}: a module is named as import takes it; write {dotted}:{name}")
    directory = os.getcwd()
    if directory not in sys.path:  # a console script's path starts at its own directory
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{spec}: there is no module {error.name!r}, neither installed nor in {directory}; check the name or "
                "run from the directory that holds it"
            ) from error
        raise ValueError(f"{spec}: importing {module_name} failed: {error}; install what it needs") from error
    except (Exception, SystemExit) as error:  # a script may end the program
        raise ValueError(f"{spec}: importing {module_name} failed: {_with_type(error)}; mend it") from error
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{spec}: {module_name} has no {name!r}; it has {listing(callables, 6)}") from error


def _from_factory(spec: str) -> nn.Module:
    factory = attribute(spec)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise TypeError(
            f"{spec} is of type {type(factory).__name__}; name a function or class that returns an nn.Module"
        )
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{spec}: calling it without arguments failed: {_with_type(error)}; mend it, or name a function "
            "that needs none"
        ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{spec} returned {type(model).__name__}, not an nn.Module; name a function that returns one")
    return model


def _from_archive(path: Path) -> nn.Module:
    check_is_file(path, "an archive that torch.export.save wrote")
    try:
        _check_members(path)
        with _weights_only():
            exported = torch.export.load(path)
    except Exception as error:
        raise ValueError(
            f"{path} is not a torch.export archive of this torch version: {_with_type(error)}; export the model anew"
        ) from error
    # Tracing drops what the archive asserts about its input: the operators decide which shapes they take.
    network = fx.symbolic_trace(exported.module(check_guards=False))
    for node in network.graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default and node.args[5]:
            raise ValueError(f"{path} was exported in training mode; call model.eval() before torch.export.export")
    return network.eval()


def _check_members(path: Path) -> None:
    """Raises ValueError where an archive holds anything but a graph, tensors and texts.

    Torch turns others into code while it loads: it unpickles objects, and loads compiled libraries.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not _MEMBER.fullmatch(name):
                raise ValueError(f"its member {name} may run code when it is loaded")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Lets torch unpickle tensors and plain containers only.

    Torch tries an archive's sample inputs in this way first. Where that fails, it would run whatever the pickle says.
    """
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _with_type(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
