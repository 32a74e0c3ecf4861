"""A converted model into one file: its graph, compressed filters, other weights and plan, and no code."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from escort.artifact.container import pack
from escort.artifact.errors import naming
from escort.artifact.files import replace_file
from escort.artifact.graph import check_path, describe_graph
from escort.artifact.layers import SPARSE, describe_layer
from escort.filter import SparseFilter
from escort.layers import MaxPool2d, SparseConv2d
from escort.network.model import ConvertedModel
from escort.planner.machine import Machine

FORMAT, VERSION = "escort", 2


def save(model: ConvertedModel, path: str | os.PathLike[str]) -> None:
    """Writes a converted model to one file: its graph, compressed filters, other weights and plan, and no code.

    An older file of that name is replaced once the new one is complete, and stays if anything fails. Of a model that
    torch.fx could not trace, the file holds filters and weights only, and :func:`load` takes the model besides.

    Raises:
        ValueError, TypeError: naming the layer that cannot be saved and the remedy.
        OSError: naming the path that cannot be written and the remedy.
    """
    if not isinstance(model, ConvertedModel):
        raise TypeError(f"save takes what escort.convert returned, got {type(model).__name__}; convert the model first")
    architecture = _describe(model)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "escort": Machine.here().escort,
        "architecture": _json(architecture),
        # The error of a candidate that failed may be infinite, which JSON cannot say.
        "plan": _json(json.loads(json.dumps(model.plan.to_json()), parse_constant=lambda constant: None)),
    }
    _write(Path(path), pack(metadata, _tensors(model.network, architecture["layers"])))


def _describe(model: ConvertedModel) -> dict[str, Any]:
    """The layers and, of a traced network, the graph that calls them."""
    network = model.network
    if isinstance(network, fx.GraphModule):
        names = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
        nodes = describe_graph(network.graph)
    else:
        names = [name for name, layer in network.named_modules() if isinstance(layer, SparseConv2d | MaxPool2d)]
        nodes = None
    layers = {}
    for name in names:
        with naming(f"layer {name}"):
            check_path(name)
            layer = network.get_submodule(name)
            if isinstance(layer, SparseConv2d):
                planned = model.plan.layers[name].problem
                computed = layer.problem(planned.batch, planned.height, planned.width)
                if replace(computed, device=planned.device) != planned:
                    raise ValueError("it was changed after it was planned; convert the model again")
                layers[name] = {"type": SPARSE}
            else:
                layers[name] = describe_layer(layer)
    return {"layers": layers, "graph": nodes}


def _tensors(network: nn.Module, layers: Collection[str]) -> dict[str, Tensor | SparseFilter]:
    """The tensors of the file by qualified name; a sparse convolution's filter is its weight."""
    state: dict[str, Any] = network.state_dict()
    if isinstance(network, fx.GraphModule):  # only what its nodes refer to, which may be plain attributes
        targets = [str(node.target) for node in network.graph.nodes if node.op == "get_attr"]
        state = {key: value for key, value in state.items() if key.startswith(tuple(f"{name}." for name in layers))}
        state |= {target: operator.attrgetter(target)(network) for target in targets}
    for name in layers:
        layer = network.get_submodule(name)
        if isinstance(layer, SparseConv2d):
            for buffer in ("values", "columns", "indptr"):
                del state[f"{name}.{buffer}"]
            state[f"{name}.weight"] = layer.filter
    for name, value in state.items():
        if not isinstance(value, Tensor | SparseFilter):
            raise TypeError(f"{name} is a {type(value).__name__}, not a tensor; make it a buffer of the model")
    return state


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _write(path: Path, data: bytes) -> None:
    try:
        replace_file(path, lambda unfinished: unfinished.write_bytes(data))
    except OSError as error:
        remedy = f"name a file in a folder that exists and takes {len(data):,} bytes"
        raise type(error)(error.errno, f"cannot save: {error.strerror or error}; {remedy}", str(path)) from error
