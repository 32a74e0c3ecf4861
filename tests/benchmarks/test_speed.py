"""Converted networks against torch.compile: what is raced, what the rows say, and the command. No speed is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.networks
from benchmarks import exhibits, suite
from benchmarks.commands import speed as command
from benchmarks.findings.aims import SpeedAim, Wanted, read_aims
from benchmarks.findings.speed import speeds
from benchmarks.networks import NETWORKS, Network
from benchmarks.result_files import Result
from benchmarks.suite import NetworkRace, Row
from benchmarks.suite import speed as speed_suite
from benchmarks.suite.networks import Way, race_in_turn
from escort.planner import timing
from escort.planner.timing import Timing
from tests.benchmarks.invoking import invoke
from tests.benchmarks.made_up import HEADER, cells, results
from tests.benchmarks.small import tiny, write_patterns

QUICK = NetworkRace(rounds=2, budget_s=0.0)


def a_network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = tiny().eval()
    suite.prune_all_but_first(model, 0.9)
    return model, torch.randn(2, 3, 8, 8)


def test_on_a_cpu_calls_take_turns() -> None:
    model, x = a_network()
    rows = suite.measure_speed(model, x, network="tiny", weights="random-0.90", race=QUICK)
    assert [(row.method, row.timer) for row in rows] == [("escort", "call"), ("eager", "call"), ("eager", "call")]
    assert all(row.time_us > 0 and row.rel_error <= 1e-4 for row in rows)


def test_every_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[object] = []

    def graphs(runs: Any, *_: Any, **__: Any) -> list[Timing]:
        taken = [Timing(10.0 + n) for n in range(len(runs))]
        taken[2] = Timing(99.0, "events", "not captured: it synchronizes")
        return taken

    def host(runs: Any, *_: Any, pipelined: bool = False, **__: Any) -> list[float]:
        assert all(callable(run) for run in runs)
        return [(20.0 if pipelined else 40.0) + n for n in range(len(runs))]

    def replays(run: Any, device: Any) -> Any:
        replayed.append(run)
        return run

    monkeypatch.setattr(timing, "race_on_gpu", graphs)
    monkeypatch.setattr(timing, "race_on_host", host)
    monkeypatch.setattr(speed_suite, "_replays", replays)
    by_clock = speed_suite._by_every_clock
    monkeypatch.setattr(
        speed_suite, "_by_every_clock", lambda ways, device, race: by_clock(ways, torch.device("cuda:0"), race)
    )
    model, x = a_network()
    with pytest.warns(UserWarning, match="it synchronizes"):
        rows = suite.measure_speed(model, x, network="tiny", weights="random-0.90", race=QUICK)
    assert [(row.method, row.timer, row.time_us) for row in rows] == [
        ("escort", "graph", 10.0),
        ("graph", "graph", 11.0),
        ("escort", "call", 40.0),
        ("graph", "call", 41.0),
        ("escort", "pipelined", 20.0),
        ("graph", "pipelined", 21.0),
    ]
    assert len(replayed) == 1

    def full(run: Any, device: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(speed_suite, "_replays", full)
    monkeypatch.setattr(timing, "survived", str)
    with pytest.warns(UserWarning, match="eager .* by the host's clock is left out: no room"):
        rows = suite.measure_speed(model, x, network="tiny", weights="random-0.90", race=QUICK)
    assert {row.method for row in rows if row.timer == "call"} == {"escort"}


def row(method: str, timer: Any, time_us: float, network: str = "resnet50", **config: Any) -> Row:
    weights = "resnet50_magnitude_90" if network == "resnet50" else "random-0.90"
    return Row(network, weights, "all", 1, "fp16", method, config, time_us, 0.0, timer)


ROWS = [
    row("escort", "graph", 100.0, graph=True, kept_dense=False),
    row("escort", "call", 120.0, graph=False, kept_dense=False),
    row("compile", "graph", 240.0, graph=True, memory_format="channels_last"),
    row("compile", "call", 264.0, graph=True, memory_format="channels_last"),
    row("compile", "call", 230.0, graph=False, memory_format="channels_last"),
    row("compile", "graph", 250.0, graph=True, memory_format="contiguous"),
    row("graph", "graph", 300.0, graph=True, memory_format="contiguous"),
]


def test_a_plain_call_is_compared_with_a_replay_by_the_same_clock() -> None:
    (measured,) = speeds(ROWS).values()
    assert measured.gain == pytest.approx(2.2), "264 by 120: the call that is no replay does not count"
    assert measured.gain_in_graphs == pytest.approx(2.4) and measured.gain_over_dense == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("ours_us", "kept_dense", "reached", "never_slower"),
    [
        (120.0, False, "goal", "yes"),
        (170.0, False, "floor", "yes"),
        (240.0, False, "no", "yes"),
        (246.0, False, "no", "no"),
        (246.0, True, "tie", "tie"),
        (120.0, True, "goal", "tie"),
    ],
)
def test_networks_are_judged(ours_us: float, kept_dense: bool, reached: str, never_slower: str) -> None:
    rows = [replace(r, time_us=ours_us) if r.method == "escort" else r for r in ROWS]
    rows = [replace(r, config={**r.config, "kept_dense": kept_dense}) if r.method == "escort" else r for r in rows]
    table = cells(exhibits.tables(results(speed_fp16=rows))["speed-fp16"])
    assert (table[0]["Reached"], table[0]["Never slower"]) == (reached, never_slower)
    assert (table[0]["Network"], table[0]["Samples"], table[0]["Floor"], table[0]["Goal"]) == (
        "resnet50",
        "1",
        "1.50x",
        "2.00x",
    )
    assert len(table) == 1, "what was not measured is no line"


def test_the_table_says_why_a_network_has_no_times() -> None:
    failed = {"caffenet random-0.90 N=128": "RuntimeError: wrong\nresult", "caffenet random-0.50 N=128": "no aim"}
    shown = exhibits.tables({"speed-fp16": Result({**HEADER, "failed": failed}, [])})["speed-fp16"]
    (line,) = cells(shown)
    assert (line["Network"], line["Reached"], line["Gain"]) == ("caffenet", "failed: RuntimeError: wrong", "-")


def test_every_network_has_its_aims() -> None:
    *unstructured, semi_structured = read_aims().speed
    keys = {(network, aim.weights, batch) for aim in unstructured for network in aim.networks for batch in aim.batches}
    assert len(keys) == 21 and all(aim.wanted.keys() == {"fp16", "tf32", "fp32"} for aim in unstructured)
    assert (semi_structured.weights, semi_structured.wanted.keys()) == ("random-2:4", {"fp16"})


@pytest.fixture
def tiny_aims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aims of a network of two convolutions, with random weights and by a file."""
    monkeypatch.setattr(benchmarks.networks, "tiny", tiny, raising=False)
    monkeypatch.setitem(NETWORKS, "tiny", Network(tiny, (3, 8, 8)))
    wanted = {"fp32": Wanted(1.0, 2.0), "fp16": Wanted(1.0, 2.0)}
    aims = tuple(SpeedAim(("tiny",), weights, (1, 2), wanted) for weights in ("random-0.90", "net_l1"))
    monkeypatch.setattr(command, "read_aims", lambda: replace(read_aims(), speed=aims))


