"""What findings say of rows that are made up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import pytest

from benchmarks import suite
from benchmarks.findings import layers, prediction
from benchmarks.findings.break_even import break_even, random_weights, sparsity_of
from benchmarks.paper_layers import LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort.cuda.gpu import H200
from tests.benchmarks.made_up import (
    CONFIGS,
    GENERATED,
    HEADER,
    ON_H200,
    layer_rows,
    row,
)


@pytest.mark.parametrize("weights", [random_weights(0.9), "random-0.90-dense-depthwise"])
def test_the_share_of_zeros_is_read_off_the_weights_name(weights: str) -> None:
    assert sparsity_of(weights) == 0.9


def test_totals_sum_each_methods_best() -> None:
    (total,) = layers.totals(layer_rows("caffenet", direct=10.0, cudnn=15.0))
    assert (total.network, total.batch, total.layers, total.published) == ("caffenet", 128, 4, 4)
    assert total.times == {"direct": 40.0, "cudnn": 60.0}
    assert total.ratio("cudnn") == 1.5 and total.ratio("cublas") is None


def test_a_method_that_missed_a_layer_has_no_total() -> None:
    rows = [r for r in layer_rows("caffenet", direct=10.0, cudnn=15.0) if (r.layer, r.method) != ("conv5", "cudnn")]
    (total,) = layers.totals(rows)
    assert total.times == {"direct": 40.0} and total.ratio("cudnn") is None


def test_totals_of_the_sparsest_layers() -> None:
    (total,) = layers.totals(layer_rows("resnet50", direct=1.0), least_sparsity=0.96)
    assert total.layers == total.published == 9  # res4 and res5


@pytest.mark.parametrize("lost", ["generated", "cudnn"])
def test_aims_of_sparse_methods_need_every_layer(lost: str) -> None:
    rows = layer_rows("caffenet", generated=1.0, cudnn=16.0)
    assert layers.against_cudnn(rows, "caffenet") == [(16.0, 1.0)] * 4
    assert layers.against_cudnn([r for r in rows if (r.layer, r.method) != ("conv5", lost)], "caffenet") == []
    assert layers.against_cudnn([Row(**{**vars(r), "batch": 8}) for r in rows], "caffenet") == []


def test_the_real_work_of_a_layer() -> None:
    # 384 filters of 256 channels and 3x3 taps, 93.1 % of them zeros, on 13x13 positions of 2 samples
    nonzeros = round((1.0 - LAYERS["caffenet", "conv3"].sparsity) * 384 * 256 * 9)
    assert layers.flop("caffenet", "conv3", 2) == 2 * nonzeros * 2 * 13 * 13
    (layer,) = (layer for layer in suite.paper_layers(2) if layer.name == "conv2")
    assert layers.flop("caffenet", "conv2", 2) == 2 * layer.sparse_filter.nnz * 2 * 27 * 27


def generated_rows(layer: str, times: Sequence[float]) -> list[Row]:
    """One per config, in their order, with what results may say besides."""
    return [
        row("resnet50", layer, "generated", time_us, config={**asdict(config), "timer": "events"})
        for config, time_us in zip(CONFIGS, times, strict=True)
    ]


def test_predictions_are_of_the_layers_that_were_measured() -> None:
    rows = generated_rows("res2a_branch2b", (10.0, 20.0))
    (predicted,) = prediction.predictions(Result(ON_H200, [*rows, *layer_rows("resnet50", direct=1.0)]))
    (layer,) = (layer for layer in suite.paper_layers(None, 3) if layer.name == "res2a_branch2b")
    expected = [GENERATED.predict_us(layer.problem, layer.sparse_filter, H200, config) for config in CONFIGS]
    assert predicted.timings == ((expected[0], 10.0), (expected[1], 20.0)) and expected[0] != expected[1]
    assert prediction.predictions(Result(HEADER, rows)) == []


def test_costs_and_errors_of_predictions() -> None:
    layer = prediction.Predicted(((12.0, 15.0), (8.0, 10.0), (9.0, 5.0)))
    assert layer.errors == pytest.approx([0.2, 0.2, 0.8])
    assert (layer.first_cost, layer.tried_cost) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.7, 2.0, 1.0), (0.9, 1.0, 2.0)], 0.8),
        ([(0.9, 1.0, 2.0), (0.7, 4.0, 1.0)], 0.7 + 0.2 * 2 / 3),
        ([(0.7, 2.0, 1.0), (0.8, 1.0, 1.0), (0.9, 1.0, 2.0)], 0.8),
        ([(0.7, 1.0, 2.0), (0.8, 2.0, 1.0), (0.9, 1.0, 2.0)], 0.85),  # for good only from there
        ([(0.7, 1.0, 2.0), (0.9, 1.0, 3.0)], -math.inf),
        ([(0.7, 2.0, 1.0), (0.9, 2.0, 1.5)], math.inf),
        ([(0.7, 1.0, 2.0), (0.9, 2.0, 1.0)], math.inf),
    ],
)
def test_break_even_lies_where_the_times_cross(points: list[tuple[float, float, float]], expected: float) -> None:
    assert break_even(points) == pytest.approx(expected)


def test_break_even_of_nothing() -> None:
    with pytest.raises(ValueError, match="no times"):
        break_even([])
