"""Forecasts against what was measured: rows that are made up, small networks, and the aims of the committed file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from torch import nn

from benchmarks.commands import forecast as command
from benchmarks.exhibits.committed import FORECASTS, committed
from benchmarks.exhibits.forecasts import forecast_table, network_forecast_table
from benchmarks.findings.forecasts import checks, errors
from benchmarks.result_files import Result
from benchmarks.suite import Row, Subject, forecasts
from benchmarks.suite.forecasts import SPREADS, Pruned
from escort import prune
from tests.benchmarks.invoking import succeed_json
from tests.benchmarks.made_up import HEADER, cells

ABOUT = {"dense_us": 1000.0, "seconds": 20.0, "wins_from": 0.5, "knee": None}


def rows(weights: str, forecast_us: float, escort_us: float) -> list[Row]:
    subject = "resnet18", weights, "all", 1, "fp32"
    return [
        Row(*subject, "forecast", ABOUT, forecast_us, 0.0),
        Row(*subject, "eager", {"zeros": 0.9}, 1100.0, 0.0),
        Row(*subject, "escort", {"zeros": 0.9}, escort_us, 0.0),
    ]


def by_share() -> list[Row]:
    times_us = {"0.50": 1200.0, "0.90": 250.0}
    return [Row("resnet18", share, "all", 1, "fp32", "forecast", ABOUT, us, 0.0) for share, us in times_us.items()]


def made_up() -> list[Row]:
    pruned = rows("global-0.95", 250.0, 220.0), rows("uniform-0.75", 500.0, 500.0), rows("x", 900.0, 1000.0)
    return by_share() + [row for each in pruned for row in each]


def test_errors_are_of_speedups_that_are_worth_it() -> None:
    found = checks(made_up())
    assert [(check.weights, check.forecast, check.measured) for check in found] == [
        ("global-0.95", 4.0, 5.0),
        ("uniform-0.75", 2.0, pytest.approx(2.2)),
        ("x", pytest.approx(1 / 0.9), pytest.approx(1.1)),
    ]
    middle, worst = errors(found)
    assert (middle, worst) == (pytest.approx((0.2 + 1 / 11) / 2), pytest.approx(0.2))
    with pytest.raises(ValueError, match=r"no network gained 1\.3 times"):
        errors(found[2:])


def test_the_tables_of_forecasts() -> None:
    result = Result(HEADER, made_up())
    first, second, third = cells(forecast_table(result))
    assert (first["Forecast"], first["Measured"], first["Error"]) == ("4.00x", "5.00x", "-20%")
    assert (second["Error"], third["Error"], third["Zeros"]) == ("-9%", "-", "90%")
    assert "the median error is 15%, the worst 20%" in forecast_table(result).caption
    (line,) = cells(network_forecast_table(result))
    assert (line["50%"], line["90%"], line["Wins from"], line["Levels off"]) == (
        "1.00x",
        "4.00x",
        "below 50%",
        "beyond 96%",
    )


def small(network: str) -> Subject:
    sizes = (3, 16, 32, 64, 64)
    layers = [nn.Conv2d(left, right, 3) for left, right in pairwise(sizes)]
    return Subject(network, "random", nn.Sequential(*layers, nn.Conv2d(64, 64, 3, groups=64)), (3, 16, 16))


@pytest.mark.parametrize("spread", SPREADS)
def test_zeros_are_spread_as_the_name_says(spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "load", small)
    pruned = Pruned("small", spread, 1)
    shares = prune.sparsity(pruned.subject().model)
    assert pruned.weights == spread and shares.pop("0") == shares.pop("4") == 0.0
    del shares["overall"]
    kind, *numbers = spread.split("-")
    low = float(numbers[0])
    if kind == "uniform":
        assert list(shares.values()) == pytest.approx([low] * 3, abs=1e-3)
    elif kind == "drawn":
        assert low <= min(shares.values()) < max(shares.values()) <= float(numbers[1])
    else:
        assert min(shares.values()) < low < max(shares.values())


def test_the_command_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "forecast.json"
    asked: list[str] = []

    def measure_forecast(held_to: list[Pruned]) -> list[Row]:
        asked.append("forecast")
        return [*by_share(), *(rows(each.weights, 250.0, 220.0)[0] for each in held_to)]

    def measure_pruned(pruned: Pruned) -> list[Row]:
        asked.append(pruned.weights)
        return rows(pruned.weights, 250.0, 220.0)[1:]

    monkeypatch.setattr(command, "measure_forecast", measure_forecast)
    monkeypatch.setattr(command, "measure_pruned", measure_pruned)
    words = "forecast", "resnet18", "--output", path
    first = succeed_json(*words, "--seconds", 1000)
    assert asked == ["forecast", *SPREADS] and not first["failures"]
    assert len(succeed_json(*words)["rows"]) == len(first["rows"]) and len(asked) == len(SPREADS) + 1


def test_a_process_of_its_own_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "_MOST_OTHERS", 1.0)
    (row,) = forecasts._with_threads(1, lambda what: rows("x", 1.0, 1.0)[:1], None)
    assert row.others is not None
    monkeypatch.setattr(forecasts, "_MOST_OTHERS", -1.0)
    with pytest.raises(RuntimeError, match="run it again in quiet"):
        forecasts._with_threads(1, lambda what: [], None)


def test_the_aims_are_met_by_the_committed_forecasts() -> None:
    found = checks(committed()[FORECASTS].rows)
    assert len({check.network for check in found}) >= 5 and sum(check.counts for check in found) >= 15
    middle, worst = errors(found)
    assert middle <= 0.10 and worst <= 0.25
