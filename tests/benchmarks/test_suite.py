"""Benchmark suites: what they measure, what they refuse, what they write. No speed is asserted."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import suite
from benchmarks.paper_layers import PAPER_LAYERS
from benchmarks.result_files import Result
from benchmarks.suite import NetworkRace, Row, networks, race
from escort import prune
from escort.filter import SparseFilter
from escort.methods import Prepared
from escort.methods.cpu.dense import Dense, DenseConfig
from escort.network.model import ConvertedModel
from escort.planner import timing
from escort.planner.machine import Machine
from escort.planner.timing import Timing
from escort.problem import MemoryFormat, Problem

ROW_FIELDS = [
    "network",
    "weights",
    "layer",
    "batch",
    "dtype",
    "method",
    "config",
    "time_us",
    "rel_error",
]  # and `timer`, where it says anything


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    ).eval()


def tiny_layer() -> suite.Layer:
    problem = Problem(2, 4, 6, 6, 8, (3, 3), padding=(1, 1, 1, 1))
    weight = torch.randn(problem.weight_shape, generator=torch.Generator().manual_seed(0))
    return suite.Layer("tiny", "random", "conv", problem, SparseFilter.from_dense(weight * (weight > 1)))


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
        assert layer.sparse_filter.sparsity == pytest.approx(entry.sparsity, abs=1e-3)
        assert layer.problem.batch == 2 and layer.sparse_filter.shape == layer.problem.weight_shape
    same, other = suite.paper_layers(2)[0], suite.paper_layers(2, seed=1)[0]
    assert np.array_equal(layers[0].sparse_filter.columns, same.sparse_filter.columns)
    assert not np.array_equal(layers[0].sparse_filter.columns, other.sparse_filter.columns)


def test_the_papers_batches_and_any_precision() -> None:
    layers = suite.paper_layers(None, precision="fp16", device="cuda:0")
    assert {(layer.network, layer.problem.batch) for layer in layers} == {
        ("caffenet", 128),
        ("googlenet", 128),
        ("resnet50", 32),
    }
    assert {(layer.problem.precision, layer.problem.device) for layer in layers} == {("fp16", "cuda:0")}


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
    dense = layer.sparse_filter.to_dense()
    assert dense.count_nonzero() == 3
    assert (dense[0, 0, 0, 0], dense[0, 3, 2, 2], dense[2, 1, 0, 0]) == (1.5, -2.0, 3.0)


def test_patterns_without_values_get_random_ones(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "net.npz", **arrays)
    first, again = (suite.pattern_layers(tmp_path / "net.npz", 1)[0].sparse_filter for _ in range(2))
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


def test_patterns_may_take_the_papers_batch(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "resnet50_magnitude.npz", **arrays)
    (layer,) = suite.pattern_layers(tmp_path / "resnet50_magnitude.npz", None, precision="bf16", device="cuda:1")
    assert (layer.problem.batch, layer.problem.precision, layer.problem.device) == (32, "bf16", "cuda:1")
    np.savez(tmp_path / "lenet.npz", **arrays)
    with pytest.raises(ValueError, match="the paper knows no lenet, only caffenet, googlenet, resnet50"):
        suite.pattern_layers(tmp_path / "lenet.npz", None)


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
            return Prepared(lambda x, residual=None: run(x, residual) * 1.01)

    monkeypatch.setattr(race, "for_device", lambda device: (Wrong(),))
    monkeypatch.setattr(timing, "race", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="conv, .*relative error 1.0e-02"):
        suite.measure_layer(tiny_layer())


@dataclass(frozen=True)
class Scaled:
    """A config of :class:`FakeGpuMethod`: its output is the right one times `factor`."""

    factor: float = 1.0
    takes_channels_last: bool = False


class FakeGpuMethod(Dense):
    """Runs on the CPU what claims to be on a GPU."""

    name, device_type, config_type = "fake", "cuda", Scaled

    def __init__(self, *configs: Scaled) -> None:
        self.space = configs
        self.saw_channels_last: list[bool] = []

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Any:
        return (Scaled(takes_channels_last=True),)

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Any:
        return self.space

    def input_format(self, config: Scaled) -> MemoryFormat:
        return "channels_last" if config.takes_channels_last else "contiguous"

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: Any,
        config: Any,
        slope: torch.Tensor | None = None,
    ) -> Any:
        run = super().prepare(problem, sparse_filter, bias, DenseConfig())

        def scaled(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            self.saw_channels_last.append(x.is_contiguous(memory_format=torch.channels_last))
            if config.factor == 0.0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB. GPU 0 has less.")
            return run(x) * config.factor

        return Prepared(scaled)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> suite.Layer:
    inputs = timing.example_inputs
    monkeypatch.setattr(timing, "example_inputs", lambda p, seed: 2 * inputs(replace(p, device="cpu"), seed=seed))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    layer = tiny_layer()
    return replace(layer, problem=replace(layer.problem, device="cuda:0"))


def take_turns(runs: Any, device: str, **_: Any) -> list[Timing]:
    assert device == "cuda:0" and all(len(run) == 2 for run in runs)
    for run in runs:
        run[0]()
    return [Timing(3.14159), Timing(2.0, "events", "not captured"), Timing(None, reason="out of device memory")][
        : len(runs)
    ]


def test_rows_of_a_gpu(on_gpu: suite.Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "race_on_gpu", take_turns)
    method = FakeGpuMethod(Scaled())
    rows = suite.measure_layer(on_gpu, methods=[method])
    assert [(row.method, row.time_us) for row in rows] == [("fake", 3.14), ("fake", 2.0)]
    assert rows[0].config == {"factor": 1.0, "takes_channels_last": False}
    assert rows[1].config == {"factor": 1.0, "takes_channels_last": True, "timer": "events"}
    assert method.saw_channels_last == [False, True] * 2  # checked, then timed


@pytest.mark.parametrize(
    ("factor", "why"),
    [(0.0, "out of device memory: Tried to allocate 9 TiB"), (1 + 5e-5, "relative error 5.0e-05 exceeds 1e-05")],
)
def test_what_a_gpu_cannot_run_is_left_out(
    on_gpu: suite.Layer, monkeypatch: pytest.MonkeyPatch, factor: float, why: str
) -> None:
    monkeypatch.setattr(timing, "race_on_gpu", take_turns)
    with pytest.warns(UserWarning, match=f"conv, fake .*{factor}.* is left out: {why}"):
        rows = suite.measure_layer(on_gpu, methods=[FakeGpuMethod(Scaled(factor), Scaled())])
    assert [row.config["factor"] for row in rows] == [1.0, 1.0]


def test_what_fails_in_the_race_is_left_out(on_gpu: suite.Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "race_on_gpu", take_turns)
    with pytest.warns(UserWarning, match="is left out: out of device memory"):
        rows = suite.measure_layer(on_gpu, methods=[FakeGpuMethod(Scaled(), Scaled(1 + 1e-7))])
    assert len(rows) == 2


def test_wrong_outputs_are_not_timed_on_a_gpu(on_gpu: suite.Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "race_on_gpu", lambda *args, **kwargs: pytest.fail("timed"))
    for factor in (1.001, float("nan")):
        with pytest.raises(RuntimeError, match="conv, fake .* exceeds 1e-05; please report it"):
            suite.measure_layer(on_gpu, methods=[FakeGpuMethod(Scaled(factor))])


def test_network_against_its_rivals() -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = tiny(), torch.randn(2, 3, 8, 8)
    model(x)  # gives the lazy classifier its shape
    suite.prune_all_but_first(model, 0.8)
    shares = prune.sparsity(model)
    assert shares["0"] == 0.0 and shares["2"] == pytest.approx(0.8, abs=0.01)
    quick = NetworkRace(against=["onnxruntime"], rounds=2, eager=False)
    rows = suite.measure_network(model, x, network="tiny", weights="random-0.80", race=quick)
    assert [row.method for row in rows] == ["escort", "onnxruntime"]
    assert rows[1].config == {"intra_op_num_threads": torch.get_num_threads()}
    assert all(row.layer == "all" and row.batch == 2 and row.rel_error <= 1e-4 for row in rows)
    assert {row.timer for row in rows} == {"call"}
    assert all(len(row.rounds_us) == 2 and min(row.rounds_us) <= row.time_us <= max(row.rounds_us) for row in rows)


@pytest.fixture
def gpu_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers of a GPU, for networks on the CPU. The first that is to be captured cannot be."""

    def graphs(runs: Any, *_: Any, **__: Any) -> list[Timing]:
        return [
            Timing(9.0, "events", "not captured: it synchronizes"),
            *(Timing(float(n)) for n in range(1, len(runs))),
        ]

    def host(runs: Any, *_: Any, pipelined: bool = False, **__: Any) -> list[float]:
        return [(20.0 if pipelined else 40.0) + n for n in range(len(runs))]

    def race_network(ways: Any, device: Any, race: NetworkRace) -> Any:
        return measure(ways, torch.device("cuda:0"), race)

    measure = networks._race_network
    monkeypatch.setattr(networks, "_race_network", race_network)
    monkeypatch.setattr(networks, "_measure_alone", networks._measure_in_turn)
    monkeypatch.setattr(timing, "race_on_gpu", graphs)
    monkeypatch.setattr(timing, "race_on_host", host)
    monkeypatch.setitem(suite.RIVALS, "cpu", ("graph", "compile"))


