"""Transposed convolutions as ordinary ones.

With stride 1 a transposed convolution is an ordinary one with its filter turned round. With stride s it has s phases
along an axis: outputs whose positions are alike modulo s are an ordinary convolution of the same input. All phases
become one convolution, whose channels are then interleaved to positions. The phases' kernels reach differently far;
what one of them lacks is zeros in the filter, which cost a sparse method nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from escort.network.check import Request
from escort.network.passes.linear import LEAST_SPARSITY, sparsity
from escort.network.passes.operations import POINTWISE, convolution_name, new_conv2d, per_axis, takes_output_size
from escort.network.passes.rewriting import Rewriting
from escort.network.tracing.conv_types import overrides
from escort.network.tracing.trace import shape_of


def rewrite(network: fx.GraphModule, request: Request) -> tuple[fx.GraphModule, dict[str, str]]:
    """Replaces the transposed 2-d convolutions of a graph.

    Batch norms and activations behind one are moved in front of the interleaving, where they can be fused.

    Returns:
        The new network, and for every transposed convolution left alone its name and the reason.
    """
    rewriting = Rewriting(network, request)
    found: dict[fx.Node, tuple[str, nn.Module]] = {}
    transposes: list[Transpose] = []
    for node in rewriting.graph.nodes:
        operation, arguments = rewriting.operation(node)
        if operation != "transposed" or not _is_understood(rewriting, node, arguments):
            continue
        name, transpose = convolution_name(node), Transpose.of(arguments)
        reason = _obstacle(node, transpose, arguments["weight"])
        if reason is None:
            conv = transpose.convolution(arguments["weight"], arguments.get("bias"))
            reason = request.left_alone(name, rewriting.original(node) or conv)
        if reason is not None:
            rewriting.skipped[name] = reason
            continue
        found[node] = name, conv
        transposes.append(transpose)
    for (call, module), transpose in zip(rewriting.put(found).items(), transposes, strict=True):
        assert isinstance(module, nn.Conv2d)
        noted = call.meta.pop("shape", None)
        last = _take_along(rewriting, call, module, transpose.phases)
        _interleave(rewriting.graph, last, transpose, noted)
    return rewriting.finished(), rewriting.skipped


def _is_understood(rewriting: Rewriting, node: fx.Node, arguments: dict[str, Any]) -> bool:
    """Whether it is a transposed 2-d convolution of constant weights that computes as torch's does."""
    module, shape, weight = rewriting.module(node), shape_of(arguments.get("input")), arguments["weight"]
    if not isinstance(weight, Tensor) or weight.ndim != 4 or not rewriting.is_settled(arguments):
        return False
    return (module is None or not overrides(module)) and (shape is None or len(shape[0]) == 4)


def _obstacle(node: fx.Node, transpose: Transpose, weight: Tensor) -> str | None:
    if node.op == "call_module" and takes_output_size(node):
        return "it is called with output_size; give the layer an output_padding instead"
    if transpose.phases > 1 and (zeros := sparsity(weight)) < LEAST_SPARSITY:
        return (
            f"{math.floor(100 * zeros)}% of its weights are zero: cut into the phases of its stride it gains from "
            f"{LEAST_SPARSITY:.0%} on; prune it further"
        )
    return None


