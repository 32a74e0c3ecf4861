"""A model as one list of nodes in one opset: functions written out, what is decided by constants decided.

The onnx and onnxscript libraries do that. They compute no constants but small ones of shapes, as what they compute has
no bounds; all others are computed where nodes are mapped (`builder.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from escort.integrations.onnx.errors import OnnxError
from escort.integrations.onnx.limits import MAX_FOLDED
from escort.integrations.onnx.read import opset

if TYPE_CHECKING:
    import onnx_ir
    from onnx import ModelProto

#: What older files are converted to. The operators of later opsets add inputs and attributes to those of this one.
OPSET = 13
#: Arithmetic of shapes, whose results are hardly larger than what it is given.
_FOLDED = frozenset(
    "Abs Add And Cast Ceil Concat Div Equal Floor Gather Greater Identity Less Max Min Mod Mul Neg Not Or ReduceMax "
    "ReduceMin ReduceProd ReduceSum Reshape Shape Size Slice Sqrt Squeeze Sub Transpose Unsqueeze".split()
)


def simplify(model: ModelProto) -> ModelProto:
    """A model of the same results without functions, in opset 13 or later.

    Raises:
        OnnxError: where the libraries cannot do it.
    """
    if opset(model) < OPSET:
        model = _converted(model)
    if not model.functions and not any(node.op_type == "If" for node in model.graph.node):
        return model
    import onnx_ir
    from onnxscript import optimizer

    try:
        with _quiet():
            rewritten = onnx_ir.from_proto(model)
            optimizer.optimize_ir(
                rewritten, should_fold=_may_fold, input_size_limit=MAX_FOLDED, output_size_limit=MAX_FOLDED
            )
            return onnx_ir.to_proto(rewritten)
    except Exception as error:
        raise OnnxError(
            f"onnxscript cannot write out its functions ({type(error).__name__}: {error}); export it without them, for "
            "example with torch.onnx.export and without export_modules_as_functions"
        ) from error


def _converted(model: ModelProto) -> ModelProto:
    """A model of an old opset in the one that operators are read in."""
    import onnx

    declared = {each.name for each in model.graph.input}
    for tensor in model.graph.initializer:  # which the converter knows as inputs only, as they were once
        if tensor.name not in declared:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:
        raise OnnxError(
            f"it is written in opset {opset(model)}, which onnx cannot convert to {OPSET} "
            f"({type(error).__name__}: {error}); export it in opset {OPSET} or later"
        ) from error


def _may_fold(node: onnx_ir.Node) -> bool | None:
    """Whether onnxscript may compute a node's constant; None leaves it to its rules."""
    return None if node.op_type in _FOLDED else False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries log of nodes that they leave as they are."""
    log = logging.getLogger("onnxscript")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
