"""Forecasts of pruning: curves through what was measured, the network's time through its layers', and the advice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import escort
from escort.network import plan_page
from escort.network.forecast.advice import advice_table, holding_back, wanted_gain
from escort.network.forecast.curve import Curve, knee, wins_from
from escort.network.forecast.forecast import from_plans
from escort.network.forecast.page import charts, layer_table, network_table
from escort.network.plan import NetworkPlan
from escort.planner import Candidate, Plan
from escort.planner.machine import Machine
from escort.problem import Problem

MACHINE = Machine("a CPU", "avx2", 2, "2.13.0", "0.1.0")
PROBLEM = Problem(1, 64, 16, 16, 64, (3, 3), padding=(1, 1, 1, 1))


def planned(problem: Problem, **times_us: float) -> Plan:
    """A layer's plan by methods and their times, the fastest chosen."""
    candidates = tuple(Candidate(method, {}, time_us) for method, time_us in times_us.items())
    return Plan(problem, min(times_us, key=times_us.__getitem__), {}, candidates, MACHINE)


def network(shares: Mapping[str, float], layers: dict[str, Plan], time_us: float, **about: Any) -> NetworkPlan:
    return NetworkPlan(
        layers=layers,
        skipped={"odd": "pads with 'reflect'"},
        input_shapes=((1, 64, 16, 16),),
        dense_time_us=1000.0,
        converted_time_us=time_us,
        rel_error=0.0,
        kept_dense=False,
        machine=MACHINE,
        sparsities=dict(shares),
        **about,
    )


def at(share: float) -> NetworkPlan:
    """A network of two layers that are pruned: 50 us and 400 for each weight there is; 100 us besides the layers."""
    sparse_us = 50.0 + 400.0 * (1.0 - share)
    layers = {
        "first": planned(PROBLEM, direct=60.0, dense=80.0),
        "a": planned(PROBLEM, direct=sparse_us, dense=200.0),
        "b": planned(PROBLEM, direct=sparse_us, dense=90.0),
    }
    total = sum(plan.time_us or 0.0 for plan in layers.values())
    return network({"first": 0.0, "a": share, "b": share}, layers, 100.0 + total)


def a_forecast() -> escort.Forecast:
    return from_plans([at(0.5), at(0.8), at(0.95)], {"a": 0.0, "b": 0.1}, 2.0)


def test_a_curve_is_linear_between_and_beyond_its_points() -> None:
    curve = Curve.of([(0.5, 250.0), (0.05, 70.0), (0.2, 130.0)])
    assert [curve(density) for density in (0.05, 0.1, 0.35, 0.5, 0.02, 1.0)] == pytest.approx(
        [70, 90, 190, 250, 58, 450]
    )
    assert Curve.of([(0.2, 3.0), (0.2, 5.0)])(0.9) == 4.0
    steep = Curve.of([(0.1, 10.0), (0.2, 30.0)])  # which would take less than nothing
    assert steep(0.05) == pytest.approx(5.0) and steep(0.0) == 0.0
    falling = Curve.of([(0.1, 12.0), (0.2, 10.0)])
    assert (falling(0.05), falling(0.9)) == (12.0, 10.0)


def test_where_a_time_begins_to_win_and_where_it_levels_off() -> None:
    def time_us(share: float) -> float:
        return 100.0 + 1000.0 * (1.0 - share)

    assert wins_from(time_us, 305.0) == pytest.approx(0.80)
    assert wins_from(time_us, 1000.0) == 0.5
    assert wins_from(time_us, 110.0) is None
    assert knee(time_us) == pytest.approx(0.96)  # from 0.95 on nonzeros take less than half of what is fixed
    assert knee(lambda share: 1000.0 * (1.0 - share)) is None
    assert knee(lambda share: 7.0) == 0.5


