"""What each engine loads: a file, and how it runs."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from escort.network.example import Example
from escort.network.rivals import laid_out
from escort.problem import TORCH_MEMORY_FORMAT, MemoryFormat


@dataclass(frozen=True)
class Engine:
    """One way to run a network in a process of its own; what it needs lies in files.

    Attributes:
        method, config: of its results.
        loader: a name of the worker's loaders.
        model, inputs: paths; a pickled module holds its inputs.
        is_compiled: whether torch.compile makes of the module what runs.
        is_ordered: whether its outputs come in the order and shapes of the model's. Files of the user's may have them
            otherwise.
    """

    method: str
    config: Mapping[str, Any]
    loader: str
    model: Path
    inputs: Path | None = None
    is_compiled: bool = False
    is_ordered: bool = True


@dataclass
class Bench:
    """A model and inputs, of which engines are made. What engines load is written to a folder.

    Attributes:
        model: in eval mode, on the CPU.
        threads: that each engine gets.
        files: the user's own files of the model by ending, "onnx" or "tflite", instead of an export.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    folder: Path
    threads: int
    files: Mapping[str, Path] = field(default_factory=dict)

    def module(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Path:
        """A module with its inputs, pickled. Raises ValueError where it cannot be pickled."""
        path = self.folder / f"{name}.pickle"
        try:
            torch.save((module, inputs), path)
        except Exception as error:  # pickle raises errors of several kinds, and a class may raise any
            raise ValueError(
                f"it cannot be handed to a process of its own: {error}; define the model's classes at the top of an "
                "importable module, or name a torch.export archive"
            ) from error
        return path

    def onnx(self) -> Path:
        """The model as an ONNX file, the user's own if there is one."""
        if "onnx" in self.files:
            return self.files["onnx"]
        path = self.folder / "model.onnx"
        if not path.exists():
            _installed("onnx", "onnxscript")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporter's, about its own future
                torch.onnx.export(self.model, self.inputs, path, dynamo=True, external_data=False, verbose=False)
        return path

    def arrays(self) -> Path:
        """The inputs as numpy arrays."""
        path = self.folder / "inputs.npz"
        if not path.exists():
            np.savez(path, *(x.numpy() for x in self.inputs))
        return path


def escort(bench: Bench, converted: nn.Module, config: Mapping[str, Any]) -> Engine:
    """The converted model as it is, with the plans that it has."""
    return Engine("escort", config, "torch_module", bench.module("escort", converted, bench.inputs))


def eager(bench: Bench) -> list[Engine]:
    """The model as it is, in both memory formats."""
    return [_laid_out(bench, "eager", name) for name in TORCH_MEMORY_FORMAT]


def compiled(bench: Bench) -> list[Engine]:
    """The model as torch.compile makes it, in channels_last."""
    return [_laid_out(bench, "compile", "channels_last", is_compiled=True)]


def _laid_out(bench: Bench, method: str, memory_format: MemoryFormat, *, is_compiled: bool = False) -> Engine:
    network, example = laid_out(bench.model, Example(bench.inputs), TORCH_MEMORY_FORMAT[memory_format])
    path = bench.module(f"{method}-{memory_format}", network, example.args)
    return Engine(method, {"memory_format": memory_format}, "torch_module", path, is_compiled=is_compiled)


def onnxruntime(bench: Bench) -> list[Engine]:
    """ONNX Runtime, with its own threads."""
    _installed("onnxruntime")
    return [_of_file(bench, "onnxruntime", bench.onnx(), "intra_op_num_threads", "onnx")]


def openvino(bench: Bench) -> list[Engine]:
    """OpenVINO, which reads the ONNX file too."""
    _installed("openvino")
    return [_of_file(bench, "openvino", bench.onnx(), "inference_num_threads", "onnx")]


def litert(bench: Bench) -> list[Engine]:
    """LiteRT, where the user has a file for it."""
    if "tflite" not in bench.files:
        raise ValueError("LiteRT runs files of its own format; give one of the same model with --tflite FILE")
    _installed("ai_edge_litert")
    return [_of_file(bench, "litert", bench.files["tflite"], "num_threads", "tflite")]


def _of_file(bench: Bench, method: str, path: Path, threads: str, ending: str) -> Engine:
    is_ordered = ending not in bench.files
    return Engine(method, {threads: bench.threads}, method, path, bench.arrays(), is_ordered=is_ordered)


def _installed(*packages: str) -> None:
    """Raises ImportError where one is missing. None is imported: its threads would stay in this process."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install escort-sparse[bench]")


#: The engines beside Escort by name: what makes them, and raises ImportError, RuntimeError or ValueError.
ENGINES: dict[str, Callable[[Bench], Sequence[Engine]]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "litert": litert,
}
