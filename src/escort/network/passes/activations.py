"""Activations that a network writes out: x * sigmoid(x), and what relu6(x + 3) stands in, become functions of torch.

Decomposed programs and older libraries have them so. As one operation they can be fused, and run as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from escort.network.check import Request
from escort.network.passes.operations import mutates
from escort.network.passes.rewriting import Rewriting
from escort.network.tracing.trace import shape_of


def rewrite(graph_module: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces what computes silu, hardsigmoid or hardswish of a floating-point tensor in several steps by one."""
    rewriting = Rewriting(graph_module, request)
    for node in list(rewriting.graph.nodes):
        found = _found(rewriting, node)
        if found is not None:
            function, source, steps = found
            noted = shape_of(source)
            if noted is not None and noted[1].is_floating_point and _apart(rewriting, source, steps, node):
                with rewriting.graph.inserting_before(node):
                    call = rewriting.graph.call_function(function, (source,))
                call.meta = dict(node.meta)
                rewriting.merge(node, call)
                for step in steps:
                    rewriting.graph.erase_node(step)
    return rewriting.finished(), {}


#: A function, the node that it is computed of, and the nodes between, each after its readers.
_Found = tuple[Callable[..., Tensor], fx.Node, list[fx.Node]]


def _found(rewriting: Rewriting, node: fx.Node) -> _Found | None:
    """What a node is the last step of, if of anything."""
    if (inner := _sixth(rewriting, node)) is not None:
        if (shifted := _bounded_shift(rewriting, inner)) is not None:
            return F.hardsigmoid, *shifted
        for source, gate in _factors(rewriting, inner):
            shifted = _bounded_shift(rewriting, gate)
            if shifted is not None and shifted[0] is source:
                return F.hardswish, source, [inner, *shifted[1]]
    for source, gate in _factors(rewriting, node):
        operation, arguments = rewriting.operation(gate)
        if operation in ("sigmoid", "hardsigmoid") and arguments.get("input") is source:
            return (F.silu if operation == "sigmoid" else F.hardswish), source, [gate]
    return None


def _factors(rewriting: Rewriting, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two nodes that a node multiplies, in either order."""
    operation, arguments = rewriting.operation(node)
    factors: tuple[Any, Any] = arguments.get("input"), arguments.get("other")
    if operation != "product" or "out" in arguments or not all(isinstance(factor, fx.Node) for factor in factors):
        return []
    return [factors, factors[::-1]]


def _sixth(rewriting: Rewriting, node: fx.Node) -> fx.Node | None:
    """What a node takes a sixth of."""
    operation, arguments = rewriting.operation(node)
    inner, other = arguments.get("input"), arguments.get("other")
    is_sixth = (operation, other) in (("quotient", 6), ("product", 1 / 6))
    is_plain = not arguments.keys() & {"out", "rounding_mode"}
    return inner if is_sixth and is_plain and isinstance(inner, fx.Node) else None


def _bounded_shift(rewriting: Rewriting, node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The x of which a node is relu6(x + 3), and the steps from the node back to the sum."""
    steps: list[fx.Node] = [node]
    bounds: list[Any] = [None, None]
    while bounds != [0, 6]:
        operation, arguments = rewriting.operation(steps[-1])
        for side, bound in enumerate(_bounds(operation, arguments)):
            if bound is not None:
                if bounds[side] is not None:
                    return None
                bounds[side] = bound
        inner = arguments.get("input")
        if operation not in _BOUNDING or "out" in arguments or not isinstance(inner, fx.Node):
            return None
        steps.append(inner)
    operation, arguments = rewriting.operation(steps[-1])
    operands = [arguments.get("input"), arguments.get("other")]
    source = next((operand for operand in operands if isinstance(operand, fx.Node)), None)
    if operation != "add" or source is None or 3 not in operands or arguments.keys() & {"out", "alpha"}:
        return None
    return source, steps


_BOUNDING = ("relu", "relu6", "hardtanh", "clamp")


def _bounds(operation: str, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The least and the largest result of an operation, None where there is no bound."""
    match operation:
        case "relu":
            return 0, None
        case "relu6":
            return 0, 6
        case "hardtanh":
            return arguments.get("min_val", -1), arguments.get("max_val", 1)
        case "clamp":
            return arguments.get("min"), arguments.get("max")
    return None, None


def _apart(rewriting: Rewriting, source: fx.Node, steps: list[fx.Node], last: fx.Node) -> bool:
    """Whether nothing but the steps reads their results, and nothing writes to the source meanwhile."""
    within = {*steps, last}
    if any(not within.issuperset(step.users) for step in steps):
        return False
    node = min(steps)
    while True:
        # A step may write to what another one made; what others write to may be a view of the source.
        writes = mutates(rewriting.root, node)
        if writes and (node not in within or node.all_input_nodes[0] is source):
            return False
        if node is last:
            return True
        node = node.next
