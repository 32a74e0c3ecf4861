"""Aims: which rows they are about, and when they are reached."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import exhibits
from benchmarks.findings import layers
from benchmarks.findings.aims import read_aims
from benchmarks.paper_layers import PAPER_LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import Row
from tests.benchmarks.made_up import (
    cells,
    layer_rows,
    results,
    row,
)


def test_aims_of_sparse_methods_are_geometric_means_over_layers() -> None:
    rows = layer_rows("caffenet", direct=10.0, generated=8.0, cudnn=16.0)
    rows = [r for r in rows if r.layer != "conv5"]  # gains 2x thrice, and 32x on this one, where direct is the faster
    times = {"direct": 0.5, "generated": 1.0, "cudnn": 16.0}
    rows += [row("caffenet", "conv5", method, time_us) for method, time_us in times.items()]
    half = layer_rows("resnet50", direct=5.0, cudnn=4.0) + layer_rows("caffenet", generated=5.0, cudnn=10.0)
    measured = results(layers_fp32=rows, layers_fp16=half, layers_tf32=layer_rows("googlenet", direct=1.0, cudnn=1.2))
    table = {(line["Against"], line["Network"]): line for line in cells(exhibits.tables(measured)["sparse-aims"])}
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
    assert ("cuDNN TF32", "caffenet") not in table, "what was not measured is no line"


def test_aims_may_be_about_layers_of_all_networks_within_some_sparsities() -> None:
    times = {"generated": 1.0, "sparse_tc": 0.5, "cudnn": 1.0}
    rows = [r for name in ("caffenet", "googlenet", "resnet50") for r in layer_rows(name, **times)]
    times = layers.against_cudnn(rows, "all", (0.75, 0.92))
    assert times == [(1.0, 0.5)] * sum(0.75 <= entry.sparsity <= 0.92 for entry in PAPER_LAYERS) and len(times) == 19
    table = {line["Against"]: line for line in cells(exhibits.tables(results(layers_fp16=rows))["sparse-aims"])}
    line = table["cuDNN fp16, layers of 75 to 92 %"]
    assert (line["Network"], line["Layers"], line["Measured"], line["Reached"]) == ("all", "19", "2.00x", "goal")
    without = [r for r in rows if (r.layer, r.method) != ("conv5", "cudnn")]
    assert layers.against_cudnn(without, "all", (0.75, 0.92)) == [], "not all of them are there"


def test_aims_on_real_patterns_count_the_layers_they_are_about() -> None:
    aim, *_, other = read_aims().patterns
    names = [f"module{i}_conv2d_2" for i in range(aim.count - 1)] + ["module8_0_module3_1_conv2d_0"]
    rows = [
        row("resnet50", name, method, time_us, weights=weights, batch=128)
        for name in (*names, "conv2d_26")
        for weights, sparse_us in ((aim.weights, 2.0), (other.weights, 1.0))
        for method, time_us in (("direct", 9.0), ("generated", sparse_us), ("cudnn", 6.0))
    ]
    assert layers.against_cudnn_on_patterns(rows, aim) == [(6.0, 2.0)] * aim.count
    assert layers.against_cudnn_on_patterns(rows, other) == [], "not all of its layers are there"
    table = cells(exhibits.tables(results(patterns_fp32=rows))["pattern-aims"])
    assert [line["Reached"] for line in table] == ["floor"]
    assert table[0]["Measured"] == "3.00x"
    (first, *_) = cells(exhibits.tables(results(patterns_fp32=rows))["patterns-fp32"])
    assert (first["Fastest"], first["vs cudnn"], first["Patterns"]) == ("generated", "3.00x", aim.weights)


def test_aims_are_judged_by_the_rows() -> None:
    rows = layer_rows("caffenet", direct=10.0, cublas=60.0, cudnn=11.0) + layer_rows("resnet50", direct=1.0, cublas=9.0)
    table = cells(exhibits.tables(results(layers_fp32=rows))["aims"])
    reached = {(line["Against"], line["Network"]): (line["Measured"], line["Reached"]) for line in table}
    assert reached["cuBLAS lowering", "caffenet"] == ("6.00x", "yes")
    assert reached["cuDNN strict fp32", "caffenet"] == ("1.10x", "no")
    assert reached["cuBLAS lowering", "resnet50"] == ("9.00x", "yes")
    assert len(reached) == 3, "what was not measured is no line"


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
    assert not exhibits.tables(results(layers_fp32=rows))["aims"].rows


def test_whole_networks_are_judged_by_the_paper_and_by_their_cap() -> None:
    def times(network: str, **times_us: float) -> list[Row]:
        return [row(network, "all", method, time_us, timer="graph") for method, time_us in times_us.items()]

    rows = times("caffenet", escort=100.0, cap=90.0, cublas=150.0, cusparse=150.0, cudnn=130.0)
    rows += [row("caffenet", "all", "cublas", 140.0, config={"variant": "torch"})]
    rows += times("resnet50", escort=100.0, cap=80.0, cublas=400.0) + times("googlenet", escort=100.0, cublas=400.0)
    table = cells(exhibits.tables(results(inference_fp32=rows))["inference-fp32"])
    found = {(line["Network"], line["Against"].split()[-2]): line for line in table}
    assert {(name, rival): line["Reached"] for (name, rival), line in found.items()} == {
        ("caffenet", "cuBLAS"): "yes",
        ("caffenet", "cuSPARSE"): "no",  # 1.5x instead of 1.6x
        ("caffenet", "by"): "-",
        ("resnet50", "cuBLAS"): "no",  # 80 % of the cap
    }
    line = found["caffenet", "cuBLAS"]
    assert (line["Gain"], line["Paper"], line["Cap"], line["Of the cap"]) == ("1.40x", "1.38x", "1.56x", "90%")
