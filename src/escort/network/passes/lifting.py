"""Operations moved to tensors with axes of size one added, so that they stand right behind the convolutions on these.

A convolution on rows, or on vectors, becomes a 2-d one between two changes of shape. What follows it number by number
or channel by channel computes the same before the second change as after it. Moved there, it can be fused; and where
the next convolution adds the axes again, nothing is left between the two.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn

from escort.network.passes.operations import FROZEN, POINTWISE
from escort.network.passes.rewriting import Rewriting
from escort.network.tracing.trace import shape_of


class Lifting:
    """A graph in which some tensors are narrow views of wide ones.

    Args:
        rewriting: the graph.
        ndim: the dimensions of a narrow tensor.
        widen, narrow: the index that makes a wide tensor of a narrow one, and the one for the other way round. Both are
            views.
        wide_shape: the shape of the wide tensor of a narrow one.
    """

    def __init__(
        self,
        rewriting: Rewriting,
        ndim: int,
        widen: tuple[Any, ...],
        narrow: tuple[Any, ...],
        wide_shape: Callable[[torch.Size], torch.Size],
    ) -> None:
        self.rewriting, self.ndim, self.wide_shape = rewriting, ndim, wide_shape
        self.widen, self.narrow = widen, narrow
        self.wide: dict[fx.Node, fx.Node] = {}  # by narrow node
        self.views: set[fx.Node] = set()  # the narrow nodes that are views of wide ones

    def lift(self, calls: Collection[fx.Node]) -> None:
        """Puts `calls`, convolutions of narrow tensors that take wide ones, and what follows them on wide tensors."""
        for node in list(self.rewriting.graph.nodes):
            if node in calls:
                self._move(node, [node], only_input=True)
            elif any(source in self.views for source in node.all_input_nodes):
                self._follow(node)

    def _follow(self, node: fx.Node) -> None:
        operation, arguments = self.rewriting.operation(node)
        source: Any = arguments.get("input")
        if operation == "identity" and not arguments.get("training", True):
            self.rewriting.merge(node, source)
        elif operation == "norm":
            self._follow_norm(node, source, arguments)
        elif operation in POINTWISE and "out" not in node.kwargs and all(map(self._is_narrow, node.all_input_nodes)):
            self._move(node, [node], only_input=False)

    def _follow_norm(self, node: fx.Node, source: Any, arguments: dict[str, Any]) -> None:
        """A batch norm treats all axes behind the channels alike."""
        if source not in self.views or node.args[:1] != (source,):
            return
        if arguments.get("training") or not self.rewriting.is_settled(arguments):
            return
        results = [node]
        if node.target is FROZEN:
            results = list(node.users)
            if any(result.args[1:] != (0,) for result in results):
                return
        module = self.rewriting.module(node)
        if type(module) is nn.BatchNorm1d:
            (node,) = results = [*self.rewriting.put({node: (str(node.target), _batch_norm_2d(module))})]
        self._move(node, results, only_input=True)

    def _is_narrow(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        return node in self.wide or (shape is not None and len(shape[0]) == self.ndim)

    def _move(self, node: fx.Node, results: list[fx.Node], *, only_input: bool) -> None:
        """Lets `node` take wide tensors in place of narrow ones, and narrows its results behind it.

        Args:
            only_input: all but the first of what it takes are weights.
        """
        graph = self.rewriting.graph

        def widened(source: fx.Node) -> fx.Node:
            if source not in self.wide:
                with graph.inserting_before(node):
                    self.wide[source] = graph.call_function(operator.getitem, (source, self.widen))
                self._note_shape(self.wide[source], source)
            return self.wide[source]

        tensors = node.args[:1] if only_input else node.args
        node.args = (*fx.map_arg(tensors, widened), *node.args[len(tensors) :])
        node.kwargs = node.kwargs if only_input else fx.map_arg(node.kwargs, widened)
        for result in results:
            with graph.inserting_after(result):
                view = graph.call_function(operator.getitem, (result, self.narrow))
            for user in [user for user in result.users if user is not view]:
                user.replace_input_with(result, view)
            view.meta = dict(result.meta)
            self._note_shape(result, view)
            self.wide[view] = result
            self.views.add(view)

    def _note_shape(self, wide: fx.Node, narrow: fx.Node) -> None:
        if (noted := shape_of(narrow)) is not None:
            wide.meta["shape"] = self.wide_shape(noted[0]), noted[1]


def _batch_norm_2d(norm: nn.BatchNorm1d) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
    made.weight, made.bias = norm.weight, norm.bias
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    made.num_batches_tracked = norm.num_batches_tracked
    return made.eval()
