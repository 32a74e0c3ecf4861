"""Methods with a part of their search spaces, and with what they compile made before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from benchmarks.suite.layers import Layer
from escort.filter import SparseFilter
from escort.methods import Method, Prepared
from escort.planner.cores import on_all_cores
from escort.problem import Problem


class Limited(Method):
    """A method with a smaller search space: the given configurations, or the `most` best guesses."""

    def __init__(self, method: Method, configs: Sequence[Any] | None = None, most: int | None = None) -> None:
        self._method, self._configs, self._most = method, configs, most
        self._ready: dict[Any, Prepared] = {}

    def __getattribute__(self, name: str) -> Any:
        own = ("configs", "benchmark_configs", "prepare", "prepare_ahead")
        if name.startswith("_") or name in own:
            return super().__getattribute__(name)
        return getattr(self._method, name)

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[Any]:
        return self._configs or self._method.configs(problem, sparse_filter)[: self._most]

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[Any]:
        return () if self._configs is not None else self._method.benchmark_configs(problem, sparse_filter)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: Any,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        ready = self._ready.pop(config, None)
        return ready or self._method.prepare(problem, sparse_filter, bias, config, slope)

    def prepare_ahead(self, layer: Layer, config: Any) -> None:
        """Keeps what a later `prepare` of the layer returns. What fails here fails there again, and is reported."""
        with suppress(RuntimeError, ValueError):
            self._ready[config] = self._method.prepare(layer.problem, layer.sparse_filter, None, config)


def limited(layers: Sequence[Layer], methods: Sequence[Method], most: int | None = None) -> list[list[Limited]]:
    """For each layer the methods with their `most` best guesses, by default all.

    What methods compile for the filters is compiled here, side by side for all layers.
    """
    by_layer, jobs = [], []
    for layer in layers:
        by_layer.append([Limited(method, most=most) for method in methods])
        for index, method in enumerate(methods):
            if method.compiles_per_filter and method.unsupported(layer.problem) is None:
                configs = list(method.configs(layer.problem, layer.sparse_filter)[:most])
                ready = by_layer[-1][index] = Limited(method, configs)
                jobs += [partial(ready.prepare_ahead, layer, config) for config in configs]
    on_all_cores(jobs)
    return by_layer
