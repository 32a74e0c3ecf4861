"""The study: which rows each question has. No speed is asserted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import study, suite
from benchmarks.ahead import Compilation
from benchmarks.result_files import read_results
from benchmarks.study import Study
from benchmarks.suite import Layer, Row
from escort import prune, reference
from escort.methods.cuda.sparse_tc.config import ELEMENTS
from escort.methods.cuda.sparse_tc.split import split
from escort.problem import Precision, Problem
from tests.benchmarks.small import QUICK, SMALL, TINY, Compiled, measured, tiny_of_the_paper, write_patterns


def test_every_method_runs_on_every_layer() -> None:
    rows = measured(study.compare(QUICK, "fp32"))
    assert {row.layer for row in rows} == {"inception_5a/5x5", "inception_5b/5x5"}
    assert {row.method for row in rows} == {"direct", "dense", "lowered"}
    assert all(row.weights == "paper" and row.batch == 1 and row.time_us > 0 for row in rows)
    assert all(row.rel_error <= reference.ERROR_BOUND["fp32"] for row in rows)
    assert sum(row.method == "direct" and row.layer == "inception_5a/5x5" for row in rows) <= QUICK.search


def test_the_papers_batch_is_the_default() -> None:
    assert QUICK.samples("googlenet") == 1
    assert {name: Study().samples(name) for name in Study().networks} == {
        "caffenet": 128,
        "googlenet": 128,
        "resnet50": 32,
    }


def test_what_is_compiled_is_compiled_for_all_layers_before_the_first_is_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    method, at_the_first_race = Compiled(), list[int]()
    race = suite.measure_layer
    monkeypatch.setattr(study.study, "for_device", lambda device: [method])

    def watched(*args: Any, **options: Any) -> list[Row]:
        at_the_first_race.append(len(method.prepared))
        return race(*args, **options)

    monkeypatch.setattr(suite, "measure_layer", watched)
    first, second = study.compare(QUICK, "fp32")
    assert len(first.measure()) == len(second.measure()) == 3
    assert at_the_first_race[0] == 6, "three configs of two layers"
    assert len(method.prepared) == len(set(method.prepared)) == 6, "each once"


def test_break_even_rows_hold_both_sides_at_every_sparsity() -> None:
    rows = measured(study.find_break_even(QUICK, "fp32"))
    assert {(row.layer, row.weights) for row in rows} == {
        (layer, weights)
        for layer in ("inception_5a/5x5", "inception_5b/5x5")
        for weights in ("random-0.50", "random-0.95")
    }
    assert {row.method for row in rows} == {"direct", "dense"}


def test_a_shape_breaks_even_once() -> None:
    labels = [item.label for item in study.find_break_even(replace(Study(), networks=("resnet50",)), "fp32")]
    assert len({label.rpartition(" ")[0] for label in labels}) == 4  # four sizes of map, sixteen layers
    assert labels[0] == "resnet50 res2a_branch2b N=32 0.70"


def test_random_filters_have_the_sparsity_asked_for() -> None:
    problem = Problem(1, 16, 7, 7, 32, (3, 3))
    assert suite.random_filter(problem, 0.9, 0).sparsity == pytest.approx(0.9, abs=1e-3)
    assert not torch.equal(*(suite.random_filter(problem, 0.9, seed).to_dense() for seed in (0, 1)))


def test_whole_networks_at_every_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(suite, "measure_network", lambda *args, **options: asked.append((args, options)) or [])
    assert measured(study.sweep_networks(replace(QUICK, factories=TINY), "fp32")) == []
    for (model, x), options in asked:
        assert (options["network"], options["race"].precision, len(x)) == ("googlenet", "fp32", 1)
        assert prune.sparsity(model)["2"] == pytest.approx(float(options["weights"].removeprefix("random-")), abs=0.01)
    assert [options["weights"] for _, options in asked] == ["random-0.50", "random-0.95"]


def test_networks_on_a_gpu_are_raced_as_for_speed_and_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(study.networks, "pruned", lambda *_: (None, None))
    monkeypatch.setattr(suite, "measure_speed", lambda *_, **options: calls.append(options) or [])
    on_gpu = replace(QUICK, device="cuda:0", sparsities=(0.9,), formats=("channels_last",))
    (item,) = study.sweep_networks(on_gpu, "fp16")
    assert item.compilation == Compilation("googlenet", 1, "fp16", "cuda:0", ("channels_last",))
    assert item.measure() == []
    (options,) = calls
    assert (options["network"], options["weights"]) == ("googlenet", "random-0.90")
    assert (options["race"].precision, options["formats"]) == ("fp16", ("channels_last",))


def test_sparse_methods_meet_the_dense_one_on_real_patterns(tmp_path: Path) -> None:
    files = write_patterns(tmp_path), write_patterns(tmp_path, "net_l2")
    question = replace(QUICK, layers="conv2,other", patterns=files, batch=2)
    items = study.compare_on_patterns(question, "fp32")
    assert [item.label for item in items] == ["net_l1 conv2 N=2", "net_l2 conv2 N=2"]
    rows = measured(items)
    assert {(row.weights, row.layer, row.batch) for row in rows} == {("net_l1", "conv2", 2), ("net_l2", "conv2", 2)}
    assert {row.method for row in rows} == {"direct", "dense"}
    with pytest.raises(ValueError, match=r"net_l1\.npz: no layer is named like conv3; there are conv1, conv2"):
        study.compare_on_patterns(replace(question, layers="conv3"), "fp32")
    with pytest.raises(ValueError, match="name them with --patterns"):
        study.compare_on_patterns(QUICK, "fp32")


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_patterns_have_their_channels_in_the_order_of_a_network_in_channels_last(precision: Precision) -> None:
    def layer(name: str, kernel_size: int, out_channels: int, stride: int, channels: int = 64) -> Layer:
        geometry = (kernel_size, kernel_size), (stride, stride), (kernel_size // 2,) * 4
        problem = Problem(2, channels, 7, 7, out_channels, *geometry, precision=precision, device="cuda:0")
        return Layer("resnet50", "tiny", name, problem, suite.random_filter(problem, 0.8, seed=out_channels))

    layers = [
        layer("spatial", 3, 32, 1),
        layer("expand", 1, 128, 1),
        layer("reduce", 1, 32, 1),
        layer("downsample", 1, 128, 2),
        layer("last", 1, 64, 1, channels=128),  # of a sum that no other stage reads
    ]
    ordered, element = study.in_order_of_channels_last(layers), ELEMENTS[precision]
    for before, after in zip(layers, ordered, strict=True):
        shares = [split(each.sparse_filter, element.kept, element.of).share for each in (before, after)]
        assert shares[1] == shares[0] if before.name == "last" else shares[1] < 0.9 * shares[0], before.name
        assert np.array_equal(np.sort(after.sparse_filter.values), np.sort(before.sparse_filter.values))
    orders = []
    for i in (2, 3):
        before, after = layers[i].sparse_filter.to_dense(), ordered[i].sparse_filter.to_dense()
        orders.append([next(c for c in range(64) if torch.equal(before[:, c], after[:, p])) for p in range(64)])
    assert orders[0] == orders[1] != list(range(64)), "what reads the same sum has one order"
    strict = replace(layers[0], problem=replace(layers[0].problem, precision="fp32"))
    assert study.in_order_of_channels_last([strict]) == [strict]


def test_methods_that_are_named_are_compared_alone() -> None:
    question = replace(QUICK, methods=("dense", "lowered"))
    (item, *_) = study.compare(question, "fp32")
    assert {row.method for row in item.measure()} == {"dense", "lowered"}
    assert question.conditions()["methods"] == ["dense", "lowered"] and "methods" not in QUICK.conditions()
    with pytest.raises(ValueError, match="there is no method sparse; there are direct, depthwise, linear, dense"):
        replace(QUICK, methods=("sparse",))


def test_questions_share_their_files() -> None:
    both = [part for question in ("rq1", "rq3") for part in study.QUESTIONS[question]]
    assert list(study.plan(QUICK, both)) == ["layers-fp32"]
    assert list(study.plan(replace(QUICK, device="cuda:0"), both)) == [
        f"layers-{precision}" for precision in ("fp32", "fp16", "tf32", "bf16")
    ]
    with pytest.raises(ValueError, match="in fp32, not in fp16"):
        study.plan(QUICK, both, ("fp16",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": ("alexnet",)}, "no network alexnet; there are caffenet"),
        ({"sparsities": (1.0,)}, "between 0 and 1"),
        ({"layers": "conv9"}, "no layer is named like conv9; there are inception|conv2"),
    ],
)
def test_bad_studies(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **change)


@pytest.mark.gpu
def test_every_question_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.inference, "paper_network", tiny_of_the_paper)
    files = (write_patterns(tmp_path),)
    on_gpu = replace(QUICK, device="cuda:0", batch=2, factories=TINY, raced={}, layers=f"{SMALL},conv?", patterns=files)
    parts = [part for question in study.QUESTIONS.values() for part in question]
    precisions = ("fp32", "fp16")
    assert study.run(on_gpu, study.plan(on_gpu, parts, precisions), tmp_path, "escort paper") == {}
    results = read_results(tmp_path)
    assert set(results) == {f"{part.stem}-{precision}" for part in parts for precision in precisions}
    for result in results.values():
        assert result.header["complete"] and result.rows and result.header["gpu"]
    own = {"direct", "generated", *(["sparse_tc"] if torch.cuda.get_device_capability() == (9, 0) else [])}
    assert {row.method for row in results["layers-fp16"].rows} == {*own, "cublas", "cusparse", "cudnn"}
    assert {row.method for row in results["patterns-fp16"].rows} == {*own, "cudnn"}
    assert {"escort", "eager", "graph"} <= {row.method for row in results["networks-fp16"].rows}
    for stem in ("breakdown-fp32", "breakdown-fp16"):
        spent = {(row.method, row.config["part"]) for row in results[stem].rows if row.time_us > 0}
        assert {("direct", "direct"), ("cublas", "im2col"), ("cublas", "product"), ("cudnn", "product")} <= spent
