"""Benchmark suites: what they measure, what they refuse, what they write. No speed is asserted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from escort import prune, suite
from escort.methods.dense import Dense
from escort.paper_layers import PAPER_LAYERS
from escort.problem import Problem
from escort.sparse import StretchedCSR
from escort.suite import Row

ROW_FIELDS = ["network", "weights", "layer", "batch", "dtype", "method", "config", "time_us", "rel_error"]


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    ).eval()


def tiny_layer() -> suite.Layer:
    problem = Problem(2, 4, 6, 6, 8, (3, 3), padding=(1, 1, 1, 1))
    weight = torch.randn(problem.weight_shape, generator=torch.Generator().manual_seed(0))
    return suite.Layer("tiny", "random", "conv", problem, StretchedCSR.from_dense(weight * (weight > 1)))


def row(network: str, layer: str, method: str, time_us: float) -> Row:
    return Row(network, "paper", layer, 8, "fp32", method, {}, time_us, 0.0)


def test_paper_table() -> None:
    assert Counter(entry.network for entry in PAPER_LAYERS) == {"caffenet": 4, "googlenet": 19, "resnet50": 16}
    assert len({(entry.network, entry.layer) for entry in PAPER_LAYERS}) == 39
    for entry in PAPER_LAYERS:  # all are "same" convolutions
        problem = entry.problem(1)
        assert (problem.out_height, problem.out_width) == (entry.height, entry.width)


def test_paper_layers_have_the_published_sparsities_at_random_positions() -> None:
    layers = suite.paper_layers(2)
    for layer, entry in zip(layers, PAPER_LAYERS, strict=True):
        assert layer.filter.sparsity == pytest.approx(entry.sparsity, abs=1e-3)
        assert layer.problem.batch == 2 and layer.filter.shape == layer.problem.weight_shape
    same, other = suite.paper_layers(2)[0], suite.paper_layers(2, seed=1)[0]
    assert np.array_equal(layers[0].filter.columns, same.filter.columns)
    assert not np.array_equal(layers[0].filter.columns, other.filter.columns)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """A layer of 4 input and 3 output channels in one group, kernel 3, on 5x7 maps; the second row is empty."""
    return {
        "conv.shape": np.array([5, 7, 4, 3, 3, 1, 2, 1], dtype=np.int32),
        "conv.indptr": np.array([0, 2, 2, 3], dtype=np.int32),
        "conv.indices": np.array([0, 35, 9], dtype=np.uint16),
    }


def test_patterns_are_read_as_documented(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    values = np.array([1.5, -2.0, 3.0], dtype=np.float32)
    np.savez(tmp_path / "net_l1.npz", **arrays, **{"conv.values": values})
    (layer,) = suite.pattern_layers(tmp_path / "net_l1.npz", batch=3)
    assert (layer.network, layer.weights, layer.name) == ("net", "net_l1", "conv")
    assert layer.problem == Problem(3, 4, 5, 7, 3, (3, 3), (2, 2), (1, 1, 1, 1))
    dense = layer.filter.to_dense()
    assert dense.count_nonzero() == 3
    assert (dense[0, 0, 0, 0], dense[0, 3, 2, 2], dense[2, 1, 0, 0]) == (1.5, -2.0, 3.0)


def test_patterns_without_values_get_random_ones(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "net.npz", **arrays)
    first, again = (suite.pattern_layers(tmp_path / "net.npz", 1)[0].filter for _ in range(2))
    assert first.nnz == 3 and np.all(first.values != 0) and np.array_equal(first.values, again.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv.indptr": None}, "conv.indptr is missing"),
        ({"conv.shape": np.array([5, 7, 4])}, "holds 8 numbers .*, got 3"),
        ({"conv.shape": np.array([5, 7, 4, 3, 9, 0, 1, 1])}, "smaller than the kernel"),
        ({"conv.shape": np.array([5, 7, 4, 3, 3, 1, 1, 3])}, "divisible by groups"),
        ({"conv.indices": np.array([0.0, 35.0, 9.0])}, "vector of integers"),
        ({"conv.indices": np.array([0, 36, 9])}, r"columns must lie in 0\.\.35"),
        ({"conv.indices": np.array([0, 2**40, 9])}, "is possible"),
        ({"conv.indices": np.array([35, 0, 9])}, "ascend"),
        ({"conv.indptr": np.array([0, 2, 1, 3])}, "must not descend"),
        ({"conv.indptr": np.array([0, 2, 3])}, "indptr must run from 0"),
        ({"conv.values": np.array([1.0, np.nan, 2.0])}, "finite"),
        ({"conv.values": np.array(["a", "b", "c"])}, "layer conv"),
        ({"conv.values": np.array([1, None, {}], dtype=object)}, "not an .npz of plain arrays"),
        ({"conv.shape": None}, "holds no layer"),
    ],
)
def test_bad_patterns(tmp_path: Path, arrays: dict[str, np.ndarray], change: dict[str, Any], message: str) -> None:
    path = tmp_path / "net.npz"
    np.savez(path, **{key: value for key, value in (arrays | change).items() if value is not None})
    with pytest.raises(ValueError, match=message) as caught:
        suite.pattern_layers(path, 1)
    assert str(path) in str(caught.value)


def test_damaged_pattern_files(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "net.npz"
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        suite.pattern_layers(path, 1)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"not an \.npz"):
        suite.pattern_layers(tmp_path / "plain.npy", 1)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        suite.pattern_layers(tmp_path / "nowhere.npz", 1)


def test_every_configuration_of_every_method_is_a_row() -> None:
    layer = tiny_layer()
    rows = suite.measure_layer(layer, rounds=1)
    assert {row.method for row in rows} == {"direct", "dense", "lowered"}
    configs = [row.config for row in rows if row.method == "dense"]
    assert configs == [{"memory_format": "contiguous"}, {"memory_format": "channels_last"}]
    assert all(row.time_us > 0 and row.rel_error <= 1e-5 for row in rows)
    assert {(row.network, row.weights, row.layer, row.batch, row.dtype) for row in rows} == {
        ("tiny", "random", "conv", 2, "fp32")
    }


def test_wrong_outputs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Dense):
        def prepare(self, *args: Any) -> Any:
            run = super().prepare(*args)
            return lambda x, residual=None: run(x, residual) * 1.01

    monkeypatch.setattr(suite, "for_device", lambda device: (Wrong(),))
    monkeypatch.setattr(suite.bench, "race", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="conv, .*relative error 1.0e-02"):
        suite.measure_layer(tiny_layer())


def test_network_against_its_rivals() -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = tiny(), torch.randn(2, 3, 8, 8)
    model(x)  # gives the lazy classifier its shape
    suite.prune_all_but_first(model, 0.8)
    shares = prune.sparsity(model)
    assert shares["0"] == 0.0 and shares["2"] == pytest.approx(0.8, abs=0.01)
    rows = suite.measure_network(
        model, x, network="tiny", weights="random-0.80", against=["onnxruntime"], rounds=1, budget_s=0.0
    )
    assert [row.method for row in rows] == ["escort", "eager", "eager", "onnxruntime"]
    assert rows[3].config == {"intra_op_num_threads": torch.get_num_threads()}
    assert all(row.layer == "all" and row.batch == 2 and row.rel_error <= 1e-4 for row in rows)


def test_unknown_rival() -> None:
    model, x = tiny(), torch.randn(1, 3, 8, 8)
    model(x)
    with pytest.raises(ValueError, match="there is no rival fastnet; there are onnxruntime"):
        suite.measure_network(model, x, network="tiny", weights="random", against=["fastnet"])


def test_means_take_the_best_configuration_and_are_geometric() -> None:
    rows = [
        row("a", "1", "direct", 10.0),
        row("a", "1", "direct", 20.0),
        row("a", "1", "dense", 20.0),
        row("a", "1", "dense", 90.0),
        row("a", "2", "direct", 10.0),
        row("a", "2", "dense", 80.0),
        row("b", "1", "direct", 1.0),
        row("b", "1", "dense", 4.0),
        row("b", "1", "lowered", 3.0),
        row("b", "2", "dense", 5.0),
    ]
    assert suite.best_times(rows)["a", "1", 8] == {"direct": 10.0, "dense": 20.0}
    means = suite.geometric_means(rows, "direct")
    assert list(means) == ["a", "b", "all"]
    assert means["a"]["dense"] == pytest.approx(4.0)
    assert means["b"] == {"dense": pytest.approx(4.0), "lowered": pytest.approx(3.0)}
    assert means["all"]["dense"] == pytest.approx(4.0)


def test_result_files(tmp_path: Path) -> None:
    assert [field.name for field in fields(Row)] == ROW_FIELDS
    suite.write_results(tmp_path / "a.json", suite.header("escort bench"), [row("a", "1", "dense", 2.0)])
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["rows"][0]) == ROW_FIELDS
    head = result["header"]
    assert head["device"] == "cpu" and head["threads"] == torch.get_num_threads() and head["command"] == "escort bench"
    assert {"cpu", "isa", "load_average", "versions", "commit", "date"} <= set(head)
