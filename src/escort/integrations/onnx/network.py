"""An ONNX file as a module of torch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from escort.integrations.onnx.builder import Builder
from escort.integrations.onnx.errors import NotSupportedError, OnnxError
from escort.integrations.onnx.limits import MAX_LISTED, MAX_OPERANDS
from escort.integrations.onnx.node import Context, Node
from escort.integrations.onnx.operators import mapped, why_not
from escort.integrations.onnx.read import opset, read
from escort.integrations.onnx.simplify import simplify
from escort.integrations.onnx.tensors import dtype_of
from escort.integrations.onnx.values import Operand, Sizes, Value

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

_log = logging.getLogger(__name__)


def build(path: Path, rounding: bool) -> fx.GraphModule:
    """The network of a file; see :func:`escort.from_onnx`."""
    model = read(path)
    try:
        module, notices = _build(simplify(model), rounding)
    except OnnxError as error:
        raise OnnxError(f"{path}: {error}", error.faults) from error
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # a damaged file may go wrong anywhere
        raise OnnxError(f"{path} is damaged ({type(error).__name__}: {error}); export it anew") from error
    for kind, count in notices.items():
        warnings.warn(f"{path}: {count} {kind}", stacklevel=3)
    return module


def _build(model: ModelProto, rounding: bool) -> tuple[fx.GraphModule, dict[str, int]]:
    graph = model.graph
    nodes = _in_order(graph)
    faults = [_fault(node, reason) for node in nodes if (reason := why_not(node.domain, node.op_type))]
    builder = Builder()
    if not graph.output:
        raise OnnxError("it returns nothing, so that there is no network; export it with its output")
    returned = [output.name for output in graph.output]
    read_names = frozenset([name for node in nodes for name in node.input] + returned)
    context = Context(opset(model), read_names, rounding)
    operands: dict[str, Operand | None] = {"": None}
    faults += _take_initializers(graph, builder, operands, read_names)
    faults += _take_inputs(graph, builder, operands)
    for node in nodes:
        if why_not(node.domain, node.op_type) or any(name not in operands for name in node.input):
            continue  # it is told already, or what it reads is
        builder.current = next(filter(None, node.output), node.name)
        try:
            results = mapped(Node(node, [operands[name] for name in node.input], builder, context))
        except NotSupportedError as error:
            faults.append(_fault(node, str(error)))
            continue
        except Exception as error:  # attributes of other types, and the like: a file may say anything
            faults.append(_fault(node, f"{type(error).__name__}: {error}; export it anew"))
            continue
        for name, result in zip(node.output, results, strict=False):
            if name:
                operands[name] = result
                if isinstance(result, Tensor):
                    builder.keep(result, name)
    if faults:
        raise OnnxError(_listed(faults), tuple(faults))
    results_of = tuple(_returned(builder, name, operands) for name in returned)
    return _finished(builder, results_of, graph.name), context.notices


def _in_order(graph: GraphProto) -> list[NodeProto]:
    """Nodes, each behind those that it reads. Raises OnnxError for circles and names that nothing computes."""
    made = {name for node in graph.node for name in node.output if name}
    if sum(bool(name) for node in graph.node for name in node.output) != len(made):
        raise OnnxError("two nodes compute one name; export it anew")
    known = {"", *(tensor.name for tensor in graph.initializer), *(each.name for each in graph.input)}
    readers: dict[str, list[int]] = {}
    missing = []
    for number, node in enumerate(graph.node):
        unknown = {name for name in node.input if name not in known}
        missing.append(len(unknown))
        for name in unknown:
            if name not in made:
                raise OnnxError(_fault(node, f"it reads {name[:100]!r}, which nothing computes; export it anew"))
            readers.setdefault(name, []).append(number)
    ready = [number for number, count in enumerate(missing) if not count]
    order = []
    for number in ready:  # which grows meanwhile
        order.append(number)
        for name in graph.node[number].output:
            for reader in readers.get(name, []):
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
    if len(order) < len(graph.node):
        rest = next(node for number, node in enumerate(graph.node) if missing[number])
        raise OnnxError(_fault(rest, "it reads what is computed of its own result; export it anew"))
    return [graph.node[number] for number in (range(len(order)) if _is_sorted(graph, known) else order)]


def _is_sorted(graph: GraphProto, known: set[str]) -> bool:
    seen = set(known)
    for node in graph.node:
        if not seen.issuperset(node.input):
            return False
        seen.update(node.output)
    return True


def _take_initializers(
    graph: GraphProto, builder: Builder, operands: dict[str, Operand | None], read_names: frozenset[str]
) -> list[str]:
    faults = []
    for tensor in graph.initializer:
        if tensor.name in read_names:
            try:
                operands[tensor.name] = builder.take(tensor)
            except NotSupportedError as error:
                faults.append(f"tensor {tensor.name[:100]!r}: {error}")
    return faults


def _take_inputs(graph: GraphProto, builder: Builder, operands: dict[str, Operand | None]) -> list[str]:
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [each for each in graph.input if each.name not in initializers]
    if not inputs or len(inputs) > MAX_OPERANDS:
        raise OnnxError("it takes no input, so that there is no network; export it with its input")
    faults = []
    for each in inputs:
        try:
            operands[each.name] = builder.input(each.name, *_shape_and_type(each))
        except NotSupportedError as error:
            faults.append(f"input {each.name[:100]!r}: {error}")
    return faults


def _shape_and_type(value: ValueInfoProto) -> tuple[tuple[int | None, ...], torch.dtype]:
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        raise NotSupportedError("the file does not say how many dimensions it has; export it with a shape")
    dimensions = value.type.tensor_type.shape.dim
    shape = tuple(each.dim_value if each.HasField("dim_value") else None for each in dimensions)
    if any(size is not None and size < 0 for size in shape):
        shape = tuple(None if size is None or size < 0 else size for size in shape)
    return shape, dtype_of(value.type.tensor_type.elem_type)


def _returned(builder: Builder, name: str, operands: dict[str, Operand | None]) -> Any:
    operand = operands.get(name)
    if isinstance(operand, Tensor):
        return builder.tensor(operand).node
    if isinstance(operand, Value):
        return operand.node
    if isinstance(operand, Sizes):
        raise OnnxError(f"it returns {name[:100]!r}, sizes of its input; leave them out of its outputs")
    raise OnnxError(f"it returns {name[:100]!r}, which nothing computes; export it anew")


def _finished(builder: Builder, results: tuple[Any, ...], name: str) -> fx.GraphModule:
    builder.graph.output(results[0] if len(results) == 1 else results)
    builder.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    builder.graph.lint()
    module = fx.GraphModule(builder.root, builder.graph, class_name="OnnxModule")
    module.delete_all_unused_submodules()
    _log.info("read %d steps of the graph %s", len(module.graph.nodes), name[:100])
    return module.eval()


def _fault(node: NodeProto, reason: str) -> str:
    name = node.name or next(filter(None, node.output), "")
    return f"{node.op_type[:100]} {name[:100]!r}: {reason}"


def _listed(faults: list[str]) -> str:
    """All that is wrong, in one message."""
    if len(faults) == 1:
        return faults[0]
    listed = "; ".join(f"({number}) {fault}" for number, fault in enumerate(faults[:MAX_LISTED], 1))
    rest = f"; and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    return f"{len(faults)} things are not supported: {listed}{rest}"
