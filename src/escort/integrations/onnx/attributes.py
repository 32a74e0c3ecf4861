"""Attributes that a file gives a node and that nothing read: what they ask for would silently not be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from escort.integrations.onnx.errors import NotSupportedError

#: Attributes that change no number here: of training, of results or types that are refused anyway, or of any order.
_IDLE = {
    "BatchNormalization": "momentum is_test",
    "Cast": "saturate round_mode",
    "CastLike": "saturate round_mode",
    "Dropout": "ratio seed is_test",
    "MaxPool": "storage_order",
    "QuantizeLinear": "saturate",
    "Resize": "extrapolation_value",
    "TopK": "sorted",
}
#: Left by exporters of the first opset, which said so where a result took the place of an input.
_OF_OLD = "consumed_inputs"


def check_unread(op: str, version: int, given: Mapping[str, Any], read: Iterable[str]) -> None:
    """Raises NotSupportedError where a node has an attribute that its mapping did not read, with another value than
    what ONNX takes where there is none.

    Args:
        version: the opset.
        given: attributes by name.
        read: the names of those that were read.
    """
    for name in sorted(given.keys() - {*read} - {*_IDLE.get(op, "").split(), _OF_OLD}):
        is_known, default = _default(op, version, name)
        if not is_known:
            raise NotSupportedError(
                f"its attribute {name[:100]!r} is none that ONNX knows of it; export it without, or anew"
            )
        if given[name] != default:
            raise NotSupportedError(
                f"its attribute {name} is {str(given[name])[:50]}, which is not done here; export it with "
                f"{'none' if default is None else f'{name} {default}'}"
            )


def _default(op: str, version: int, name: str) -> tuple[bool, Any]:
    """Whether an operator has an attribute, and its value where a node has none; None where ONNX names no value.

    What was converted to a later opset may keep attributes that only earlier ones have.
    """
    from onnx import AttributeProto, defs, helper

    histories = [schema for schema in defs.get_all_schemas_with_history() if (schema.name, schema.domain) == (op, "")]
    for schema in sorted(histories, key=lambda schema: -schema.since_version):
        if schema.since_version <= version and name in schema.attributes:
            default = schema.attributes[name].default_value
            return True, None if default.type == AttributeProto.UNDEFINED else helper.get_attribute_value(default)
    return False, None