@dataclass(frozen=True)
class Axis:
    """One axis of a transposed convolution as an ordinary one with stride 1.

    Attributes:
        phases: the stride; output ``phases * q + phase`` is the ordinary convolution's output q of a phase.
        places: for each tap of the transposed filter its phase and its place in the ordinary filter.
        size, dilation: of the ordinary filter.
        before, after: zeros around the input.
        surplus: positions at the end of the interleaved output that are none of the transposed convolution.
    """

    phases: int
    places: tuple[tuple[int, int], ...]
    size: int
    dilation: int
    before: int
    after: int
    surplus: int

    @classmethod
    def of(cls, size: int, stride: int, padding: int, output_padding: int, dilation: int) -> Axis:
        """Output o reads input i by tap r where ``o = stride * i - padding + dilation * r``."""
        reach = dilation * (size - 1)
        if stride == 1 and output_padding == 0 and reach >= padding:
            places = tuple((0, size - 1 - r) for r in range(size))
            return cls(1, places, size, dilation, reach - padding, reach - padding, 0)
        phases = [(dilation * r - padding) % stride for r in range(size)]
        offsets = [(phase + padding - dilation * r) // stride for r, phase in enumerate(phases)]
        length = reach + output_padding + 1 - 2 * padding  # of the output of one input
        periods = -(-length // stride)
        # The kernel's reach, wide enough that no input has to be cut off.
        first, last = min(0, *offsets), max(1 - periods, *offsets)
        places = tuple((phase, offset - first) for phase, offset in zip(phases, offsets, strict=True))
        return cls(stride, places, last - first + 1, 1, -first, periods - 1 + last, periods * stride - length)

    @property
    def is_same(self) -> bool:
        """Whether its zeros are those of torch's padding="same"."""
        total = self.dilation * (self.size - 1)
        return (self.before, self.after) == (total // 2, total - total // 2)

    def symmetric(self) -> Axis:
        """With as many zeros before the input as after it: the filter reaches into those that are added."""
        missing = self.after - self.before
        assert self.dilation == 1 or not missing
        places = tuple((phase, place + max(missing, 0)) for phase, place in self.places)
        zeros = max(self.before, self.after)
        return Axis(self.phases, places, self.size + abs(missing), self.dilation, zeros, zeros, self.surplus)


@dataclass(frozen=True)
class Transpose:
    """A transposed convolution as an ordinary one: its rows and columns."""

    rows: Axis
    columns: Axis
    padding: Any
    groups: int

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Transpose:
        defaults = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
        geometry = [per_axis(arguments.get(name), default) for name, default in defaults.items()]
        rows, columns = map(Axis.of, arguments["weight"].shape[2:], *zip(*zip(*geometry, strict=True), strict=True))
        groups = arguments.get("groups") or 1
        if rows.is_same and columns.is_same:
            return cls(rows, columns, "same", groups)
        rows, columns = rows.symmetric(), columns.symmetric()
        return cls(rows, columns, (rows.before, columns.before), groups)

    @property
    def phases(self) -> int:
        return self.rows.phases * self.columns.phases

    def convolution(self, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
        """The ordinary convolution, whose channels are those of the transposed one times the phases.

        Args:
            weight: (C, K / groups, R, S) of the transposed convolution.
            bias: (K,) or None.
        """
        channels = weight.shape[0] // self.groups
        turned = weight.detach().unflatten(0, (self.groups, channels)).transpose(1, 2).flatten(0, 1)
        shape = len(turned), self.rows.phases, self.columns.phases, channels, self.rows.size, self.columns.size
        ordinary = weight.new_zeros(shape)
        for r, (row_phase, row) in enumerate(self.rows.places):
            for s, (column_phase, column) in enumerate(self.columns.places):
                ordinary[:, row_phase, column_phase, :, row, column] = turned[:, :, r, s]
        bias = None if bias is None else bias.detach().repeat_interleave(self.phases)
        dilation = self.rows.dilation, self.columns.dilation
        return new_conv2d(ordinary.flatten(0, 2), bias, 1, self.padding, dilation, self.groups)


def _take_along(rewriting: Rewriting, call: fx.Node, conv: nn.Conv2d, phases: int) -> fx.Node:
    """Lets batch norms and what computes number by number, if nothing else reads it, work on the phases.

    Returns:
        The last node that does.
    """
    last = call
    while len(last.users) == 1:
        (node,) = last.users
        operation, arguments = rewriting.operation(node)
        if operation == "identity" and not arguments.get("training", True):
            rewriting.merge(node, last)
        elif operation == "norm" and last is call and arguments["input"] is call:
            if not rewriting.fold_norm(node, arguments, conv, phases):
                break
        elif operation in POINTWISE and node.all_input_nodes == [last]:
            node.meta.pop("shape", None)
            last = node
        else:
            break
    return last


def _interleave(graph: fx.Graph, node: fx.Node, transpose: Transpose, noted: Any) -> None:
    """Puts the phases of a result, (N, K * phases, H, W), in their places, (N, K, H * rows, W * columns)."""
    rows, columns = transpose.rows, transpose.columns
    steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    if rows.phases == columns.phases > 1:
        steps += [(torch.pixel_shuffle, (rows.phases,))]
    elif transpose.phases > 1:
        steps += [(torch.unflatten, (1, (-1, rows.phases, columns.phases))), (torch.permute, ((0, 1, 4, 2, 5, 3),))]
        steps += [(torch.flatten, (4, 5)), (torch.flatten, (2, 3))]
    if rows.surplus or columns.surplus:
        ends = [slice(None, -axis.surplus or None) for axis in (rows, columns)]
        steps += [(operator.getitem, ((slice(None), slice(None), *ends),))]
    users = list(node.users)
    last = node
    for function, arguments in steps:
        with graph.inserting_after(last):
            last = graph.call_function(function, (last, *arguments))
    for user in users:
        user.replace_input_with(node, last)
    if noted is not None:
        last.meta["shape"] = noted
