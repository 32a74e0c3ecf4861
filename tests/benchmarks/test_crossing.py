"""Crossings: where the methods' models cross a time that was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks import exhibits, suite
from benchmarks.findings import crossing, methods
from benchmarks.result_files import Result
from escort.cuda.gpu import H200, Gpu
from escort.filter import SparseFilter
from escort.methods import by_name
from escort.methods.cuda.direct.search import predicted_clocks
from escort.methods.cuda.generated.search import search
from escort.problem import Problem
from tests.benchmarks.made_up import (
    CROSSING_ROWS,
    HEADER,
    ON_H200,
    cells,
    everything,
    row,
)


class Modelled:
    """A method of which nothing is known but what its model predicts, in microseconds."""

    name = "modelled"

    def __init__(self, predicted: Callable[[Problem, SparseFilter], float]) -> None:
        self._predicted = predicted

    def predict_us(self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu) -> float:
        return self._predicted(problem, sparse_filter)


def falling(at_none: float) -> Modelled:
    """A model whose time falls in proportion to the zeros."""
    return Modelled(lambda problem, sparse_filter: at_none * (1.0 - sparse_filter.sparsity))


def test_crossings_are_where_models_cross_the_time_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    in_channels_last = Modelled(lambda problem, _: 1.0 if problem.memory_format == "channels_last" else 100.0)
    models = {
        "direct": falling(100.0),
        "generated": falling(100.0),
        "sparse_tc": in_channels_last,
    }
    monkeypatch.setattr(crossing, "by_name", lambda name, device: models[name])
    monkeypatch.setattr(crossing, "direct_factors", lambda result, precision: [0.2, 4 / 3, 2.0])
    other = [row("resnet50", "res2b_branch2b", "cudnn", 1.0, batch=1), row("caffenet", "conv3", "cudnn", 1.0)]
    crossings = crossing.crossings({"layers-fp16": Result(ON_H200, [*CROSSING_ROWS, *other])}, "fp16")
    assert [(f.memory_format, f.cudnn_us, f.problem.precision) for f in crossings] == [
        ("NCHW", 30.0, "fp16"),
        ("any", 20.0, "fp16"),
    ]
    nchw, best = (f.least for f in crossings)
    assert nchw == {
        "direct": pytest.approx(0.775, abs=0.01),
        "generated": pytest.approx(0.7, abs=0.01),
        "sparse_tc": math.inf,
    }
    assert best["direct"] > nchw["direct"] and best["generated"] == pytest.approx(0.8, abs=0.01)
    assert best["sparse_tc"] == -math.inf


def test_crossings_are_of_what_was_timed_and_of_known_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    model = falling(100.0)
    monkeypatch.setattr(crossing, "by_name", lambda name, device: model)
    pointwise = row("resnet50", "module9_1_module0_1_conv2d_0", "cudnn", 20.0, weights="95", batch=128)
    (predicted,) = crossing.crossings({"patterns-fp32": Result(ON_H200, [pointwise])}, "fp32")
    assert (predicted.problem.in_channels, predicted.problem.kernel_size, predicted.memory_format) == (
        1024,
        (1, 1),
        "NCHW",
    )
    assert list(predicted.least) == ["generated"], (
        "without timings of direct its clocks say nothing, and no fp32 on tensors"
    )
    assert crossing.crossings({"layers-fp16": Result(HEADER, CROSSING_ROWS)}, "fp16") == []
    assert crossing.crossings({}, "fp16") == []


@pytest.mark.parametrize("method", methods.SPARSE)
def test_models_predict_less_time_of_more_zeros(method: str) -> None:
    problem = replace(crossing.SHAPES["googlenet", "inception_3b/5x5"], precision="fp16")
    filters = [suite.random_filter(problem, sparsity, 0) for sparsity in (0.5, 0.8, 0.98)]
    for memory_format in ("contiguous", "channels_last"):
        problem = replace(problem, device="cuda:0", memory_format=memory_format)
        times = [by_name(method, "cuda").predict_us(problem, sparse_filter, H200) for sparse_filter in filters]
        assert times == sorted(times, reverse=True) and times[-1] < times[0]


def test_models_are_of_the_config_that_a_search_puts_first() -> None:
    problem = replace(crossing.SHAPES["googlenet", "inception_3b/5x5"], precision="fp16")
    sparse_filter = suite.random_filter(problem, 0.9, 0)
    (first,) = search(problem, sparse_filter, H200, 1)
    generated = by_name("generated", "cuda")
    least = generated.predict_us(problem, sparse_filter, H200)
    assert least == generated.predict_us(problem, sparse_filter, H200, first)


def test_the_time_measured_of_direct_by_the_time_predicted() -> None:
    times = {"conv3": 100.0, "conv4": 50.0}
    rows = [row("caffenet", layer, "direct", slower * us) for layer, us in times.items() for slower in (1.0, 3.0)]
    result = Result(ON_H200, [*rows, *CROSSING_ROWS])
    layers = {layer.name: layer for layer in suite.paper_layers(None, 3)}
    clocks = [
        predicted_clocks(layers[name].problem, layers[name].sparse_filter, H200, False, None) for name in times
    ]  # at 1980 MHz
    expected = [us / (predicted / 1980.0) for us, predicted in zip(times.values(), clocks, strict=True)]
    assert crossing.direct_factors(result, "fp32") == pytest.approx(expected)
    assert crossing.direct_factors(Result(HEADER, rows), "fp32") == []


def test_the_crossing_table_and_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = crossing.SHAPES["resnet50", "res2b_branch2b"]
    least = {"direct": math.inf, "generated": 0.751, "sparse_tc": -math.inf}
    monkeypatch.setattr(
        crossing, "crossings", lambda results, precision: [crossing.Crossing(problem, "NCHW", 51.27, least)]
    )
    monkeypatch.setattr(crossing, "direct_factors", lambda result, precision: [1.0, 1.5, 3.0])
    table = exhibits.tables(everything())["crossing-fp16"]
    (line,) = cells(table)
    assert (line["Convolution"], line["Samples"], line["cudnn µs"]) == ("64->64 3x3, 56x56", "32", "51.3")
    assert [line[method] for method in least] == ["never", "75%", "below 50%"]
    assert "counts 1.50 times" in table.caption and "channels_last" not in table.caption
    pytest.importorskip("matplotlib")
    (plot,) = exhibits.illustrations(
        "![a](crossing-fp16-plot.svg) ![b](logo.svg) [c](break-even.svg)", everything()
    ).values()
    assert "64->64 3x3, 56x56, 32 samples, NCHW: direct -, generated 75.1, sparse_tc 50" in plot.description