def broken(x: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("no compiler\nand many more lines")


@pytest.mark.usefixtures("gpu_timers")
def test_network_by_every_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = tiny(), torch.randn(2, 3, 8, 8)
    model(x)
    monkeypatch.setattr(
        torch, "compile", lambda module, dynamic: module if isinstance(module, ConvertedModel) else broken
    )
    with pytest.warns(UserWarning) as warned:
        against = NetworkRace(against=["graph", "compile"])
        rows = suite.measure_network(model, x, network="tiny", weights="random", race=against)
    assert [(row.method, row.timer, row.time_us) for row in rows] == [
        ("escort", "call", 40.0),
        ("eager", "call", 41.0),
        ("eager", "call", 42.0),
        ("escort", "call", 43.0),
        ("escort", "pipelined", 20.0),
        ("eager", "pipelined", 21.0),
        ("eager", "pipelined", 22.0),
        ("escort", "pipelined", 23.0),
        ("graph", "graph", 1.0),
        ("graph", "graph", 2.0),
        ("escort", "graph", 3.0),
    ]
    assert [index for index, row in enumerate(rows) if "compiled" in row.config] == [3, 7, 10]
    messages = [str(warning.message) for warning in warned if "left out" in str(warning.message)]
    assert (
        "compile by torch.compile is left out: NotImplementedError: no compiler" in messages[0]
        and "\n" not in messages[0]
    )
    assert "escort" in messages[1] and "it synchronizes" in messages[1]


@pytest.mark.usefixtures("gpu_timers")
def test_without_rivals_in_graphs_none_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "race_on_gpu", lambda runs, *args, **options: [pytest.fail("captured") for _ in runs])
    model, x = tiny(), torch.randn(2, 3, 8, 8)
    model(x)
    rows = suite.measure_network(model, x, network="tiny", weights="random")
    assert {(row.method, row.timer) for row in rows} == {
        (method, timer) for method in ("escort", "eager") for timer in ("call", "pipelined")
    }


