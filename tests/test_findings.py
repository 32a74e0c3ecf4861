"""Tables and plots: what they say of rows that are made up here, and how they get into documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from escort import exhibits, findings, report, suite
from escort.findings import break_even
from escort.paper_layers import PAPER_LAYERS
from escort.results import Result, read_results
from escort.suite import Row

HEADER = {
    "device": "cuda",
    "gpu": "a GPU",
    "driver": "580",
    "versions": {"torch": "2.13.0"},
    "date": "2026-11-21",
    "commit": "abc",
    "command": "escort",
}


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
    return results(
        layers_fp32=layer_rows("caffenet", direct=10.0, cublas=60.0),
        layers_fp16=layer_rows("caffenet", direct=10.0, cudnn=5.0),
        ablation_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"words": words}) for words in (7, 1)],
        counters_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"counters": {}})],
        break_even_fp32=curve("resnet50", "res2a_branch2b", "direct", "cudnn", {0.7: 0.5, 0.9: 0.9}),
        networks_fp32=networks,
        networks_fp16=networks,
        breakdown_fp32=[row("caffenet", "conv2", "direct", 5.0, config={"part": "direct"})],
    )


def test_plots_have_a_name_each_and_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = exhibits.plots(everything())
    both = {f"{name}-{dtype}" for name in ("speedup-caffenet", "network-resnet50") for dtype in ("fp32", "fp16")}
    assert set(plots) == {*both, "break-even-plot", "breakdown-fp32-plot"}
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
REPORT, RESULTS = ROOT / "docs/paper.md", ROOT / "benchmarks/results/h200"


def test_the_report_names_tables_that_there_are() -> None:
    text = REPORT.read_text()
    assert exhibits.render(text, everything()).count("\n|") > text.count("<!-- table:")


@pytest.mark.skipif(not [*RESULTS.glob("layers-*.json")], reason="no results of a GPU are committed")
def test_the_report_holds_the_committed_results() -> None:
    assert exhibits.render(REPORT.read_text(), read_results(RESULTS)) == REPORT.read_text()
