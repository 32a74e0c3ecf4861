"""Tables and plots: what they say of rows that are made up here, and how they get into documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

import pytest

from benchmarks import exhibits, findings, suite
from benchmarks.findings import break_even
from benchmarks.paper_layers import PAPER_LAYERS
from benchmarks.result_files import Result, read_results
from benchmarks.suite import Row
from escort import report
from escort.cuda.gpu import H200
from escort.methods.cuda.generated import Generated, GeneratedConfig
from escort.methods.cuda.generated.search import search

HEADER = {
    "device": "cuda",
    "gpu": "a GPU",
    "driver": "580",
    "versions": {"torch": "2.13.0"},
    "date": "2026-11-21",
    "commit": "abc",
    "command": "escort",
}
ON_H200 = {**HEADER, "gpu": "NVIDIA H200", "study": {"seed": 3}}


def row(
    network: str, layer: str, method: str, time_us: float, *, config: Mapping[str, Any] | None = None, **about: Any
) -> Row:
    entry = next((e for e in PAPER_LAYERS if e.network == network), None)
    defaults = {"weights": "paper", "batch": entry.batch if entry else 1, "dtype": "fp32"}
    return Row(
        network=network,
        layer=layer,
        method=method,
        time_us=time_us,
        config=dict(config or {}),
        rel_error=0.0,
        **{**defaults, **about},
    )


CONFIGS = (GeneratedConfig(32, 13, 3, 8), GeneratedConfig(64, 20, 4, 8))
PLAIN = {"unfold": "by_image", "product": "by_group"}


def layer_rows(network: str, **times: float) -> list[Row]:
    """Every layer of a network with the same time for each method, and a slower configuration besides."""
    return [
        row(network, entry.layer, method, time_us * slower, config=PLAIN)
        for entry in PAPER_LAYERS
        if entry.network == network
        for method, time_us in times.items()
        for slower in (3.0, 1.0)
    ]


def results(**rows: list[Row]) -> dict[str, Result]:
    return {name.replace("_", "-"): Result(HEADER, found) for name, found in rows.items()}


def cells(table: report.Table) -> list[dict[str, str]]:
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


def test_totals_sum_each_methods_best() -> None:
    (total,) = findings.totals(layer_rows("caffenet", direct=10.0, cudnn=15.0))
    assert (total.network, total.batch, total.layers, total.published) == ("caffenet", 128, 4, 4)
    assert total.times == {"direct": 40.0, "cudnn": 60.0}
    assert total.ratio("cudnn") == 1.5 and total.ratio("cublas") is None


def test_a_method_that_missed_a_layer_has_no_total() -> None:
    rows = [r for r in layer_rows("caffenet", direct=10.0, cudnn=15.0) if (r.layer, r.method) != ("conv5", "cudnn")]
    (total,) = findings.totals(rows)
    assert total.times == {"direct": 40.0} and total.ratio("cudnn") is None


def test_totals_of_the_sparsest_layers() -> None:
    (total,) = findings.totals(layer_rows("resnet50", direct=1.0), least_sparsity=0.96)
    assert total.layers == total.published == 9  # res4 and res5


def test_wins_count_layers() -> None:
    rows = layer_rows("caffenet", direct=10.0, cudnn=5.0) + layer_rows("resnet50", direct=10.0, cudnn=20.0)
    (line,) = cells(exhibits.tables(results(layers_fp16=rows))["wins"])
    assert (line["Against"], line["Layers won"]) == ("cudnn", "16 of 20")
    assert (line["Least"], line["Most"], line["Geometric mean"]) == ("0.50x", "2.00x", "1.52x")  # 2 ** (12 / 20)


def test_the_tables_of_direct_have_no_other_sparse_method_for_a_rival() -> None:
    rows = layer_rows("caffenet", direct=10.0, generated=5.0, cudnn=20.0)
    there = exhibits.tables(results(layers_fp32=rows))
    for name in ("totals", "layers-fp32"):
        assert [c for c in there[name].columns if c.startswith("vs ")] == ["vs cudnn"]
        assert all(line["vs cudnn"] == "2.00x" for line in cells(there[name]))
    assert [line["Against"] for line in cells(there["wins"])] == ["cudnn"]


def test_aims_of_sparse_methods_are_geometric_means_over_layers() -> None:
    rows = layer_rows("caffenet", direct=10.0, generated=8.0, cudnn=16.0)
    rows = [r for r in rows if r.layer != "conv5"]  # gains 2x thrice, and 32x on this one, where direct is the faster
    times = {"direct": 0.5, "generated": 1.0, "cudnn": 16.0}
    rows += [row("caffenet", "conv5", method, time_us) for method, time_us in times.items()]
    half = layer_rows("resnet50", direct=5.0, cudnn=4.0) + layer_rows("caffenet", generated=5.0, cudnn=10.0)
    found = results(layers_fp32=rows, layers_fp16=half, layers_tf32=layer_rows("googlenet", direct=1.0, cudnn=1.2))
    table = {(line["Against"], line["Network"]): line for line in cells(exhibits.tables(found)["sparse-aims"])}
    mixed = table["cuDNN strict fp32", "caffenet"]
    assert [mixed[name] for name in ("Layers", "Measured", "Reached", "Layers won", "Ratio of sums")] == [
        "4",
        "4.00x",  # (2 * 2 * 2 * 32) ** (1 / 4)
        "floor",
        "4 of 4",
        "2.61x",  # 64 / 24.5
    ]
    assert (
        table["cuDNN fp16", "caffenet"]["Reached"] == "goal" and table["cuDNN TF32", "googlenet"]["Reached"] == "floor"
    )
    assert (table["cuDNN fp16", "resnet50"]["Reached"], table["cuDNN fp16", "resnet50"]["Layers won"]) == (
        "no",
        "0 of 16",
    )
    assert table["cuDNN TF32", "caffenet"]["Reached"] == "not measured"


@pytest.mark.parametrize("lost", ["generated", "cudnn"])
def test_aims_of_sparse_methods_need_every_layer(lost: str) -> None:
    rows = layer_rows("caffenet", generated=1.0, cudnn=16.0)
    assert findings.against_cudnn(rows, "caffenet") == [(16.0, 1.0)] * 4
    assert findings.against_cudnn([r for r in rows if (r.layer, r.method) != ("conv5", lost)], "caffenet") == []
    assert findings.against_cudnn([Row(**{**vars(r), "batch": 8}) for r in rows], "caffenet") == []


def test_aims_may_be_about_layers_of_all_networks_within_some_sparsities() -> None:
    times = {"generated": 1.0, "sparse_tc": 0.5, "cudnn": 1.0}
    rows = [r for name in ("caffenet", "googlenet", "resnet50") for r in layer_rows(name, **times)]
    found = findings.against_cudnn(rows, "all", (0.75, 0.92))
    assert found == [(1.0, 0.5)] * sum(0.75 <= entry.sparsity <= 0.92 for entry in PAPER_LAYERS) and len(found) == 19
    table = {line["Against"]: line for line in cells(exhibits.tables(results(layers_fp16=rows))["sparse-aims"])}
    line = table["cuDNN fp16, layers of 75 to 92 %"]
    assert (line["Network"], line["Layers"], line["Measured"], line["Reached"]) == ("all", "19", "2.00x", "goal")
    without = [r for r in rows if (r.layer, r.method) != ("conv5", "cudnn")]
    assert findings.against_cudnn(without, "all", (0.75, 0.92)) == [], "not all of them are there"


def test_aims_on_real_patterns_count_the_layers_they_are_about() -> None:
    aim, *_, other = findings.PATTERN_AIMS
    names = [f"module{i}_conv2d_2" for i in range(aim.count - 1)] + ["module8_0_module3_1_conv2d_0"]
    rows = [
        row("resnet50", name, method, time_us, weights=weights, batch=128)
        for name in (*names, "conv2d_26")
        for weights, sparse_us in ((aim.weights, 2.0), (other.weights, 1.0))
        for method, time_us in (("direct", 9.0), ("generated", sparse_us), ("cudnn", 6.0))
    ]
    assert findings.against_cudnn_on_patterns(rows, aim) == [(6.0, 2.0)] * aim.count
    assert findings.against_cudnn_on_patterns(rows, other) == [], "not all of its layers are there"
    table = cells(exhibits.tables(results(patterns_fp32=rows))["pattern-aims"])
    assert [line["Reached"] for line in table] == ["floor", *["not measured"] * 9]
    assert table[0]["Measured"] == "3.00x"
    (first, *_) = cells(exhibits.tables(results(patterns_fp32=rows))["patterns-fp32"])
    assert (first["Fastest"], first["vs cudnn"], first["Patterns"]) == ("generated", "3.00x", aim.weights)


def test_the_real_work_of_a_layer() -> None:
    # 384 filters of 256 channels and 3x3 taps, 93.1 % of them zeros, on 13x13 positions of 2 images
    nonzeros = round((1.0 - findings.LAYERS["caffenet", "conv3"].sparsity) * 384 * 256 * 9)
    assert findings.flop("caffenet", "conv3", 2) == 2 * nonzeros * 2 * 13 * 13
    (layer,) = (layer for layer in suite.paper_layers(2) if layer.name == "conv2")
    assert findings.flop("caffenet", "conv2", 2) == 2 * layer.filter.nnz * 2 * 27 * 27


def test_the_fastest_sparse_method_per_layer() -> None:
    peak_us = {layer: findings.flop("caffenet", layer, 128) / 67e6 for layer in ("conv2", "conv3", "conv4", "conv5")}
    rows = [row("caffenet", layer, "direct", 4 * time_us) for layer, time_us in peak_us.items()]
    first, second = map(asdict, CONFIGS)
    rows += [row("caffenet", "conv2", "generated", 3 * peak_us["conv2"], config=first)]
    rows += [row("caffenet", "conv2", "generated", 2 * peak_us["conv2"], config=second)]
    rows += [row("caffenet", "conv3", "generated", 5 * peak_us["conv3"], config=first)]
    rows += [row("caffenet", "conv2", "cudnn", peak_us["conv2"])]
    shown = exhibits.tables({"layers-fp32": Result(ON_H200, rows)})["sparse-layers-fp32"]
    lines = [[line[name] for name in ("Layer", "Fastest", "vs cudnn", "FMA peak")] for line in cells(shown)]
    assert lines[:2] == [["conv2", "generated", "0.50x", "50%"], ["conv3", "direct", "-", "25%"]]
    assert "at most 50.0%, caffenet conv2." in shown.caption
    assert "92 % zeros or less: 25.0%." in shown.caption  # conv2, conv4, conv5; conv3 has more
    elsewhere = exhibits.tables(results(layers_fp32=rows))["sparse-layers-fp32"]
    assert "FMA peak" not in elsewhere.columns and not elsewhere.caption


def test_the_floor_of_direct_is_a_quarter_of_the_peak() -> None:
    half = findings.flop("caffenet", "conv2", 128) / 134e6
    found = {"layers-fp16": Result(ON_H200, [row("caffenet", "conv2", "direct", 8 * half)])}
    (line,) = cells(exhibits.tables(found)["floor"])
    assert line["fp16 of the floor"] == "50%"
    assert "floor" not in exhibits.tables(results(layers_fp16=found["layers-fp16"].rows))


def generated_rows(layer: str, times: Sequence[float]) -> list[Row]:
    """One per config, in their order, with what results may say besides."""
    return [
        row("resnet50", layer, "generated", time_us, config={**asdict(config), "timer": "events"})
        for config, time_us in zip(CONFIGS, times, strict=True)
    ]


def test_predictions_are_of_the_layers_that_were_measured() -> None:
    rows = generated_rows("res2a_branch2b", (10.0, 20.0))
    (found,) = findings.predictions(Result(ON_H200, [*rows, *layer_rows("resnet50", direct=1.0)]))
    (layer,) = (layer for layer in suite.paper_layers(None, 3) if layer.name == "res2a_branch2b")
    expected = [Generated().predict_us(layer.problem, layer.filter, H200, config) for config in CONFIGS]
    assert found.timings == ((expected[0], 10.0), (expected[1], 20.0)) and expected[0] != expected[1]
    assert findings.predictions(Result(HEADER, rows)) == []


def test_costs_and_errors_of_predictions() -> None:
    layer = findings.Predicted(((12.0, 15.0), (8.0, 10.0), (9.0, 5.0)))
    assert layer.errors == pytest.approx([0.2, 0.2, 0.8])
    assert (layer.first_cost, layer.tried_cost) == (2.0, 3.0)


def test_the_prediction_table(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [findings.Predicted(((11.0, 10.0), (30.0, 20.0))), findings.Predicted(((6.0, 8.0), (5.0, 2.0)))]
    monkeypatch.setattr(findings, "predictions", lambda result: layers)
    found = {f"layers-{dtype}": Result(ON_H200, []) for dtype in ("fp32", "tf32")}
    (line,) = cells(exhibits.tables(found)["prediction"])  # errors 0.1, 0.5, 0.25 and 1.5
    assert [line[name] for name in ("Precision", "Timings", "Median error")] == ["fp32", "4", "37.5%"]
    assert line["90th percentile"] == "120.0%"
    assert (line["Ranked first"], line["Tried first"]) == ("1.00x, at worst 1.00x", "2.00x, at worst 4.00x")


FORECAST_ROWS = [
    row("resnet50", "res2b_branch2b", "cudnn", 30.0, config={"output": "contiguous"}),
    row("resnet50", "res2b_branch2b", "cudnn", 20.0, config={"output": "as_is"}),
]


def falling(at_none: float) -> findings.Model:
    """A model whose time falls in proportion to the zeros."""
    return lambda problem, sparse_filter, gpu: at_none * (1.0 - sparse_filter.sparsity)


def test_forecasts_are_where_models_cross_the_time_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    always, never = (lambda *_: 1.0), (lambda *_: 100.0)
    models = {"direct": (falling(200e3),), "generated": (falling(100.0),), "sparse_tc": (never, always)}
    monkeypatch.setattr(findings, "MODELS", models)
    monkeypatch.setattr(findings, "direct_mhz", lambda result, dtype: [1000.0, 1500.0, 9000.0])
    other = [row("resnet50", "res2b_branch2b", "cudnn", 1.0, batch=1), row("caffenet", "conv3", "cudnn", 1.0)]
    found = findings.forecasts({"layers-fp16": Result(ON_H200, [*FORECAST_ROWS, *other])}, "fp16")
    assert [(f.layout, f.cudnn_us, f.problem.precision) for f in found] == [
        ("NCHW", 30.0, "fp16"),
        ("any", 20.0, "fp16"),
    ]
    nchw, best = (f.least for f in found)
    assert nchw == {
        "direct": pytest.approx(0.775, abs=0.01),
        "generated": pytest.approx(0.7, abs=0.01),
        "sparse_tc": math.inf,
    }
    assert best["direct"] > nchw["direct"] and best["generated"] == pytest.approx(0.8, abs=0.01)
    assert best["sparse_tc"] == -math.inf


def test_forecasts_are_of_what_was_timed_and_of_known_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MODELS", {name: (falling(100.0),) for name in findings.SPARSE})
    pointwise = row("resnet50", "module9_1_module0_1_conv2d_0", "cudnn", 20.0, weights="95", batch=128)
    (found,) = findings.forecasts({"patterns-fp32": Result(ON_H200, [pointwise])}, "fp32")
    assert (found.problem.in_channels, found.problem.kernel_size, found.layout) == (1024, (1, 1), "NCHW")
    assert list(found.least) == ["generated"], (
        "without timings of direct its clocks say nothing, and no fp32 on tensors"
    )
    assert findings.forecasts({"layers-fp16": Result(HEADER, FORECAST_ROWS)}, "fp16") == []
    assert findings.forecasts({}, "fp16") == []


@pytest.mark.parametrize("method", findings.SPARSE)
def test_models_predict_less_time_of_more_zeros(method: str) -> None:
    problem = replace(findings.SHAPES["googlenet", "inception_3b/5x5"], precision="fp16")
    filters = [suite.random_filter(problem, sparsity, 0) for sparsity in (0.5, 0.8, 0.98)]
    for model in findings.MODELS[method]:
        times = [model(problem, sparse_filter, H200) for sparse_filter in filters]
        assert times == sorted(times, reverse=True) and times[-1] < times[0]


def test_models_are_of_the_config_that_a_search_puts_first() -> None:
    problem = replace(findings.SHAPES["googlenet", "inception_3b/5x5"], precision="fp16")
    sparse_filter = suite.random_filter(problem, 0.9, 0)
    (first,) = search(problem, sparse_filter, H200, 1)
    assert findings.MODELS["generated"][0](problem, sparse_filter, H200) == Generated().predict_us(
        problem, sparse_filter, H200, first
    )


def test_the_clocks_of_direct_per_time_measured() -> None:
    times = {"conv3": 100.0, "conv4": 50.0}
    rows = [row("caffenet", layer, "direct", slower * us) for layer, us in times.items() for slower in (1.0, 3.0)]
    found = Result(ON_H200, [*rows, *FORECAST_ROWS])
    layers = {layer.name: layer for layer in suite.paper_layers(None, 3)}
    expected = [findings.MODELS["direct"][0](layers[n].problem, layers[n].filter, H200) / us for n, us in times.items()]
    assert findings.direct_mhz(found, "fp32") == expected
    assert findings.direct_mhz(Result(HEADER, rows), "fp32") == []


def test_the_forecast_table_and_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = findings.SHAPES["resnet50", "res2b_branch2b"]
    least = {"direct": math.inf, "generated": 0.751, "sparse_tc": -math.inf}
    monkeypatch.setattr(
        findings, "forecasts", lambda results, dtype: [findings.Forecast(problem, "NCHW", 51.27, least)]
    )
    monkeypatch.setattr(findings, "direct_mhz", lambda result, dtype: [1000.0, 1500.0, 3000.0])
    table = exhibits.tables(everything())["forecast-fp16"]
    (line,) = cells(table)
    assert (line["Convolution"], line["Images"], line["cudnn µs"]) == ("64->64 3x3, 56x56", "32", "51.3")
    assert [line[method] for method in least] == ["never", "75%", "below 50%"]
    assert "1.50 GHz" in table.caption and "channels_last" not in table.caption
    pytest.importorskip("matplotlib")
    (plot,) = exhibits.illustrations(
        "![a](forecast-fp16-plot.svg) ![b](logo.svg) [c](break-even.svg)", everything()
    ).values()
    assert "64->64 3x3, 56x56, 32 images, NCHW: direct -, generated 75.1, sparse_tc 50" in plot.description


def test_aims_are_judged_by_the_rows() -> None:
    rows = layer_rows("caffenet", direct=10.0, cublas=60.0, cudnn=11.0) + layer_rows("resnet50", direct=1.0, cublas=9.0)
    table = cells(exhibits.tables(results(layers_fp32=rows))["aims"])
    reached = {(line["Against"], line["Network"]): (line["Measured"], line["Reached"]) for line in table}
    assert reached["cuBLAS lowering", "caffenet"] == ("6.00x", "yes")
    assert reached["cuDNN strict fp32", "caffenet"] == ("1.10x", "no")
    assert reached["cuBLAS lowering", "resnet50"] == ("9.00x", "yes")
    assert reached["cuSPARSE lowering", "caffenet"] == ("-", "not measured")
    assert reached["cuBLAS lowering", "googlenet"] == ("-", "not measured")
    assert reached["cuDNN, layers of at least 96 %", "resnet50"] == ("-", "not measured")


def test_aims_are_about_the_papers_lowering_and_show_the_fastest() -> None:
    rows = layer_rows("caffenet", direct=10.0, cublas=60.0)
    rows += [row("caffenet", r.layer, "cublas", 20.0, config={"unfold": "at_once"}) for r in rows]
    line = cells(exhibits.tables(results(layers_fp32=rows))["aims"])[0]
    assert (line["Measured"], line["Reached"], line["Fastest variant"]) == ("6.00x", "yes", "2.00x")


def test_aims_are_for_gpus() -> None:
    on_cpu = {"layers-fp32": Result({"device": "cpu"}, layer_rows("caffenet", direct=10.0, dense=60.0))}
    assert "aims" not in exhibits.tables(on_cpu) and "totals" in exhibits.tables(on_cpu)


@pytest.mark.parametrize("change", [{"batch": 8}, {"layer": "conv9"}])
def test_aims_need_every_layer_at_the_papers_batch(change: dict[str, Any]) -> None:
    rows = layer_rows("caffenet", direct=10.0, cublas=60.0)
    rows = [Row(**{**vars(r), **change}) if r.layer == "conv5" or "batch" in change else r for r in rows]
    table = cells(exhibits.tables(results(layers_fp32=rows))["aims"])
    assert table[0]["Reached"] == "not measured"


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


def curve(network: str, layer: str, ours: str, theirs: str, gains: Mapping[float, float], **about: Any) -> list[Row]:
    return [
        row(network, layer, method, time_us, weights=findings.random_weights(sparsity), **about)
        for sparsity, gain in gains.items()
        for method, time_us in ((ours, 100.0), (theirs, 100.0 * gain))
    ]


def test_the_break_even_table() -> None:
    rows = [
        *curve("resnet50", "res2a_branch2b", "direct", "cudnn", {0.7: 0.5, 0.9: 2.0}),
        *curve("resnet50", "res3a_branch2b", "direct", "cudnn", {0.7: 1.5, 0.9: 2.0}),
        *curve("resnet50", "res4a_branch2b", "direct", "cudnn", {0.7: 0.5, 0.9: 0.9}),
    ]
    shown = exhibits.tables(results(break_even_fp32=rows, break_even_fp16=rows[:4]))["break-even"]
    assert [(line["fp32"], line["fp16"]) for line in cells(shown)] == [
        ("80%", "80%"),
        ("below 70%", "-"),
        ("above 90%", "-"),
    ]
    assert cells(shown)[0]["Convolution"] == "64->64 3x3, 56x56" and cells(shown)[0]["Zeros in the paper"] == "88.0%"


def test_the_network_table() -> None:
    rows = curve("resnet50", "all", "escort", "eager", {0.9: 2.0, 0.7: 0.5})
    rows += curve("resnet50", "all", "escort", "graph", {0.9: 1.6, 0.7: 0.4})
    (low, high) = cells(shown := exhibits.tables(results(networks_fp32=rows))["networks-fp32"])
    assert (low["Zeros"], low["vs eager"], high["Zeros"], high["vs graph"]) == ("70%", "0.50x", "90%", "1.60x")
    assert high["escort ms"] == "0.10" and "resnet50 83%" in shown.caption


def test_the_breakdown_sums() -> None:
    def parts(layer: str, method: str, weights: str = "paper", **times: float) -> list[Row]:
        return [
            row("caffenet", layer, method, time_us, config={"unfold": "x", "part": part}, weights=weights)
            for part, time_us in times.items()
        ]

    rows = parts("conv2", "cublas", im2col=60.0, product=30.0, other=10.0)
    rows += parts("conv3", "cublas", im2col=60.0, product=30.0, other=10.0)
    rows += parts("all", "escort", "random-0.90", direct=5.0)
    layers, whole = cells(exhibits.tables(results(breakdown_fp32=rows))["breakdown-fp32"])
    assert (layers["im2col µs"], layers["other µs"], layers["direct µs"]) == ("120 (60%)", "20.0 (10%)", "-")
    assert layers["Sum µs"] == "200" and layers["Convolutions"] == "pruned layers"
    assert whole["direct µs"] == "5.0 (100%)" and whole["Convolutions"] == "all, 90% zeros"


def test_the_ablation_tables() -> None:
    def changed(layer: str, time_us: float, **config: Any) -> Row:
        return row("resnet50", layer, "direct", time_us, config={"words": 7, "stages": 4, "balanced": True, **config})

    rows = [
        changed("res2a_branch2b", 10.0),
        changed("res2a_branch2b", 20.0, words=1),
        changed("res2a_branch2b", 12.0, words=14),
        changed("res2a_branch2b", 11.0, balanced=False),
        changed("res3a_branch2b", 10.0),
        changed("res3a_branch2b", 80.0, words=1),
    ]
    there = exhibits.tables(results(ablation_fp32=rows))
    words, balanced = cells(there["ablation-fp32"])
    assert (words["Field"], words["Layers"], words["Worst other value"]) == ("words", "2", "4.00x")  # sqrt(2 * 8)
    assert words["Most"] == "8.00x, resnet50 res3a_branch2b"
    assert (balanced["Field"], balanced["Best other value"]) == ("balanced", "1.10x")
    every = cells(there["ablation-fp32-all"])
    assert len(every) == 4
    assert [every[0][name] for name in ("Field", "Chosen", "Instead", "Time")] == ["balanced", "True", "False", "1.10x"]


def test_the_counter_table() -> None:
    counts = {"smsp__inst_executed.sum": 1234567.0, "launch__registers_per_thread": 96.0}
    rows = [row("resnet50", "res4a_branch2b", "direct", 26.4, config={"words": 7, "counters": counts})]
    (line,) = cells(exhibits.tables(results(counters_fp32=rows))["counters-fp32"])
    assert (line["instructions"], line["registers"], line["DRAM %"]) == ("1,234,567", "96", "-")


def everything() -> dict[str, Result]:
    networks = curve("resnet50", "all", "escort", "eager", {0.7: 0.5, 0.9: 2.0})
    layers = {
        "layers-fp32": Result(ON_H200, [*layer_rows("caffenet", direct=10.0, cublas=60.0), *FORECAST_ROWS]),
        "layers-tf32": Result(ON_H200, layer_rows("caffenet", generated=10.0)),
        "layers-fp16": Result(ON_H200, [*layer_rows("caffenet", direct=10.0, cudnn=5.0), *FORECAST_ROWS]),
    }
    return layers | results(
        ablation_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"words": words}) for words in (7, 1)],
        counters_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"counters": {}})],
        break_even_fp32=curve("resnet50", "res2a_branch2b", "direct", "cudnn", {0.7: 0.5, 0.9: 0.9}),
        networks_fp32=networks,
        networks_tf32=networks,
        networks_fp16=networks,
        breakdown_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"part": "direct"})],
        patterns_fp32=[row("resnet50", "conv2d_4", "direct", 5.0, weights="resnet50_magnitude_90", batch=128)],
    )


def test_plots_have_a_name_each_and_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = exhibits.plots(everything())
    both = {f"speedup-caffenet-{dtype}" for dtype in ("fp32", "fp16")}
    both |= {f"network-resnet50-{dtype}" for dtype in ("fp32", "tf32", "fp16")}
    both |= {f"forecast-{dtype}-plot" for dtype in ("fp32", "fp16")}
    assert set(plots) == {*both, "sparse-caffenet-fp16", "break-even-plot", "breakdown-fp32-plot"}
    for name, plot in plots.items():
        report.write_svg(tmp_path / f"{name}.svg", plot)
    svg = (tmp_path / "speedup-caffenet-fp32.svg").read_text()
    assert svg.startswith("<svg") and "conv5" in svg and "var(" not in svg and "currentColor" not in svg


DOCUMENT = """# A report

