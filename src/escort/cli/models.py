"""Models by name: a factory to import, with an optional checkpoint, or a torch.export archive."""

from __future__ import annotations

import importlib
import operator
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from escort.prune import listing

ARCHIVE_SUFFIX = ".pt2"
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth")
#: Names in an archive begin so where torch unpickles what they hold, whatever it is.
_PICKLED_PARTS = ("custom_obj_", "opaque_obj_")


def load(spec: str, checkpoint: Path | None = None) -> nn.Module:
    """The dense model that `spec` names, in eval mode.

    Args:
        spec: ``package.module:factory``, importable from the working directory, where factory takes no argument and
            returns an nn.Module (or is one); or the path of a ``torch.export`` archive (.pt2). An archive names the
            functions of torch that it calls, so it is code: load only those of people you trust. Anything pickled in
            it but tensors is refused.
        checkpoint: weights for the factory's model: .safetensors, or .pt / .pth holding a state dict or a dict with
            one under "state_dict".

    Raises:
        ValueError, TypeError, FileNotFoundError: naming what is wrong and the remedy.
    """
    if Path(spec).suffix == ARCHIVE_SUFFIX:
        if checkpoint is not None:
            raise ValueError(f"{spec} holds its own weights; leave out the checkpoint {checkpoint}")
        return _from_archive(Path(spec))
    if Path(spec).suffix in CHECKPOINT_SUFFIXES:
        raise ValueError(
            f"{spec} is a checkpoint, weights without a model; name package.module:factory and pass it along"
        )
    model = _from_factory(spec)
    if checkpoint is not None:
        _load_checkpoint(model, checkpoint)
    return model.eval()


def attribute(spec: str) -> Any:
    """What ``package.module:name`` names, imported from the working directory or from what is installed.

    Raises:
        ValueError: if there is no such module or name, or the module fails while it is imported.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"a model is named package.module:factory or is a {ARCHIVE_SUFFIX} file, got {spec!r}")
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
    except Exception as error:
        raise ValueError(f"{spec}: importing {module_name} failed: {_with_type(error)}") from error
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
        raise TypeError(f"{spec} is a {type(factory).__name__}; name a function or class that returns an nn.Module")
    try:
        model = factory()
    except Exception as error:
        raise ValueError(f"{spec}: calling it without arguments failed: {_with_type(error)}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{spec} returned a {type(model).__name__}, not an nn.Module")
    return model


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    state = _read_checkpoint(path)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: it lacks {listing(missing, 6)}, and has "
            f"{listing(unexpected, 6)} that the model does not know; use the checkpoint of this model"
        )


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"{path}: a checkpoint ends in one of {', '.join(CHECKPOINT_SUFFIXES)}")
    _check_is_file(path)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{path} cannot be loaded with weights_only=True: {_with_type(error)}; save the model's state_dict() with "
            "torch.save or as .safetensors"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds no state dict; save the model's state_dict(), or a dict with it as 'state_dict'"
        )
    return state


def _from_archive(path: Path) -> nn.Module:
    _check_is_file(path)
    try:
        _refuse_pickled_objects(path)
        with _weights_only():
            exported = torch.export.load(path)
    except Exception as error:
        raise ValueError(f"{path} is not a torch.export archive of this torch version: {_with_type(error)}") from error
    # Tracing drops what the archive asserts about its input: the operators decide which shapes they take.
    network = fx.symbolic_trace(exported.module(check_guards=False))
    for node in network.graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default and node.args[5]:
            raise ValueError(f"{path} was exported in training mode; call model.eval() before torch.export.export")
    return network.eval()


def _refuse_pickled_objects(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if Path(name).name.startswith(_PICKLED_PARTS):
                raise ValueError(f"{name} in it is a pickled object, which may run code; export a model of tensors")


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


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is not a file' if path.exists() else 'there is no such file'}")


def _with_type(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
