"""python -m benchmarks check: what is drawn, by which code it is measured again, and how differences are judged."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checks, suite
from benchmarks.checks import Bench, Drawn, Limits, NotHereError, again
from benchmarks.result_files import Result
from benchmarks.suite import Row
from escort.planner.machine import Machine
from tests.benchmarks.invoking import invoke
from tests.benchmarks.made_up import HEADER, row
from tests.benchmarks.small import write_patterns


def here(**more: Any) -> dict[str, Any]:
    machine = Machine.here()
    return {"device": "cpu", "cpu": machine.device, "isa": machine.isa, "threads": 1, **more}


def layer(times: dict[str, float], **about: Any) -> list[Row]:
    return [row("googlenet", "inception_5a/5x5", method, us, batch=1, **about) for method, us in times.items()]


def subject(rows: list[Row], header: dict[str, Any], file: str = "layers-fp32") -> checks.Subject:
    (found,) = checks.subjects_of({file: Result(header, rows)})
    return found


def test_a_sample_is_of_what_documents_quote() -> None:
    slower = layer({"direct": 9.0, "dense": 50.0})
    one = subject(layer({"direct": 8.0, "dense": 40.0}) + slower, here())
    assert one.times == {("direct", ""): 8.0, ("dense", ""): 40.0}
    assert one.keys == [("dense", "")], "a ratio of ours to itself says nothing"
    on_gpu = subject(layer({"direct": 8.0, "cudnn": 40.0}), HEADER)
    assert on_gpu.keys == [("direct", ""), ("cudnn", "")]


def test_parts_are_summed_and_conversions_are_by_their_caches() -> None:
    parts = [row("caffenet", "conv2", "direct", us, config={"part": part}) for part, us in (("a", 1.0), ("b", 2.0))]
    assert subject(parts, HEADER).times == {("direct", ""): 3.0}
    about = {"weights": "random-0.90", "batch": 1}
    rows = [
        row("resnet50", "all", "convert", us, config={"caches": c, "effort": "fast"}, **about)
        for c, us in (("empty", 9.0), ("filled", 3.0))
    ]
    one = subject(rows, HEADER, "conversions-fp16")
    assert one.times == {("convert", "", "empty", "fast"): 9.0, ("convert", "", "filled", "fast"): 3.0}
    assert {one.clock(key) for key in one.keys} == {"wall"} and one.stem == "conversions"


def test_every_time_is_as_likely_and_a_seed_draws_the_same() -> None:
    results = {f"layers-{p}": Result(HEADER, layer({"direct": 1.0, "cudnn": 2.0})) for p in ("fp32", "fp16", "bf16")}
    subjects = checks.subjects_of(results)
    drawn = checks.draw(subjects, 4, seed=1)
    assert sum(len(each.keys) for each in drawn) == 4 and drawn == checks.draw(subjects, 4, seed=1)
    counts = [len(checks.draw(subjects, 1, seed)[0].keys) for seed in range(20)]
    assert counts == [1] * 20
    files = {checks.draw(subjects, 1, seed)[0].subject.file for seed in range(60)}
    assert files == set(results)
    assert sum(len(each.keys) for each in checks.draw(subjects, 99, seed=1)) == 6


def test_differences_are_of_times_on_gpus_and_of_ratios_elsewhere() -> None:
    before, after = layer({"direct": 10.0, "cudnn": 40.0}), layer({"direct": 10.5, "cudnn": 84.0})
    keys = (("direct", ""), ("cudnn", ""))
    on_gpu = checks.differences_of(Drawn(subject(before, HEADER), keys), after)
    assert [round(each.change, 3) for each in on_gpu] == [0.05, 1.1]
    (ratio,) = checks.differences_of(Drawn(subject(before, here()), keys[1:]), after)
    assert (ratio.clock, ratio.committed, ratio.again, round(ratio.change, 3)) == ("ratio", 4.0, 8.0, 1.0)
    with pytest.raises(RuntimeError, match="direct could not be measured again"):
        checks.differences_of(Drawn(subject(before, here()), keys[1:]), after[1:])


def test_limits_are_of_the_median_and_of_each() -> None:
    def verdict(*changes: float) -> checks.Verdict:
        differences = [checks.Difference("a", "direct", "gpu", 1.0, 1.0 + change) for change in changes]
        (found,) = checks.verdicts(differences, Limits())
        return found

    assert verdict(0.01, -0.02, 0.09).is_within and verdict(0.01, -0.02, 0.09).count == 3
    assert not verdict(0.01, 0.02, -0.11).is_within
    assert not verdict(0.04, -0.04, 0.01).is_within
    (wall,) = checks.verdicts([checks.Difference("a", "convert", "wall", 1.0, 9.0)], Limits())
    assert wall.is_within is None and wall.most == 8.0


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({**HEADER, "gpu": "NVIDIA X9"}, "it was measured on NVIDIA X9"),
        (here(isa="sse"), "with sse, and here is"),
        (here(threads=10_000), f"10000 threads, and here are {len(os.sched_getaffinity(0))} cores"),
    ],
)
def test_what_is_of_another_machine_is_named(header: dict[str, Any], message: str) -> None:
    one = subject(layer({"direct": 1.0, "dense": 2.0}), header)
    with pytest.raises(NotHereError, match=message):
        checks.measure_again(one, one.keys, Bench())


def test_what_is_nothing_of_today_is_named(tmp_path: Path) -> None:
    bench = Bench(patterns=tmp_path)
    for rows, message in (
        (layer({"direct": 1.0, "dense": 2.0}, config={"isa": "none of today"}), "direct .* is nothing of today"),
        (layer({"direct": 1.0, "dense": 2.0}, weights="net_l9"), r"net_l9\.npz"),
        ([replace(each, layer="conv99") for each in layer({"dense": 2.0})], "no layer conv99 today"),
    ):
        one = subject(rows, here())
        with pytest.raises(NotHereError, match=message):
            checks.measure_again(one, [("dense", "")], bench)
    whole = subject([row("resnet50", "all", "escort", 1.0, weights="random-0.90", timer="call")], HEADER, "speed-fp16")
    with pytest.raises(NotHereError, match="with what effort"):
        again._effort(whole)


def measured(tmp_path: Path, *options: Any) -> Path:
    """A file of one small layer, as `layers` writes it."""
    path = tmp_path / "results" / "layers-fp32.json"
    path.parent.mkdir()
    write_patterns(tmp_path)
    run = ("layers", "--patterns", tmp_path / "net_l1.npz", "--layers", "conv1", "--batch", 1, "--search", 2)
    assert invoke(*run, "--output", path).exit_code == 0
    return path.parent


def test_a_folder_is_checked_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = measured(tmp_path)
    out = tmp_path / "check.json"
    options = ("check", folder, "--patterns", tmp_path, "--most", 1e6, "--median", 1e6, "-o", out)
    nothing = invoke(*options, "--seconds", 0)
    assert nothing.exit_code == 0 and "2 of the sample are left" in nothing.stderr
    assert not out.exists()
    done = invoke(*options)
    assert done.exit_code == 0, done.output
    assert "2 ratios to ours of the same run: median" in done.stdout and "within the limits" in done.stdout
    found = json.loads(out.read_text())
    assert {each["what"] for each in found["differences"]} == {"dense", "lowered"}
    assert found["header"]["cpu"] and found["verdicts"][0]["count"] == 2

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("wrong result")

    monkeypatch.setattr(suite, "measure_layer", fail)
    assert invoke(*options).exit_code == 0, "nothing is left to be measured"
    assert invoke(*options[:-4], "--most", 0, "-o", out).exit_code == 1
    assert invoke(*options, "--again").exit_code == 1
    other = invoke(*options, "--sample", 1)
    assert other.exit_code == 2 and "another sample" in other.stderr
    assert invoke("check", tmp_path / "none").exit_code == 2


def test_each_kind_goes_by_the_code_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for name in ("measure_network", "measure_choices", "measure_calls", "measure_conversion"):
        monkeypatch.setattr(suite, name, lambda *args, name=name, **more: asked.append((name, args, more)) or [])
    about = {"weights": "random-0.90-dense-depthwise", "batch": 2, "timer": "call"}
    whole = [row("mobilenet_v2", "all", name, 1.0, **about, rounds_us=(1.0, 2.0)) for name in ("escort", "onnxruntime")]
    one = subject(whole, here(), "mobilenet_v2-random-0.90")
    checks.measure_again(one, one.keys, Bench())
    name, (model, x), more = asked.pop()
    assert name == "measure_network" and len(x) == 2 and more["weights"] == "random-0.90-dense-depthwise"
    assert (list(more["race"].against), more["race"].rounds) == (["onnxruntime"], 2)
    depthwise = [conv for conv in model.modules() if getattr(conv, "groups", 1) > 1]
    assert depthwise and all(conv.weight.ne(0).all() for conv in depthwise)
    about = {"weights": "random-0.90", "batch": 1}
    for method, config, expected in (
        ("convert", {"caches": "empty", "effort": 25.0}, "measure_conversion"),
        ("escort", {"effort": "fast"}, "measure_choices"),
        ("escort", {"layers": 3}, "measure_calls"),
    ):
        one = subject([row("resnet50", "all", method, 1.0, config=config, **about)], here(), "conversions-fp32")
        checks.measure_again(one, one.keys, Bench())
        name, (conversion,), _ = asked.pop()
        assert name == expected and (conversion.sparsity, conversion.device) == (0.9, "cpu")
        assert conversion.effort == config.get("effort", "fast")