Before.

<!-- table: totals -->
what was here
<!-- end -->

Between.

<!-- table: networks-fp32 -->
<!-- end -->
"""


def test_documents_get_their_tables_and_keep_their_prose() -> None:
    once = exhibits.render(DOCUMENT, everything())
    assert "what was here" not in once and "| caffenet | fp32 | 128 | 4 | 40.0 | 240 | - | 6.00x | - |" in once
    assert once.startswith("# A report\n\nBefore.\n\n<!-- table: totals -->\n\n|") and "\n\nBetween.\n\n" in once
    assert exhibits.render(once, everything()) == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Nothing to fill\n", "no place for a table"),
        ("<!-- table: totals -->\n", "the place of table totals does not end"),
        ("<!-- table: totals -->\n<!-- table: aims -->\n<!-- end -->\n", "line 2: table aims begins before"),
        ("a\n<!-- table: total -->\n<!-- end -->\n", "line 2: the results hold no table total; there are .*totals"),
        ("<!-- end -->\n<!-- table: totals -->\n<!-- end -->\n", "line 1: <!-- end --> ends nothing"),
    ],
)
def test_documents_without_proper_places(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exhibits.render(text, everything())


def test_files_are_read_back_as_written(tmp_path: Path) -> None:
    rows = layer_rows("caffenet", direct=10.0)
    suite.write_results(tmp_path / "layers-fp16.json", HEADER, rows)
    (tmp_path / "another.json").write_text("not ours")
    assert read_results(tmp_path) == {"layers-fp16": Result(HEADER, rows)}
    (line,) = cells(exhibits.tables(read_results(tmp_path))["conditions"])
    assert (line["File"], line["Device"], line["Command"]) == ("layers-fp16", "a GPU, driver 580", "`escort`")


@pytest.mark.parametrize("text", ["", "{", '{"header": {}}', '{"header": {}, "rows": [{"layer": "a"}]}'])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "layers-fp32.json").write_text(text)
    with pytest.raises(ValueError, match=r"layers-fp32\.json is not a result file"):
        read_results(tmp_path)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results of a study"):
        read_results(tmp_path)


ROOT = Path(__file__).parents[1]
REPORTS = [ROOT / "docs/paper.md", ROOT / "docs/performance.md"]
RESULTS = ROOT / "benchmarks/results/h200"


@pytest.mark.parametrize("document", REPORTS, ids=lambda path: path.name)
def test_the_reports_name_tables_that_there_are(document: Path) -> None:
    text = document.read_text()
    assert exhibits.render(text, everything()).count("\n|") > text.count("<!-- table:")


@pytest.mark.parametrize("document", REPORTS, ids=lambda path: path.name)
@pytest.mark.skipif(not [*RESULTS.glob("layers-*.json")], reason="no results of a GPU are committed")
def test_the_reports_hold_the_committed_results(document: Path) -> None:
    assert exhibits.render(document.read_text(), read_results(RESULTS)) == document.read_text()


@pytest.mark.parametrize("document", REPORTS, ids=lambda path: path.name)
@pytest.mark.skipif(not [*RESULTS.glob("layers-*.json")], reason="no results of a GPU are committed")
def test_the_plots_in_the_reports_are_of_the_committed_results(document: Path, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    for name, plot in exhibits.illustrations(document.read_text(), read_results(RESULTS)).items():
        there = (document.parent / f"{name}.svg").read_text()
        assert escape(plot.description) in there
        # Other releases may place things otherwise.
        if f"matplotlib=={matplotlib.__version__}\n" in (ROOT / "constraints.txt").read_text():
            report.write_svg(tmp_path / "drawn.svg", plot)
            assert (tmp_path / "drawn.svg").read_text() == there