def test_unknown_rival() -> None:
    model, x = tiny(), torch.randn(1, 3, 8, 8)
    model(x)
    with pytest.raises(ValueError, match="there is no rival fastnet; there are compile, onnxruntime"):
        suite.measure_network(model, x, network="tiny", weights="random", race=NetworkRace(against=["fastnet"]))


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
    assert [field.name for field in fields(Row)] == [*ROW_FIELDS, "timer", "rounds_us", "others"]
    alone = replace(row("a", "all", "escort", 3.0), timer="call", rounds_us=(2.0, 3.0, 4.0), others=0.0)
    rows = [row("a", "1", "dense", 2.0), replace(row("a", "all", "escort", 3.0), timer="pipelined"), alone]
    suite.write_results(tmp_path / "a.json", suite.header("layers"), rows)
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["rows"][0]) == ROW_FIELDS and list(result["rows"][1]) == [*ROW_FIELDS, "timer"]
    assert list(result["rows"][2]) == [*ROW_FIELDS, "timer", "rounds_us", "others"]
    assert Result.read(tmp_path / "a.json").rows == rows
    head = result["header"]
    assert head["device"] == "cpu" and head["threads"] == torch.get_num_threads() and head["command"] == "layers"
    assert head["cores"] == sorted(os.sched_getaffinity(0)) and "openvino" in head["versions"]
    assert {"cpu", "isa", "load_average", "versions", "commit", "date"} <= set(head)


def test_header_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("NVIDIA H200", "sm_90", 0, "2.11.0", "0.2.0", "580.159.04", "13.0", "9.19.0")
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device="cpu": machine))
    head = suite.header("layers --device cuda", "cuda:0")
    assert (head["device"], head["gpu"], head["driver"]) == ("cuda", "NVIDIA H200", "580.159.04")
    assert (head["versions"]["cuda"], head["versions"]["cudnn"], head["versions"]["torch"]) == (
        "13.0",
        "9.19.0",
        "2.11.0",
    )
    assert "replays" in head["timing"] and {"commit", "date", "command"} <= set(head)
