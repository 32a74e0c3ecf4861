"""ONNX files: networks that other tools wrote, as ordinary modules of torch."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import fx, nn

from escort.arguments import path_of
from escort.integrations.onnx.errors import OnnxError

__all__ = ["OnnxError", "from_onnx", "inputs_of"]


def from_onnx(path: str | os.PathLike[str], *, rounding: bool = True) -> fx.GraphModule:
    """The network of an ONNX file as a plain module, to prune, convert or compute with.

    Convolutions, linear layers, normalisations and pooling become modules of ``torch.nn``, called like their weights in
    the file (``layer1.0.conv1``); everything else becomes functions of torch. Sizes that the file leaves open, such as
    the batch, stay open. It takes the file's inputs in the file's order, and returns its output, or a tuple of them.
    Nothing in the file is run. It takes the extra: ``pip install 'escort-sparse[onnx]'``.

    Example:
        >>> model = escort.from_onnx("model.onnx")
        >>> fast = escort.convert(model, torch.randn(1, 3, 224, 224))

    Args:
        path: an ONNX model in opset 7 to the newest, whose tensors may lie in other files of its folder.
        rounding: whether what the file quantizes between layers (QuantizeLinear) is rounded as it says. False leaves
            the rounding out and keeps the bounds, which is faster and no longer the same numbers. Quantized weights
            become float32 in either case. A warning says how often which of them happens.

    Raises:
        OnnxError: naming every node that has no counterpart, with the remedy, or what is damaged or beyond a bound.
        FileNotFoundError: where there is no such file.
        ImportError: where onnx is not installed.
        TypeError: for what is no path.
    """
    path = path_of(path, "model.onnx")
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ImportError("reading an ONNX file takes onnx and onnxscript; pip install 'escort-sparse[onnx]'")
    from escort.integrations.onnx.network import build

    return build(path, rounding)


def inputs_of(module: nn.Module) -> list[tuple[str, tuple[int | None, ...], torch.dtype]]:
    """Name, shape and type of each input of what :func:`from_onnx` returned; None is a size that the file leaves open.

    Of other modules there are none.
    """
    if not isinstance(module, fx.GraphModule):
        return []
    return [node.meta["onnx_input"] for node in module.graph.nodes if "onnx_input" in node.meta]