def test_a_forecast_finds_the_law_that_was_measured() -> None:
    found = a_forecast()
    assert found.error == pytest.approx(0.0, abs=1e-9) and found.dense_spread == 0.0
    assert found.measured == pytest.approx((0.5, 0.8, 0.95)) and found.seconds == 2.0
    assert found.time_us(0.7) == pytest.approx(100.0 + 60.0 + 170.0 + 90.0)  # b by the dense library
    assert found.time_us(0.98) == pytest.approx(100.0 + 60.0 + 58.0 + 58.0)
    assert found.speedup(0.98) == pytest.approx(1000.0 / 276.0)
    first, a, b = found.layers
    assert (first.is_pruned, first.wins_from, first.time_us(0.9)) == (False, None, 60.0)
    assert (a.wins_from, b.wins_from) == (pytest.approx(0.63), pytest.approx(0.91))
    assert (b.method(0.7), b.method(0.95), b.zeros) == ("dense", "direct", 0.1)


def test_a_forecast_takes_shares_by_layer() -> None:
    found = a_forecast()
    assert found.time_us({"a": 0.9, "b": 0.98, "odd": 0.9, "overall": 0.9}) == pytest.approx(100 + 60 + 90 + 58)
    assert found.time_us({"a": 0.9}) == pytest.approx(100 + 60 + 90 + 90)  # b stays as it is
    with pytest.raises(ValueError, match="there is no layer c; the layers are first, a, b"):
        found.time_us({"c": 0.9})


@pytest.mark.parametrize("share", [90, -0.5, float("nan"), "0.9", None])
def test_what_is_no_share_of_zeros(share: Any) -> None:
    found = a_forecast()
    for given in (share, {"a": share}):
        with pytest.raises(ValueError, match="a share of zeros is between 0 and 1"):
            found.speedup(given)


def test_a_forecast_says_how_far_off_it_was_in_between() -> None:
    off = replace(at(0.8), converted_time_us=1.25 * at(0.8).converted_time_us)
    assert from_plans([at(0.5), off, at(0.95)], {"a": 0.0, "b": 0.0}).error == pytest.approx(0.2)


def test_a_network_that_gains_nothing_is_said_to() -> None:
    slow = [replace(at(share), dense_time_us=150.0) for share in (0.5, 0.8, 0.95)]
    found = from_plans(slow, {"a": 0.0, "b": 0.0})
    assert found.wins_from is None and found.speedup(0.98) == 1.0
    assert "the original is kept" in str(found)


def test_shares_below_what_is_pruned_already_have_no_forecast() -> None:
    found = from_plans([at(0.9), at(0.9), at(0.95)], {"a": 0.9, "b": 0.9})
    assert found.zeros == pytest.approx(0.9) and (found.wins_from, found.knee) == pytest.approx((0.9, 0.9))
    by_share = {row[0]: row[1] for row in network_table(found).rows}
    assert [by_share[share] for share in ("50%", "80%", "90%")] == ["-", "-", "340"]
    first, a, _ = layer_table(found).rows
    assert first[4:11] == ("60",) * 7 and a[4:9] == (*("-",) * 4, "90")
    data = found.to_json()
    for points in (data["network"], data["layers"][1]["times"]):
        assert [point["sparsity"] for point in points] == [0.9, 0.95, 0.98]
    assert [figure.heading for figure in charts(found)] == ["Speed by zeros", "The layers that take longest"]


def test_bad_input_is_refused_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    escort.prune.uniform(model, 0.9)
    with pytest.raises(TypeError, match="there is no tensor in None"):
        escort.forecast(model, None)
    assert not caplog.records


def test_a_forecast_is_shown_and_written(tmp_path: Path) -> None:
    found = a_forecast()
    text = " ".join(str(found).split())
    assert "Forecast per layer" in text and "it says nothing of accuracy" in text
    assert '<th scope="row">first</th>' in found._repr_html_()
    for name, error in (("forecast.json", ValueError), ("nowhere/forecast.html", FileNotFoundError)):
        with pytest.raises(error):
            found.write(tmp_path / name)
    assert not list(tmp_path.iterdir())
    beside = found.write(tmp_path / "forecast.html")
    assert beside == tmp_path / "forecast.json"
    data = json.loads(beside.read_text())
    assert data == json.loads(json.dumps(found.to_json())) and data["network"][-1]["time_us"] == pytest.approx(276.0)
    assert [layer["wins_from"] for layer in data["layers"]] == [None, 0.63, 0.91]
    page = (tmp_path / "forecast.html").read_text()
    assert page.count("<svg") == 2 and "nothing of accuracy" in page and "http" not in page.split("</style>")[1][:200]


