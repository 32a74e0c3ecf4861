"""The questions about layers: every method on the paper's, and our sparse methods on those that were really pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from benchmarks import suite
from benchmarks.findings.break_even import random_weights
from benchmarks.findings.methods import OURS, SPARSE
from benchmarks.result_files import Item
from benchmarks.study.study import Key, Study, key, label, layers_of, race, raced
from benchmarks.suite import Layer, Limited, Row
from escort.filter import SparseFilter
from escort.methods import by_name, channel_order, dense_for
from escort.problem import Precision, Problem


def compare(study: Study, precision: Precision) -> list[Item]:
    """RQ1 and RQ3: every method on every layer at the published sparsities.

    What is compiled for the layers' filters is compiled when the first of them is measured, all side by side.
    """
    layers = layers_of(study, precision)

    @cache
    def ahead() -> dict[Key, list[Limited]]:
        missing = [layer for layer in layers if key(layer) not in study.raced]
        methods = suite.limited(missing, study.compared, study.search)
        return dict(zip(map(key, missing), methods, strict=True))

    def measure(layer: Layer) -> list[Row]:
        if methods := ahead().pop(key(layer), None):
            study.raced[key(layer)] = race(study, layer, methods)
        return raced(study, layer)

    return [Item(label(layer), partial(measure, layer)) for layer in layers]


def find_break_even(study: Study, precision: Precision) -> list[Item]:
    """RQ4 for layers: `direct` at several sparsities against the dense library, on each shape once."""

    def measure(layer: Layer, sparsity: float) -> list[Row]:
        sparse_filter = suite.random_filter(layer.problem, sparsity, study.seed)
        methods = [by_name(name, study.device) for name in (OURS, dense_for(study.device).name)]
        return race(study, replace(layer, weights=random_weights(sparsity), sparse_filter=sparse_filter), methods)

    shapes: dict[Problem, Layer] = {}
    for layer in layers_of(study, precision):
        shapes.setdefault(layer.problem, layer)
    return [
        Item(f"{label(layer)} {sparsity:.2f}", partial(measure, layer, sparsity))
        for layer in shapes.values()
        for sparsity in study.sparsities
    ]


def compare_on_patterns(study: Study, precision: Precision) -> list[Item]:
    """Our sparse methods against the dense library on layers that were really pruned.

    Raises:
        ValueError: without files of patterns, for a file that holds none, and where the study has no layer of a file.
    """
    if not study.patterns:
        raise ValueError("real patterns come from files: name them with --patterns FILE.npz,...")
    return [item for path in study.patterns for item in _pattern_items(study, path, precision)]


def _pattern_items(study: Study, path: Path, precision: Precision) -> list[Item]:
    layers = suite.pattern_layers(path, study.batch, study.seed, precision=precision, device=study.device)
    studied = [index for index, layer in enumerate(layers) if study.has(layer.name)]
    if not studied:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"{path}: no layer is named like {study.layers}; there are {names}")
    methods = [method for method in study.compared if method.name in (*SPARSE, dense_for(study.device).name)]

    @cache
    def ahead() -> dict[int, tuple[Layer, list[Limited]]]:
        in_order = in_order_of_channels_last(layers)
        ordered = [in_order[index] for index in studied]
        limited = suite.limited(ordered, methods, study.search)
        return dict(zip(studied, zip(ordered, limited, strict=True), strict=True))

    def measure(index: int) -> list[Row]:
        return race(study, *ahead()[index])

    batch = layers[0].problem.batch
    return [Item(f"{path.stem} {layers[index].name} N={batch}", partial(measure, index)) for index in studied]


def in_order_of_channels_last(layers: Sequence[Layer]) -> list[Layer]:
    """A residual network's layers with their input channels in the order that it gives them in channels_last.

    A layer that is not pointwise, or widens, is the only reader of its input: the input gets the order that is best for
    the layer. The other pointwise layers that read maps of one shape all read the sums of one stage, so the sums have
    one order for all of them. That order is free unless the stage is the last, which no layer of stride 2 reads.
    """
    alone: list[list[int]] = []
    sums: dict[tuple[int, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        p = layer.problem
        if p.groups > 1:
            continue
        if p.kernel_size != (1, 1) or (p.stride == (1, 1) and p.out_channels > p.in_channels):
            alone.append([index])
        else:
            sums.setdefault(p.input_shape, []).append(index)
    free = [readers for readers in sums.values() if any(layers[i].problem.stride != (1, 1) for i in readers)]
    ordered = list(layers)
    for readers in alone + free:
        weights = [layers[index].sparse_filter.to_dense() for index in readers]
        problem = layers[readers[0]].problem
        channels = channel_order(weights, problem.precision, problem.device)
        if channels is None:
            continue
        for index, weight in zip(readers, weights, strict=True):
            ordered[index] = replace(layers[index], sparse_filter=SparseFilter.from_dense(weight[:, channels]))
    return ordered
