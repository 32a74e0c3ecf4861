"""Small ONNX models written by hand, and what ONNX Runtime and Escort make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import escort

Array = NDArray[Any]


def numbers(*shape: int, seed: int = 0) -> Array:
    """The same for a shape and a seed, whichever test asks first."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def whole(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def read(model: onnx.ModelProto, folder: Path, **options: Any) -> torch.fx.GraphModule:
    onnx.save(model, folder / "model.onnx")
    return escort.from_onnx(folder / "model.onnx", **options)


def outputs_of(network: Any, *arrays: Array) -> list[Array]:
    with torch.no_grad():
        found = network(*(torch.from_numpy(array) for array in arrays))
    return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]


def runtime(model: onnx.ModelProto, *arrays: Array) -> list[Array]:
    """What ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {given.name: array for given, array in zip(session.get_inputs(), arrays, strict=True)}
    return [np.asarray(array) for array in session.run(None, feed)]


def model_of(
    nodes: Sequence[NodeProto],
    constants: dict[str, Any],
    shape: Sequence[int | str],
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(operator: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs.split(), outputs.split(), name=name, **attributes)


def small(**constants: Any) -> ModelProto:
    """A convolution, a norm, an activation and a linear layer, as exporters write them, with an open batch."""
    return model_of(
        [
            node("Conv", "x body.0.conv.weight", "a", "/body/body.0/conv/Conv", pads=[1, 1, 1, 1]),
            node("BatchNormalization", "a body.1.weight shift mean variance", "b", "/body/body.1/BatchNormalization"),
            node("Relu", "b", "c", "/body/body.2/Relu"),
            node("GlobalAveragePool", "c", "d", "/pool/GlobalAveragePool"),
            node("Shape", "d", "sizes"),
            node("Gather", "sizes zero", "batch"),
            node("Unsqueeze", "batch first", "batches"),
            node("Concat", "batches rest", "flat", axis=0),
            node("Reshape", "d flat", "e"),
            node("Gemm", "e onnx::Gemm_12 head.bias", "y", "/head/Gemm", transB=1),
        ],
        {
            "body.0.conv.weight": numbers(8, 3, 3, 3),
            **{
                name: np.abs(numbers(8, seed=seed)) + 0.5
                for seed, name in enumerate(("body.1.weight", "shift", "mean", "variance"))
            },
            **{"zero": np.int64(0), "first": whole(0), "rest": whole(-1)},
            **{"onnx::Gemm_12": numbers(5, 8), "head.bias": numbers(5)},
            **constants,
        },
        ["n", 3, 12, 10],
    )


def classifier() -> ModelProto:
    """Of pictures of 32x32, most of its weights zero."""
    weight = numbers(16, 3, 3, 3) * (np.arange(16 * 27).reshape(16, 3, 3, 3) % 10 == 0)
    return model_of(
        [
            node("Conv", "x conv.weight", "a", strides=[2, 2]),
            node("Relu", "a", "b"),
            node("GlobalAveragePool", "b", "c"),
            node("Flatten", "c", "d"),
            node("Gemm", "d head.weight", "y", transB=1),
        ],
        {"conv.weight": weight.astype(np.float32), "head.weight": numbers(10, 16)},
        ["n", 3, 32, 32],
    )
