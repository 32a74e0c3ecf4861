"""The paper's networks whole: what is pruned in them, and the ways to run what is. No speed is asserted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from benchmarks import study
from benchmarks.networks import NETWORKS
from benchmarks.paper_layers import LAYERS, PAPER_BATCH
from benchmarks.paper_networks import FACTORIES, module_of, paper_network
from benchmarks.result_files import read_results
from benchmarks.suite import NetworkRace, by_method, prune_all_but_first
from benchmarks.suite.by_method import convert_keeping, run_by, run_free
from escort.filter import SparseFilter
from escort.layers import SparseConv2d
from escort.methods import by_name
from escort.methods.cpu.lowered import Lowered, LoweredConfig
from escort.network.swap import Swapped
from escort.planner import timing
from escort.problem import MemoryFormat, Problem
from escort.runtime import Batching
from tests.benchmarks.small import QUICK, TINY, measured, tiny, tiny_of_the_paper


@pytest.mark.parametrize("name", PAPER_BATCH)
def test_the_papers_layers_are_modules_of_its_networks(name: str) -> None:
    model, modules = paper_network(name)
    shapes = dict[str, torch.Size]()
    for module in modules:

        def note(_: nn.Module, args: Any, y: Any, module: str = module) -> None:
            shapes[module] = args[0].shape

        model.get_submodule(module).register_forward_hook(note)
    with torch.no_grad():
        y = model(torch.randn(1, *NETWORKS[name].input_size))
    assert y.isfinite().all() and y.std() < 1e4, "16 bits hold it"
    entries = [entry for entry in LAYERS.values() if entry.network == name]
    assert [module_of(name, entry.layer) for entry in entries] == modules and len(set(modules)) == len(modules)
    for entry, module in zip(entries, modules, strict=True):
        conv = model.get_submodule(module)
        assert isinstance(conv, nn.Conv2d)
        assert (conv.in_channels, conv.out_channels, conv.groups) == (
            entry.in_channels,
            entry.out_channels,
            entry.groups,
        )
        assert (conv.kernel_size[0], conv.stride[0], conv.padding[0]) == (
            entry.kernel_size,
            entry.stride,
            entry.padding,
        )
        assert shapes[module][2:] == (entry.height, entry.width)
        assert (conv.weight == 0.0).float().mean() == pytest.approx(entry.sparsity, abs=1e-3)
    others = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n not in modules]
    assert others and all((conv.weight == 0.0).float().mean() < 1e-3 for conv in others)


def test_what_the_paper_does_not_know() -> None:
    with pytest.raises(ValueError, match="the paper knows no alexnet, only caffenet, googlenet, resnet50"):
        paper_network("alexnet")
    with pytest.raises(ValueError, match="caffenet has no layer fc6"):
        module_of("caffenet", "fc6")
    assert set(FACTORIES) == set(PAPER_BATCH)


@pytest.fixture
def converted() -> tuple[nn.Module, torch.Tensor, nn.Module]:
    """A model, an input, and the network that a conversion made of it."""
    torch.manual_seed(0)
    model, x = tiny().eval(), torch.randn(2, 3, 8, 8)
    prune_all_but_first(model, 0.8)
    fast, (swapped,) = convert_keeping(model, x, precision="fp32", effort="fast")
    assert type(fast).__name__ == "ConvertedModel" and set(swapped.layers) == {"0", "2"}
    return model, x, swapped.network


@pytest.mark.parametrize("fastest", ["dense", "own", "other"])
def test_of_alternatives_what_was_chosen_is_kept_and_else_what_was_planned(
    fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, SparseConv2d] = {}

    def two(candidate: Swapped, request: Any) -> list[Swapped]:
        made["own"] = own = candidate.network.get_submodule("0")  # type: ignore[assignment]
        made["other"] = other = copy.deepcopy(own)  # type: ignore[assignment]
        other.plan = replace(other.plan, candidates=())
        layers = {**candidate.layers, "0": other.plan}
        return [replace(candidate, modules={"0": own}), replace(candidate, layers=layers, modules={"0": other})]

    def race(runs: Any, device: Any) -> Any:
        for run in runs:
            run()
        return [1.0 if name == fastest else 2.0 for name in ("dense", "own", "other")], "calls"

    monkeypatch.setattr("escort.network.convert.alternatives", two)
    monkeypatch.setattr("escort.network.choose.batchings_to_try", lambda *_: [Batching()])
    monkeypatch.setattr("escort.network.choose.race", race)
    torch.manual_seed(0)
    model, x = tiny().eval(), torch.randn(2, 3, 8, 8)
    prune_all_but_first(model, 0.8)
    fast, (swapped,) = convert_keeping(model, x, precision="fp32", effort="fast")
    expected = made["other" if fastest == "other" else "own"]
    assert (fast.network is swapped.network) == (fastest != "dense") and not swapped.modules
    assert swapped.network.get_submodule("0") is expected and swapped.layers["0"] is expected.plan


@pytest.mark.parametrize("name", ["lowered", "dense"])
def test_a_network_runs_some_layers_by_another_method(name: str, converted: Any) -> None:
    model, x, network = converted
    before = {layer: network.get_submodule(layer).plan for layer in ("0", "2")}
    lowered = run_by(network, ["2"], by_name(name))
    layer = lowered.get_submodule("2")
    assert isinstance(layer, SparseConv2d) and layer.plan.method == name
    with torch.no_grad():
        assert torch.allclose(lowered(x), model(x), atol=1e-4)
    assert lowered.get_submodule("0").plan == before["0"], "the layers around it stay"
    assert network.get_submodule("2").plan == before["2"], "and the network that it was made of"
    assert not layer.counters()


def test_a_network_runs_some_layers_as_torch_alone_would(converted: Any) -> None:
    class AsTorch(Lowered):
        def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> tuple[LoweredConfig, ...]:
            return (LoweredConfig(),)

    model, x, network = converted
    lowered = run_by(network, ["2"], AsTorch(), as_torch=True)
    layer = lowered.get_submodule("2")
    assert isinstance(layer, SparseConv2d) and layer.plan.method == "lowered" and not layer.plan.candidates
    with torch.no_grad():
        assert torch.allclose(lowered(x), model(x), atol=1e-4)


def test_what_writes_nchw_is_converted() -> None:
    x, conv = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        y = by_method._InFormat(conv, "channels_last")(x)
        assert y.is_contiguous(memory_format=torch.channels_last) and torch.allclose(y, conv(x))


def test_layers_in_no_time_give_what_they_gave_first(converted: Any) -> None:
    model, x, network = converted
    free = run_free(network, ["2"])
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(free(x), expected, atol=1e-4)
        assert torch.allclose(free(torch.zeros_like(x)), expected, atol=1e-4)
        assert not torch.allclose(network(torch.zeros_like(x)), expected, atol=1e-4)


def test_what_cannot_be_run_by_a_method_is_said(converted: Any) -> None:
    _, _, network = converted
    with pytest.raises(ValueError, match="dense has nothing that torch alone would do"):
        run_by(network, ["2"], by_name("dense"), as_torch=True)
    with pytest.raises(ValueError, match="layer 2: depthwise cannot run it"):
        run_by(network, ["2"], by_name("depthwise"))
    with pytest.raises(ValueError, match="layer 0 was left alone"):
        run_free(nn.Sequential(nn.ReLU()), ["0"])


@pytest.fixture
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.inference, "paper_network", tiny_of_the_paper)


@pytest.mark.usefixtures("tiny_network")
def test_every_way_to_run_a_network(tmp_path: Path) -> None:
    question = replace(QUICK, factories=TINY)
    work = study.plan(question, study.QUESTIONS["inference"])
    assert study.run(question, work, tmp_path, "paper") == {}
    result = read_results(tmp_path)["inference-fp32"]
    assert result.header["finished"] == ["googlenet N=1"] and result.header["complete"]
    assert {row.method for row in result.rows} == {"escort", "cap", "dense", "lowered", "eager"}
    assert {(row.network, row.weights, row.layer, row.timer) for row in result.rows} == {
        ("googlenet", "paper", "all", "call")
    }
    assert all(row.rel_error <= 1e-4 for row in result.rows)
    assert any("has nothing that torch alone would do" in text for text in result.header["left_out"])
    before = (tmp_path / "inference-fp32.json").read_text()
    assert study.run(question, work, tmp_path, "paper") == {}
    assert (tmp_path / "inference-fp32.json").read_text().count('"method"') == before.count('"method"')


@pytest.mark.usefixtures("tiny_network")
def test_a_rival_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(network: nn.Module, names: Any, method: Any, **_: Any) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise torch.OutOfMemoryError("no room")

        return Broken()

    monkeypatch.setattr(study.inference, "run_by", broken)
    with pytest.warns(UserWarning, match="googlenet in lowered .* is left out: OutOfMemoryError: no room"):
        rows = measured(study.race_inference(replace(QUICK, factories=TINY), "fp32"))
    assert {row.method for row in rows} == {"escort", "cap", "eager"}


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_way_on_a_gpu(precision: Any, tmp_path: Path) -> None:
    question = replace(QUICK, device="cuda:0", batch=4, factories=TINY, effort="fast")
    work = study.plan(question, study.QUESTIONS["inference"], (precision,))
    assert study.run(question, work, tmp_path, "paper") == {}
    result = read_results(tmp_path)[f"inference-{precision}"]
    methods = {row.method for row in result.rows}
    assert {"escort", "cap", "cudnn", "cublas", "cusparse", "graph"} <= methods, result.header["left_out"]
    assert {row.timer for row in result.rows} == {"graph"}
    variants = {(row.method, row.config["variant"]) for row in result.rows if "variant" in row.config}
    assert {("cublas", "fastest"), ("cublas", "torch"), ("cusparse", "torch"), ("cudnn", "fastest")} <= variants


@pytest.mark.gpu
def test_layers_by_another_method_in_channels_last() -> None:
    torch.manual_seed(0)
    model, x = tiny().eval().cuda().half(), torch.randn(4, 3, 8, 8, device="cuda", dtype=torch.float16)
    prune_all_but_first(model, 0.8)
    with torch.no_grad():
        _, networks = convert_keeping(model, x, precision="fp16", effort=0.001)
        expected = model(x)
        for swapped in networks:
            ran = set()
            for method in study.rivals("cuda:0"):
                problem = swapped.layers["2"].problem
                if all(method.unsupported(replace(problem, memory_format=each)) for each in get_args(MemoryFormat)):
                    continue
                out = run_by(swapped.network, ["2"], method)(x)
                assert (out - expected).norm() < 1e-2 * expected.norm(), (method.name, problem)
                ran.add(method.name)
            assert ran >= {"cublas", "cusparse", "cudnn"}


def test_timings_on_a_gpu_are_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "race_on_gpu", lambda runs, *_, **__: [timing.Timing(3.0) for _ in runs])
    ways = [study.inference.Way("escort", {}, lambda: torch.zeros(1))] * 2
    found = study.inference._by_graphs(ways, torch.device("cuda:0"), NetworkRace(precision="fp16"))
    assert {name: [taken.time_us for taken in times.values()] for name, times in found.items()} == {"graph": [3.0, 3.0]}
