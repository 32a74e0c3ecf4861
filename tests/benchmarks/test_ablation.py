"""The ablation changes one field of a configuration at a time."""

from __future__ import annotations

from dataclasses import fields

import pytest

from benchmarks import study, suite
from escort import methods
from tests.benchmarks.small import QUICK, Fake, Knobs, Knowing, measured


@pytest.mark.parametrize("method", methods.for_device("cpu"), ids=lambda method: method.name)
def test_neighbours_differ_in_one_field(method: methods.Method) -> None:
    layer = suite.paper_layers(1)[0]
    for config in method.configs(layer.problem, layer.sparse_filter):
        for name, changed in method.neighbours(config, layer.problem, layer.sparse_filter).items():
            for other in changed:
                assert [f.name for f in fields(config) if getattr(config, f.name) != getattr(other, f.name)] == [name]


def test_neighbours_take_the_values_of_the_search_space_or_what_the_method_says() -> None:
    layer = suite.paper_layers(1)[0]
    assert Fake().neighbours(Knobs(), layer.problem, layer.sparse_filter) == {
        "size": [Knobs(size=4)],
        "balanced": [],
        "depth": [Knobs(depth=3)],
    }
    assert Knowing().neighbours(Knobs(), layer.problem, layer.sparse_filter)["size"] == [Knobs(size=1), Knobs(size=8)]


def test_the_ablation_changes_one_field_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (study.ablation, study.study):
        monkeypatch.setattr(module, "by_name", lambda name, device: Knowing())
    items = study.ablate(QUICK, "fp32")
    assert len(items) == 1  # one size of map
    base, *changes = measured(items)
    changed = [{k: v for k, v in row.config.items() if v != base.config[k]} for row in changes]
    assert changed == [{"size": 1}, {"size": 8}, {"balanced": False}]


def test_an_ablation_without_its_base_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (study.ablation, study.study):
        monkeypatch.setattr(module, "by_name", lambda name, device: Knowing())
    race = suite.measure_layer
    calls = iter((slice(None), slice(1, None)))  # the first row of the second race is missing
    monkeypatch.setattr(suite, "measure_layer", lambda *args, **options: race(*args, **options)[next(calls)])
    with pytest.raises(RuntimeError, match="could not be timed again"):
        measured(study.ablate(QUICK, "fp32"))


def test_the_ablation_of_the_cpu_method() -> None:
    base, *changes = measured(study.ablate(QUICK, "fp32"))
    assert changes and all(sum(v != base.config[k] for k, v in row.config.items()) == 1 for row in changes)
