"""Tables and the plot of committed results: what they show of rows that are made up, and that the files fill them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.exhibits.committed import HEADLINES, committed, committed_exhibits
from benchmarks.result_files import Result
from benchmarks.suite import WHOLE
from escort import report
from tests.benchmarks.made_up import HEADER, cells, layer_rows, row

ON_CPU = {**HEADER, "device": "cpu", "gpu": None, "cpu": "a CPU", "isa": "avx2", "threads": 2, "driver": None}


def made_up() -> dict[str, Result]:
    """For each headline a file in which its gain is its number; files of layers besides."""
    results: dict[str, Result] = {}
    for number, headline in enumerate(HEADLINES, 1):
        header = ON_CPU if headline.file.startswith("cpu") else {**HEADER, "gpu": "NVIDIA X1"}
        rows = results.setdefault(headline.file, Result(header, [])).rows
        about = {"batch": headline.batch}
        for rival, gain in (("compile", float(number)), ("eager", 50.0)):
            for method, time_us in (("escort", 100.0), (rival, 100.0 * gain)):
                rows.append(row(headline.network, WHOLE, method, time_us, weights=headline.weights, **about))
    layers = layer_rows("caffenet", direct=10.0, dense=20.0) + layer_rows("resnet50", direct=10.0, dense=40.0)
    results["cpu/paper"] = Result({**ON_CPU, "commit": "0123456789-dirty"}, layers)
    times = {"direct": 5.0, "dense": 15.0}
    patterns = [row("resnet50", "conv2d_1", name, time_us, weights="p", batch=1) for name, time_us in times.items()]
    results["cpu/patterns"] = Result(ON_CPU, patterns)
    return results


def tables(results: Mapping[str, Result] | None = None) -> dict[str, report.Table]:
    return {name: shown for name, shown, _ in committed_exhibits(results) if isinstance(shown, report.Table)}


def test_headlines_are_against_the_fastest_dense_engine() -> None:
    lines = cells(tables(made_up())["headlines"])
    assert [line["Gain"] for line in lines] == [f"{number:.2f}x" for number in range(1, len(HEADLINES) + 1)]
    assert {line["Fastest dense engine"] for line in lines} == {"`torch.compile`"}
    assert lines[0]["On"] == "a CPU, 2 threads (AVX2), fp32"
    assert lines[3]["On"] == "X1, strict fp32, `effort=10`" and lines[3]["Samples"] == "32"
    assert lines[2]["Network, zeros"] == "ResNet-50, 90%, pattern of a trained one"


def test_layers_on_cpus_are_means_per_network_and_of_all() -> None:
    lines = cells(tables(made_up())["cpu-layers"])
    assert [(line["Network"], line["Layers"]) for line in lines] == [
        ("CaffeNet", "4"),
        ("ResNet-50", "16"),
        ("all", "20"),
        ("ResNet-50", "1"),
    ]
    assert [line["vs dense"] for line in lines] == ["2.00x", "4.00x", "3.48x", "3.00x"]  # 2 ** 0.2 * 4 ** 0.8
    assert [line["Zeros"] for line in lines] == ["86% to 93%", "81% to 98%", "81% to 98%", "-"]
    assert (lines[2]["Least vs dense"], lines[2]["Most vs dense"]) == ("2.00x", "4.00x")


def test_networks_on_cpus_and_what_they_were_measured_on() -> None:
    shown = tables(made_up())
    first, second = cells(shown["cpu-networks"])
    assert (first["Samples"], first["Weights"], first["On"]) == ("1", "random-0.90", "a CPU, 2 threads (AVX2), fp32")
    assert first["Timed"] == "in turn"
    assert first["vs eager"] == "50.00x"
    assert (second["Samples"], second["vs compile"], second["escort ms"]) == ("8", "2.00x", "0.10")
    paper = next(line for line in cells(shown["cpu-conditions"]) if line["File"] == "cpu/paper")
    assert (paper["Device"], paper["Commits"]) == ("a CPU, avx2, 2 threads", "0123456-dirty")


def test_networks_that_are_pruned_as_trained_ones_are_shown() -> None:
    """And no eager torch, where a file has none."""
    lines = [line for line in cells(tables()["cpu-networks"]) if "_magnitude_" in line["Weights"]]
    on = {f"{processor} (AVX-512), fp32" for processor in ("Intel Xeon, 16 threads", "AMD EPYC, 2 threads")}
    assert {line["On"] for line in lines} >= on


def test_the_committed_files_fill_them() -> None:
    assert all(table.rows for table in tables().values())
    assert len(tables()["cpu-conditions"].rows) == sum(name.startswith("cpu") for name in committed())


def test_the_plot_has_a_bar_for_each_headline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (draw,) = [shown for name, shown, _ in committed_exhibits(made_up()) if name == "speedup"]
    assert not isinstance(draw, report.Table)
    assert draw().description.count("gain") == len(HEADLINES)
