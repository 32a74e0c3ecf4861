"""Networks of torchvision and timm as ONNX files, by both exporters of torch, against ONNX Runtime.

``python -m tests.integrations.onnx.networks`` prints a row for each network and exporter.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

import escort
from benchmarks.zoo import build as zoo
from benchmarks.zoo.catalogue import Entry

#: Library/name, the size of its pictures, and the opset that each exporter is asked for.
NETWORKS = (
    ("torchvision/resnet50", 64, 9, 18),
    ("torchvision/mobilenet_v3_small", 64, 11, 20),
    ("torchvision/densenet121", 64, 12, 18),
    ("torchvision/googlenet", 64, 13, 21),
    ("torchvision/efficientnet_b0", 64, 14, 22),
    ("torchvision/shufflenet_v2_x1_0", 64, 17, 18),
    ("torchvision/fcn_resnet50", 64, 16, 18),
    ("timm/convnext_atto", 64, 17, 23),
    ("timm/tf_efficientnet_lite0", 64, 17, 18),
    ("timm/hrnet_w18_small", 64, 15, 18),
    ("timm/mobilevit_xxs", 64, 17, 18),
)
EXPORTERS = ("legacy", "dynamo")


@dataclass(frozen=True)
class Row:
    """How a network came through.

    Attributes:
        network, exporter: which file.
        opset: what it is written in.
        nodes: how many the file has.
        modules: convolutions and linear layers that became modules, and how many the original has.
        own_names: how many of these are called as in the original.
        errors: relative to the largest output: of the example, and of another number of samples.
    """

    network: str
    exporter: str
    opset: int
    nodes: int
    modules: tuple[int, int]
    own_names: int
    errors: tuple[float, float]


def row(network: str, size: int, opset: int, exporter: str) -> Row:
    """Exports a network with an open batch, and compares it with ONNX Runtime."""
    model = build(network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with quiet():
            export(model, torch.randn(2, 3, size, size), path, opset, exporter)
        proto = onnx.load(path)
        found = escort.from_onnx(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        errors = []
        for samples in (2, 3):
            x = torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(samples))
            expected = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            with torch.no_grad():
                result = found(x)
            errors.append(_error(result if isinstance(result, tuple) else (result,), expected))
    kinds = nn.modules.conv._ConvNd | nn.Linear
    ours = {name for name, module in found.named_modules() if isinstance(module, kinds)}
    own = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    version = next(each.version for each in proto.opset_import if each.domain == "")
    first, second = errors
    return Row(
        network, exporter, version, len(proto.graph.node), (len(ours), len(own)), len(ours & own), (first, second)
    )


def build(network: str) -> nn.Module:
    """A network of the zoo: random weights, 90 % of them zeros, and made-up statistics of its norms."""
    model = zoo.build(Entry(network))
    return _OneOutput(model) if network.endswith("fcn_resnet50") else model


class _OneOutput(nn.Module):
    """Returns the map of a network of torchvision that returns a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)["out"]


def export(model: nn.Module, x: torch.Tensor, path: Path, opset: int, exporter: str) -> None:
    """Writes a model with an open batch."""
    if exporter == "legacy":
        torch.onnx.export(
            model, (x,), str(path), dynamo=False, opset_version=opset, input_names=["x"], dynamic_axes={"x": {0: "n"}}
        )
    else:
        batch = torch.export.Dim.DYNAMIC
        torch.onnx.export(
            model, (x,), str(path), dynamo=True, opset_version=opset, dynamic_shapes=({0: batch},), verbose=False
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _error(ours: tuple[torch.Tensor, ...], theirs: list[Any]) -> float:
    """The largest difference relative to the largest number."""
    pairs = [(a.double(), torch.from_numpy(b).double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def rows(only: Sequence[str] = ()) -> Iterator[Row]:
    """Each network, or those that are named, by each exporter."""
    for network, size, legacy, dynamo in NETWORKS:
        if only and network not in only:
            continue
        for exporter, opset in zip(EXPORTERS, (legacy, dynamo), strict=True):
            yield row(network, size, opset, exporter)


if __name__ == "__main__":
    for each in rows(sys.argv[1:]):
        print(each, flush=True)