@pytest.mark.usefixtures("tiny_aims")
def test_the_command_measures_and_goes_on(tmp_path: Path) -> None:
    run = ("speed", "--device", "cpu", "--weights", "random-0.90", "--budget-s", 0, "--out", tmp_path)
    path = tmp_path / "speed-fp32.json"
    result = invoke(*run, "--seconds", 0)
    assert result.exit_code == 0 and not path.exists(), "nothing began"
    result = invoke(*run, "--batch", 1, "-v")
    assert result.exit_code == 0, result.output
    assert "tiny in eager" in result.stderr and ": ran first in " in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("speed-fp32: tiny random-0.90 N=1: ")]
    assert " s: call escort " in line and " eager " in line
    assert json.loads(path.read_text())["header"]["finished"] == ["tiny random-0.90 N=1"]
    result = invoke(*run, "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["header"]["finished"] == ["tiny random-0.90 N=1", "tiny random-0.90 N=2"]
    assert written["header"]["complete"] and written["rows"] == json.loads(result.stdout)["rows"]["speed-fp32"]
    assert [row["batch"] for row in written["rows"] if row["method"] == "escort"] == [1, 2]


def test_a_network_of_2_of_4(tiny_aims: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aims = SpeedAim(("tiny",), "random-2:4", (1,), {"fp32": Wanted(1.0, 2.0)}), *command.read_aims().speed[:1]
    monkeypatch.setattr(command, "read_aims", lambda: replace(read_aims(), speed=aims))
    seen: list[nn.Module] = []
    measure = suite.measure_speed
    monkeypatch.setattr(
        suite, "measure_speed", lambda model, *a, **named: seen.append(model) or measure(model, *a, **named)
    )
    result = invoke("speed", "--device", "cpu", "--weights", "random-2:4", "--budget-s", 0, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    first, second = (module.weight for module in seen[0].modules() if isinstance(module, nn.Conv2d))
    assert first.all() and torch.equal((second.unflatten(1, (-1, 4)) != 0).sum(2).unique(), torch.tensor([2]))
    assert json.loads((tmp_path / "speed-fp32.json").read_text())["header"]["finished"] == ["tiny random-2:4 N=1"]


@pytest.mark.usefixtures("tiny_aims")
def test_a_network_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    write_patterns(tmp_path)  # of no shape that is in the network
    run = ("speed", "--device", "cpu", "--batch", 1, "--patterns", tmp_path, "--budget-s", 0, "--out", tmp_path / "out")
    result = invoke(*run)
    assert result.exit_code == 1 and "failed: speed-fp32, tiny net_l1 N=1: ValueError" in result.stderr
    assert "speed-fp32: tiny net_l1 N=1: failed after 0 s: ValueError" in result.stderr
    header = json.loads((tmp_path / "out" / "speed-fp32.json").read_text())["header"]
    assert header["finished"] == ["tiny random-0.90 N=1"] and not header["complete"]


def test_rows_come_in_the_order_that_is_asked_for() -> None:
    options = command.SpeedOptions(["vgg16_bn", "resnet50"], "32,1", weights="random-0.92,resnet50_magnitude_90")
    assert options.chosen("fp16") == [
        ("vgg16_bn", "random-0.92", 32),
        ("vgg16_bn", "random-0.92", 1),
        ("resnet50", "resnet50_magnitude_90", 32),
        ("resnet50", "resnet50_magnitude_90", 1),
    ]
    everything = command.SpeedOptions().chosen("fp16")
    assert len(everything) == len(set(everything)) == 22 and everything[0] == ("resnet50", "resnet50_magnitude_90", 1)


@pytest.mark.usefixtures("tiny_aims")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("resnet18",), "there is no aim for resnet18; there are tiny"),
        (("--precision", "fp16"), "--precision: there is no fp16 on cpu; there are fp32"),
        (("--formats", "nchw"), "--formats: there is no nchw; there are channels_last, contiguous"),
        (("--weights", "net_l1"), "net_l1.npz; name the folder that holds it with --patterns"),
        (("--batch", "many"), "--batch"),
        (("--against", "tensorrt"), "--against: there is no tensorrt on cpu; there are cudnn_graph"),
        (("--effort", "much"), "--effort takes fast, best or a number of seconds"),
    ],
)
def test_bad_input(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    options = () if "--weights" in args else ("--weights", "random-0.90")
    result = invoke("speed", *args, *options, "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "tf32", "fp32"])
def test_speed_on_a_gpu(precision: Any) -> None:
    model, x = a_network()
    storage = torch.float16 if precision == "fp16" else torch.float32
    model, x = model.to("cuda", storage), x.to("cuda", storage)
    race = NetworkRace(precision=precision, effort="fast", rounds=3, budget_s=0.1)
    rows = suite.measure_speed(model, x, network="tiny", weights="random-0.90", race=race)
    timers = {(row.method, row.timer, row.config["graph"]) for row in rows}
    assert {("escort", "graph", True), ("escort", "call", False), ("escort", "pipelined", False)} <= timers
    assert {("graph", "graph", True), ("graph", "call", True)} <= timers
    (measured,) = speeds(rows).values()
    assert measured.gain_over_dense
    if ("compile", "graph", True) in timers:  # there may be no compiler
        assert measured.gain and measured.gain_in_graphs


@pytest.mark.parametrize(("own", "ours", "is_right"), [(1e-6, 2e-4, False), (1e-3, 2e-3, True), (1e-3, 4e-3, False)])
def test_what_the_model_itself_amplifies_is_no_error(own: float, ours: float, is_right: bool) -> None:
    model, x = a_network()
    with torch.no_grad():
        y = model.double()(x.double()).float()
    model.float()
    ways = [Way("escort", {}, lambda: y * (1 + ours)), Way("eager", {}, lambda: y * (1 + own))]

    def race() -> list[Row]:
        return race_in_turn(ways, model, x, ("tiny", "random"), QUICK, speed_suite._by_every_clock)

    if is_right:
        assert [row.rel_error for row in race()] == pytest.approx([ours, own], rel=1e-2)
        return
    with pytest.raises(RuntimeError, match="tiny in escort: relative error"):
        race()


def test_a_rival_that_computes_something_else_is_left_out() -> None:
    model, x = a_network()
    with torch.no_grad():
        y = model.double()(x.double()).float()
    model.float()
    ways = [
        Way(name, {}, lambda scale=scale: y * scale)
        for name, scale in (("escort", 1.0), ("eager", 1.0), ("compile", 2.0))
    ]
    with pytest.warns(UserWarning, match="tiny in compile .* is left out: its relative error 1.0e\\+00 exceeds"):
        rows = race_in_turn(ways, model, x, ("tiny", "random"), QUICK, speed_suite._by_every_clock)
    assert [row.method for row in rows] == ["escort", "eager"]
