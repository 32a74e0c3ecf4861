"""Tables and plots: what they show of rows that are made up."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import exhibits
from benchmarks.findings import layers, prediction
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort import report
from tests.benchmarks.made_up import (
    CONFIGS,
    ON_H200,
    cells,
    curve,
    everything,
    layer_rows,
    results,
    row,
)


def test_wins_count_layers() -> None:
    rows = layer_rows("caffenet", direct=10.0, cudnn=5.0) + layer_rows("resnet50", direct=10.0, cudnn=20.0)
    (line,) = cells(exhibits.tables(results(layers_fp16=rows))["wins"])
    assert (line["Against"], line["Layers won"]) == ("cudnn", "16 of 20")
    assert (line["Least"], line["Most"], line["Geometric mean"]) == ("0.50x", "2.00x", "1.52x")  # 2 ** (12 / 20)


def test_the_tables_of_direct_have_no_other_sparse_method_for_a_rival() -> None:
    rows = layer_rows("caffenet", direct=10.0, generated=5.0, cudnn=20.0)
    tables = exhibits.tables(results(layers_fp32=rows))
    for name in ("totals", "layers-fp32"):
        assert [c for c in tables[name].columns if c.startswith("vs ")] == ["vs cudnn"]
        assert all(line["vs cudnn"] == "2.00x" for line in cells(tables[name]))
    assert [line["Against"] for line in cells(tables["wins"])] == ["cudnn"]


def test_the_fastest_sparse_method_per_layer() -> None:
    peak_us = {layer: layers.flop("caffenet", layer, 128) / 67e6 for layer in ("conv2", "conv3", "conv4", "conv5")}
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
    half = layers.flop("caffenet", "conv2", 128) / 134e6
    measured = {"layers-fp16": Result(ON_H200, [row("caffenet", "conv2", "direct", 8 * half)])}
    (line,) = cells(exhibits.tables(measured)["floor"])
    assert line["fp16 of the floor"] == "50%"
    assert "floor" not in exhibits.tables(results(layers_fp16=measured["layers-fp16"].rows))


def test_the_prediction_table(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [prediction.Predicted(((11.0, 10.0), (30.0, 20.0))), prediction.Predicted(((6.0, 8.0), (5.0, 2.0)))]
    monkeypatch.setattr(prediction, "predictions", lambda result: layers)
    measured = {f"layers-{precision}": Result(ON_H200, []) for precision in ("fp32", "tf32")}
    (line,) = cells(exhibits.tables(measured)["prediction"])  # errors 0.1, 0.5, 0.25 and 1.5
    assert [line[name] for name in ("Precision", "Timings", "Median error")] == ["fp32", "4", "37.5%"]
    assert line["90th percentile"] == "120.0%"
    assert (line["Ranked first"], line["Tried first"]) == ("1.00x, at worst 1.00x", "2.00x, at worst 4.00x")


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
    tables = exhibits.tables(results(ablation_fp32=rows))
    words, balanced = cells(tables["ablation-fp32"])
    assert (words["Field"], words["Layers"], words["Worst other value"]) == ("words", "2", "4.00x")  # sqrt(2 * 8)
    assert words["Most"] == "8.00x, resnet50 res3a_branch2b"
    assert (balanced["Field"], balanced["Best other value"]) == ("balanced", "1.10x")
    every = cells(tables["ablation-fp32-all"])
    assert len(every) == 4
    assert [every[0][name] for name in ("Field", "Chosen", "Instead", "Time")] == ["balanced", "True", "False", "1.10x"]


def test_the_counter_table() -> None:
    counts = {"smsp__inst_executed.sum": 1234567.0, "launch__registers_per_thread": 96.0}
    rows = [row("resnet50", "res4a_branch2b", "direct", 26.4, config={"words": 7, "counters": counts})]
    (line,) = cells(exhibits.tables(results(counters_fp32=rows))["counters-fp32"])
    assert (line["instructions"], line["registers"], line["DRAM %"]) == ("1,234,567", "96", "-")


def test_plots_have_a_name_each_and_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = exhibits.plots(everything())
    both = {f"speedup-caffenet-{precision}" for precision in ("fp32", "fp16")}
    both |= {f"network-resnet50-{precision}" for precision in ("fp32", "tf32", "fp16")}
    both |= {f"crossing-{precision}-plot" for precision in ("fp32", "fp16")}
    assert set(plots) == {*both, "sparse-caffenet-fp16", "break-even-plot", "breakdown-fp32-plot"}
    for name, plot in plots.items():
        report.write_svg(tmp_path / f"{name}.svg", plot)
    svg = (tmp_path / "speedup-caffenet-fp32.svg").read_text()
    assert svg.startswith("<svg") and "conv5" in svg and "var(" not in svg and "currentColor" not in svg
