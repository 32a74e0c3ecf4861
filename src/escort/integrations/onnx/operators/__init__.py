"""The operators that are mapped: a closed table of one function for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.node import Node
from escort.integrations.onnx.operators import (
    convolution,
    elementwise,
    normalization,
    pooling,
    quantization,
    reductions,
    resizing,
    shapes,
    sizes,
)
from escort.integrations.onnx.values import Sizes, Value

#: By the name that ONNX gives an operator. Each takes a node and returns what its results stand for.
OPERATORS: Mapping[str, Callable[[Node], Any]] = {
    **convolution.OPERATORS,
    **elementwise.OPERATORS,
    **normalization.OPERATORS,
    **pooling.OPERATORS,
    **quantization.OPERATORS,
    **reductions.OPERATORS,
    **resizing.OPERATORS,
    **shapes.OPERATORS,
}
#: Operators all of whose inputs are numbers of one kind.
_OF_EQUALS = frozenset("Add Sub Mul Div Mod Concat Equal Where".split())
_CONTROL = "it depends on values; export the network for inputs of fixed sizes, so that the exporter decides it"
_BEHIND = "cut the file before it with onnx.utils.extract_model, and do that step in code behind the network"
#: What to do about operators that are not mapped.
_REMEDIES = {
    **dict.fromkeys(("If", "Loop", "Scan"), _CONTROL),
    **dict.fromkeys(("NonMaxSuppression", "RoiAlign", "NonZero", "ScatterND", "ScatterElements"), _BEHIND),
    **dict.fromkeys(
        ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"),
        "quantize the network in the format of QuantizeLinear and DequantizeLinear (QDQ), or export it unquantized",
    ),
}
_REMEDY = "do without it, or cut the file around it with onnx.utils.extract_model"
_FOREIGN = (
    "export the network without operators of that domain; for com.microsoft, without ONNX Runtime's optimisations"
)


def why_not(domain: str, op: str) -> str | None:
    """Why an operator is not mapped, and the remedy; None for one that is."""
    if domain not in ("", "ai.onnx"):
        return f"operators of the domain {domain[:100]} are not known here; {_FOREIGN}"
    return None if op in OPERATORS else f"is not supported; {_REMEDIES.get(op, _REMEDY)}"


def mapped(node: Node) -> tuple[Any, ...]:
    """What the results of a node stand for.

    Raises:
        NotSupportedError: saying what of it has no counterpart, and the remedy.
    """
    constants = [node[index] for index in range(node.arity) if node.is_constant(index)]
    if node.op != "DequantizeLinear" and any(id(constant) in node.builder.narrow for constant in constants):
        raise NotSupportedError("it computes with numbers of a few bits, which only DequantizeLinear does here")
    function = sizes.OPERATORS[node.op] if _is_of_sizes(node) else OPERATORS[node.op]
    result = function(node)
    node.check_unread()
    return result if isinstance(result, tuple) else (result,)


def _is_of_sizes(node: Node) -> bool:
    """Whether a node computes sizes of sizes."""
    if node.op not in sizes.OPERATORS:
        return False
    operands = [node[index] for index in range(node.arity) if node.has(index)]
    if node.op in _OF_EQUALS:
        return any(isinstance(operand, Sizes) for operand in operands) and not any(
            isinstance(operand, Value) for operand in operands
        )
    return bool(operands) and isinstance(operands[0], Sizes)
