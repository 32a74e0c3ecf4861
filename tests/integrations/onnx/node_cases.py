"""The ONNX project's own tests of single operators, on what :func:`escort.from_onnx` makes of them.

``python -m tests.integrations.onnx.node_cases`` prints a table by operator; with ``--verbose`` what was refused, too.
The tests give all operands as inputs of a network. As filters, shapes and the like must be constant here, each is also
tried with all of its inputs but the first as constants, and then with the first axis of that one left open.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

import escort
from escort.integrations.onnx import OnnxError
from escort.integrations.onnx.operators import OPERATORS


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        operator: what is tested.
        case: the test's name.
        result: "right", "wrong" or "refused".
        why: the message of what was refused, or how far off the result is.
    """

    operator: str
    case: str
    result: str
    why: str = ""


def outcomes() -> Iterator[Outcome]:
    """Every test of a supported operator with tensors as inputs, in each of its forms."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    for case in cases:
        if case.model is None or not _is_ours(case):
            continue
        operator = case.model.graph.node[0].op_type
        for name, model, inputs, expected in _forms(case):
            yield _outcome(operator, name, model, inputs, expected, case)


def _is_ours(case: Any) -> bool:
    nodes, values = case.model.graph.node, (*case.model.graph.input, *case.model.graph.output)
    are_tensors = all(value.type.HasField("tensor_type") for value in values)
    return len(nodes) == 1 and nodes[0].domain == "" and nodes[0].op_type in OPERATORS and are_tensors


def _forms(case: Any) -> Iterator[tuple[str, onnx.ModelProto, list[Any], list[Any]]]:
    inputs, expected = case.data_sets[0]
    if len(inputs) < 2:
        yield case.name, case.model, inputs, expected
        if inputs and _array(inputs[0]).ndim > 1:
            yield f"{case.name}, open", _open(case.model), inputs, expected
        return
    yield f"{case.name}, all inputs", case.model, inputs, expected
    constant = copy.deepcopy(case.model)
    for value, array in list(zip(constant.graph.input, inputs, strict=True))[1:]:
        if array is not None:
            constant.graph.initializer.append(numpy_helper.from_array(_array(array), value.name))
    del constant.graph.input[1:]
    yield f"{case.name}, constants", constant, inputs[:1], expected
    if _array(inputs[0]).ndim > 1:
        yield f"{case.name}, constants, open", _open(constant), inputs[:1], expected


def _open(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the first size of its first input left open."""
    opened = copy.deepcopy(model)
    opened.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    return opened


def _outcome(
    operator: str, name: str, model: onnx.ModelProto, inputs: list[Any], expected: list[Any], case: Any
) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        try:
            onnx.save(model, path)
            network = escort.from_onnx(path)
        except OnnxError as error:
            return Outcome(operator, name, "refused", str(error).removeprefix(f"{path}: "))
        try:
            with torch.no_grad():
                found = network.forward(*(_to_torch(x) for x in inputs if x is not None))
        except Exception as error:
            return Outcome(operator, name, "wrong", f"{type(error).__name__}: {error}")
    outputs = found if isinstance(found, tuple) else (found,)
    for ours, theirs in zip(outputs, expected, strict=True):
        if (difference := _difference(ours, theirs, case)) is not None:
            return Outcome(operator, name, "wrong", difference)
    return Outcome(operator, name, "right")


def _array(x: Any) -> Any:
    return numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else np.asarray(x)


def _to_torch(x: Any) -> torch.Tensor:
    array = _array(x)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _difference(ours: torch.Tensor, theirs: Any, case: Any) -> str | None:
    """How a result differs from the one expected, None where it does not."""
    theirs = _array(theirs)
    if tuple(ours.shape) != theirs.shape:
        return f"shape {tuple(ours.shape)} instead of {theirs.shape}"
    if str(ours.dtype).removeprefix("torch.") != theirs.dtype.name:
        return f"type {ours.dtype} instead of {theirs.dtype}"
    ours_array = ours.to(torch.float64).numpy()
    close = np.allclose(
        ours_array, theirs.astype(np.float64), rtol=case.rtol, atol=max(case.atol, 1e-7), equal_nan=True
    )
    return None if close else f"off by {np.nanmax(np.abs(ours_array - theirs.astype(np.float64))):.2e}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verbose", action="store_true")
    verbose = parser.parse_args().verbose
    found = list(outcomes())
    counts = {operator: Counter(each.result for each in found if each.operator == operator) for operator in OPERATORS}
    for operator, count in sorted(counts.items()):
        print(f"{operator:24} right {count['right']:3}  refused {count['refused']:3}  wrong {count['wrong']:3}")
    for each in found:
        if each.result == "wrong" or (verbose and each.result == "refused"):
            print(f"{each.result}: {each.operator}, {each.case}: {each.why}")


if __name__ == "__main__":
    main()