def test_a_model_is_forecast_and_not_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = escort.forecast(model, torch.randn(1, 3, 12, 12))
    assert [(layer.name, layer.is_pruned, layer.zeros) for layer in found.layers] == [
        ("0", False, 0.0),
        ("2", True, 0.0),
    ]
    assert found.measured == pytest.approx((0.5, 0.8, 0.95), abs=1e-3) and found.speedup(0.9) >= 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model[2]._buffers


def test_there_must_be_something_to_prune() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)).eval()
    with pytest.raises(ValueError, match=r"there is nothing to prune: 0, 1 stay dense .* pass skip=\(\)"):
        escort.forecast(model, torch.randn(1, 3, 8, 8))


def law(problem: Problem, share: float) -> float:
    """A layer's time where 1000 numbers that are read or written take 1 us, and 10,000 products."""
    outputs = problem.batch * problem.out_height * problem.out_width
    values = outputs * problem.out_channels + problem.batch * problem.in_channels * problem.height * problem.width
    products = outputs * problem.out_channels * problem.in_channels * 9 * (1.0 - share)
    return values / 1000.0 + products / 10000.0


def test_the_advice_is_what_the_times_of_all_layers_say() -> None:
    small = replace(PROBLEM, in_channels=16, out_channels=16)
    shares = {"good": 0.95, "lacks": 0.8, "bound": 0.9}
    layers = {
        "good": planned(PROBLEM, direct=law(PROBLEM, 0.95), dense=6.0 * law(PROBLEM, 0.95)),
        "lacks": planned(PROBLEM, direct=law(PROBLEM, 0.8), dense=2.0 * law(PROBLEM, 0.8)),
        "bound": planned(small, direct=law(small, 0.9), dense=law(small, 0.9)),
    }
    gain = wanted_gain(layers)
    lacks, bound = holding_back(layers, shares)
    assert (lacks.name, bound.name, bound.needed) == ("lacks", "bound", None)
    assert lacks.needed is not None
    aim = 2.0 * law(PROBLEM, 0.8) / gain
    assert law(PROBLEM, lacks.needed) <= aim < law(PROBLEM, lacks.needed - 0.01)
    assert lacks.saved_us == pytest.approx(law(PROBLEM, 0.8) - law(PROBLEM, lacks.needed))
    table = advice_table(layers, shares)
    assert table is not None and table.rows[0][5] == f"{lacks.needed:.0%}" and table.rows[1][5] == "not by zeros"


def test_there_is_no_advice_where_nothing_is_known_or_all_gain_alike() -> None:
    assert advice_table({}, {}) is None
    alike = planned(PROBLEM, direct=10.0, dense=30.0)
    assert advice_table({"a": alike, "b": alike}, {"a": 0.9, "b": 0.9}) is None
    held = holding_back({"a": alike, "b": planned(PROBLEM, dense=30.0)}, {"a": 0.9})
    assert [(each.name, each.needed, each.saved_us, each.zeros) for each in held] == [("b", None, 0.0, None)]


def test_the_report_of_a_conversion(tmp_path: Path) -> None:
    plan = at(0.8)
    plan_page.write(plan, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.index(">b<") < page.index(">first<")  # what takes longest comes first
    assert "What to do next" in page and "53%" in page and "<svg" in page
    kept = [section.heading for section in plan_page.sections(replace(plan, kept_dense=True))]
    assert kept[:2] == ["In short", "Why the original was kept"]
    assert "What to do next" in plan._repr_html_() and "Plan per layer" in plan._repr_html_()
    assert plan_page.zeros(replace(plan, sparsities={})) is None


def test_a_plan_knows_the_zeros_of_its_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    escort.prune.uniform(model, 0.75, skip="0")
    plan = escort.convert(model, torch.randn(1, 3, 8, 8)).plan
    assert plan.sparsities == {"0": 0.0, "2": 0.75}
    assert NetworkPlan.from_json(plan.to_json()).sparsities == plan.sparsities
    assert NetworkPlan.from_json({**plan.to_json(), "sparsities": {}}).sparsities == {}
