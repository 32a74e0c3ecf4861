"""The study: which rows each question has, how a run goes on, and what the command does. No speed is asserted."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import breakdown, counters, study, suite
from benchmarks.__main__ import app
from benchmarks.result_files import Item, Result, read_results
from benchmarks.study import Study
from benchmarks.suite import Layer, Row
from escort import methods, reference
from escort.filter import SparseFilter
from escort.methods.cuda.sparse_tc.config import ELEMENTS
from escort.methods.cuda.sparse_tc.split import split
from escort.problem import Precision, Problem

SMALL = "inception_5?/5x5"  # two layers on 7x7 maps, of the same group of shapes but for the channels
QUICK = Study("cpu", ("googlenet",), 1, SMALL, (0.5, 0.95), 3, 0.0)


@pytest.fixture(autouse=True)
def forget() -> None:
    QUICK.raced.clear()


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 5)
    )


TINY = {"googlenet": SimpleNamespace(factory=tiny, input_size=(3, 8, 8))}


def measured(items: Sequence[Item]) -> list[Row]:
    return [row for item in items for row in item.measure()]


def a_row(label: str = "a", time_us: float = 1.0) -> Row:
    return Row("googlenet", "paper", label, 1, "fp32", "direct", {}, time_us, 0.0)


def write_patterns(folder: Path, name: str = "net_l1") -> Path:
    """Two layers of 8 filters for 4 channels, 3x3 on 6x6 maps."""
    layer = {"shape": [6, 6, 4, 8, 3, 1, 1, 1], "indptr": range(0, 17, 2), "indices": [3, 21] * 8}
    np.savez(
        folder / f"{name}.npz", **{f"conv{i}.{key}": np.array(part) for i in (1, 2) for key, part in layer.items()}
    )
    return folder / f"{name}.npz"


# --- questions


def test_every_method_runs_on_every_layer() -> None:
    rows = measured(study.compare(QUICK, "fp32"))
    assert {row.layer for row in rows} == {"inception_5a/5x5", "inception_5b/5x5"}
    assert {row.method for row in rows} == {"direct", "dense", "lowered"}
    assert all(row.weights == "paper" and row.batch == 1 and row.time_us > 0 for row in rows)
    assert all(row.rel_error <= reference.ERROR_BOUND["fp32"] for row in rows)
    assert sum(row.method == "direct" and row.layer == "inception_5a/5x5" for row in rows) <= QUICK.search


def test_the_papers_batch_is_the_default() -> None:
    assert QUICK.images("googlenet") == 1
    assert {name: Study().images(name) for name in Study().networks} == {
        "caffenet": 128,
        "googlenet": 128,
        "resnet50": 32,
    }


@dataclass(frozen=True)
class Knobs:
    size: int = 2
    balanced: bool = True
    depth: int = 1


class Fake(methods.Method):
    """A method with knobs."""

    name, device_type, config_type = "direct", "cpu", Knobs

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[Knobs]:
        return Knobs(), Knobs(size=4), Knobs(depth=3)

    def prepare(self, problem: Problem, sparse_filter: SparseFilter, bias: Any, config: Knobs) -> methods.Prepared:
        weight = sparse_filter.to_dense()
        return methods.Prepared(lambda x, residual=None: reference.conv2d(problem, x, weight).float())


class Compiled(Fake):
    """Compiles a kernel for each filter, as it were."""

    compiles_per_filter = True

    def __init__(self) -> None:
        self.prepared: list[tuple[int, Knobs]] = []

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: Knobs) -> float:
        return 1.0

    def prepare(self, problem: Problem, sparse_filter: SparseFilter, bias: Any, config: Knobs) -> methods.Prepared:
        self.prepared.append((problem.in_channels, config))
        return super().prepare(problem, sparse_filter, bias, config)


def test_what_is_compiled_is_compiled_for_all_layers_before_the_first_is_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    method, at_the_first_race = Compiled(), list[int]()
    race = suite.measure_layer
    monkeypatch.setattr(study, "for_device", lambda device: [method])

    def watched(*args: Any, **given: Any) -> list[Row]:
        at_the_first_race.append(len(method.prepared))
        return race(*args, **given)

    monkeypatch.setattr(suite, "measure_layer", watched)
    first, second = study.compare(QUICK, "fp32")
    assert len(first.measure()) == len(second.measure()) == 3
    assert at_the_first_race[0] == 6, "three configs of two layers"
    assert len(method.prepared) == len(set(method.prepared)) == 6, "each once"


class Knowing(Fake):
    """Says itself which configurations are next to one."""

    def neighbours(self, config: Knobs, problem: Problem, sparse_filter: SparseFilter) -> dict[str, list[Knobs]]:
        return {
            "size": [replace(config, size=size) for size in (1, 8)],
            "balanced": [replace(config, balanced=not config.balanced)],
        }


@pytest.mark.parametrize("method", methods.for_device("cpu"), ids=lambda method: method.name)
def test_neighbours_differ_in_one_field(method: methods.Method) -> None:
    layer = suite.paper_layers(1)[0]
    for config in method.configs(layer.problem, layer.filter):
        for name, changed in method.neighbours(config, layer.problem, layer.filter).items():
            for other in changed:
                assert [f.name for f in fields(config) if getattr(config, f.name) != getattr(other, f.name)] == [name]


def test_neighbours_take_the_values_of_the_search_space_or_what_the_method_says() -> None:
    layer = suite.paper_layers(1)[0]
    assert Fake().neighbours(Knobs(), layer.problem, layer.filter) == {
        "size": [Knobs(size=4)],
        "balanced": [],
        "depth": [Knobs(depth=3)],
    }
    assert Knowing().neighbours(Knobs(), layer.problem, layer.filter)["size"] == [Knobs(size=1), Knobs(size=8)]


def test_the_ablation_changes_one_field_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "by_name", lambda name, device: Knowing())
    items = study.ablate(QUICK, "fp32")
    assert len(items) == 1  # one size of map
    base, *changes = measured(items)
    changed = [{k: v for k, v in row.config.items() if v != base.config[k]} for row in changes]
    assert changed == [{"size": 1}, {"size": 8}, {"balanced": False}]


def test_an_ablation_without_its_base_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "by_name", lambda name, device: Knowing())
    race = suite.measure_layer
    calls = iter((slice(None), slice(1, None)))  # the first row of the second race is missing
    monkeypatch.setattr(suite, "measure_layer", lambda *args, **options: race(*args, **options)[next(calls)])
    with pytest.raises(RuntimeError, match="could not be timed again"):
        measured(study.ablate(QUICK, "fp32"))


def test_the_ablation_of_the_cpu_method() -> None:
    base, *changes = measured(study.ablate(QUICK, "fp32"))
    assert changes and all(sum(v != base.config[k] for k, v in row.config.items()) == 1 for row in changes)


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


def test_whole_networks_at_every_sparsity() -> None:
    rows = measured(study.sweep_networks(replace(QUICK, factories=TINY), "fp32"))
    assert {row.weights for row in rows} == {"random-0.50", "random-0.95"}
    assert {row.method for row in rows} == {"escort", "eager"}
    assert all((row.network, row.layer) == ("googlenet", "all") for row in rows)


def test_networks_on_a_gpu_race_against_graphs_and_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(study, "_pruned", lambda *_: (None, None))
    monkeypatch.setattr(suite, "measure_network", lambda *_, **options: asked.append(options) or [])
    measured(study.sweep_networks(replace(QUICK, device="cuda:0", sparsities=(0.9,)), "fp16"))
    (options,) = asked
    assert (options["network"], options["weights"], options["precision"]) == ("googlenet", "random-0.90", "fp16")
    assert options["against"] == ("graph", "compile")


def test_a_breakdown_has_every_part_of_layers_and_networks() -> None:
    rows = measured(study.break_down(replace(QUICK, factories=TINY), "fp32"))
    runs: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        runs.setdefault((row.layer, row.method), {})[row.config["part"]] = row.time_us
    assert all(tuple(parts) == breakdown.PARTS for parts in runs.values())
    assert {method for layer, method in runs if layer == "all"} == {"escort", "eager"}
    lowered, direct = runs["inception_5a/5x5", "lowered"], runs["inception_5a/5x5", "direct"]
    assert lowered["im2col"] > 0 and lowered["product"] > 0 and lowered["direct"] == 0
    assert direct["direct"] > 0 and direct["im2col"] == direct["product"] == direct["padding"] == 0
    assert runs["all", "eager"]["product"] > 0 and runs["all", "eager"]["direct"] == 0


def test_what_the_device_did_is_told_apart_by_name() -> None:
    def event(name: str, time_us: float, device: str = "CUDA", annotation: bool = False) -> SimpleNamespace:
        elapsed = SimpleNamespace(elapsed_us=lambda: time_us)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, time_range=elapsed, is_user_annotation=annotation)

    events = [
        event("direct", 1.0),
        event("void at::native::im2col_kernel<float>(long, float const*)", 2.0),
        event("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32", 4.0),
        event("void cusparse::csrmm_v2_kernel<float>", 8.0),
        event("void cudnn::winograd_nonfused::winogradForwardData4x4<float>", 16.0),
        event("void cudnn::ops::nchwToNhwcKernel<float>", 32.0),
        event("void at::native::vectorized_elementwise_kernel<4>", 64.0),
        event("aten::conv2d", 1000.0, device="CPU"),
        event("escort::direct", 1000.0),
        event("ProfilerStep#1", 1000.0, annotation=True),
    ]
    times = dict.fromkeys(breakdown.PARTS, 0.0)
    for part, time_us in breakdown.kernel_times(events):
        times[part] += time_us
    assert times == {"padding": 0.0, "im2col": 2.0, "product": 28.0, "direct": 1.0, "other": 96.0}


def test_operators_belong_to_the_part_that_calls_them() -> None:
    pad = SimpleNamespace(name="aten::constant_pad_nd", cpu_parent=None, self_cpu_time_total=1.0)
    copy = SimpleNamespace(name="aten::copy_", cpu_parent=pad, self_cpu_time_total=2.0)
    relu = SimpleNamespace(name="aten::relu", cpu_parent=None, self_cpu_time_total=4.0)
    assert list(breakdown.operator_times([pad, copy, relu])) == [("padding", 1.0), ("padding", 2.0), ("other", 4.0)]


def test_the_parts_of_a_run_sum_to_its_time() -> None:
    x = torch.randn(300, 300)
    times = breakdown.part_times(lambda: torch.relu(nn.functional.pad(x @ x, (1, 1))), "cpu")
    assert times["product"] > 0 and times["padding"] > 0 and times["other"] > 0
    assert times["im2col"] == times["direct"] == 0


# --- hardware counters

NCU = """==PROF== Connected to process 7
escort says something
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python","h","zero","1","7","(256, 1, 1)","(1, 1, 1)","0","9.0","c","gpu__time_duration.sum","ns","900"
"1","7","python","h","direct","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","c","gpu__time_duration.sum","ns","21,500"
"1","7","python","h","direct","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","c","smsp__inst_executed.sum","inst","1,234"
"1","7","python","h","direct","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","c","not__there.sum","","n/a"
"""


def test_counters_are_those_of_the_longest_launch() -> None:
    expected = {"gpu__time_duration.sum": 21500.0, "smsp__inst_executed.sum": 1234.0}
    assert counters.longest_launch(NCU) == expected
    with pytest.raises(RuntimeError, match="no launch; it said: ==WARNING== No kernels"):
        counters.longest_launch("==WARNING== No kernels were profiled.")


def test_counter_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        seen.append(words)
        return SimpleNamespace(stdout=NCU, stderr="", returncode=0)

    monkeypatch.setattr(counters.subprocess, "run", run)
    (row,) = measured(study.count(QUICK, "fp32"))
    assert row.time_us == 21.5 and row.config["counters"] == {"smsp__inst_executed.sum": 1234.0}
    assert 0 <= row.rel_error <= reference.ERROR_BOUND["fp32"]
    what = json.loads(seen[0][-1])
    assert (what["network"], what["layer"], what["dtype"]) == ("googlenet", "inception_5a/5x5", "fp32")
    assert {**what["config"], "counters": row.config["counters"]} == row.config
    assert seen[0][:3] == ["ncu", "--clock-control", "none"]


@pytest.mark.parametrize(
    ("said", "code", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, "for administrators"),
        ("==ERROR== Failed to find metric x", 1, "ncu failed on .*Failed to find metric x"),
    ],
)
def test_counters_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, said: str, code: int, message: str) -> None:
    done = SimpleNamespace(stdout="", stderr=said, returncode=code)
    monkeypatch.setattr(counters.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match=message):
        measured(study.count(QUICK, "fp32"))


# --- running, going on


def work_of(*items: Item, stem: str = "layers-fp32") -> dict[str, list[Item]]:
    return {stem: list(items)}


def test_rows_are_kept_item_by_item(tmp_path: Path) -> None:
    path = tmp_path / "layers-fp32.json"

    def second() -> list[Row]:
        now = Result.read(path)
        assert [row.layer for row in now.rows] == ["a"] and now.header["finished"] == ["a"]
        assert not now.header["complete"]
        return [a_row("b")]

    assert study.run(QUICK, work_of(Item("a", lambda: [a_row("a")]), Item("b", second)), tmp_path, "escort paper") == {}
    result = Result.read(path)
    assert result.header["complete"] and [row.layer for row in result.rows] == ["a", "b"]
    assert result.header["command"] == "escort paper" and result.header["study"] == QUICK.conditions()
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    def cut_off() -> list[Row]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(QUICK, work_of(Item("a", lambda: [a_row("a")]), Item("b", cut_off)), tmp_path, "escort paper")
    never = Item("a", lambda: pytest.fail("measured again"))
    study.run(QUICK, work_of(never, Item("b", lambda: [a_row("b")])), tmp_path, "escort paper")
    assert [row.layer for row in Result.read(tmp_path / "layers-fp32.json").rows] == ["a", "b"]
    anew = work_of(Item("a", lambda: [a_row("a", 7.0)]))
    study.run(QUICK, anew, tmp_path, "escort paper", again=True)
    assert [row.time_us for row in Result.read(tmp_path / "layers-fp32.json").rows] == [7.0]


def test_what_was_raced_before_is_not_raced_again(tmp_path: Path) -> None:
    (item, _) = study.compare(QUICK, "fp32")
    study.run(QUICK, work_of(item), tmp_path, "escort paper")
    later = replace(QUICK, raced={})
    study.run(later, work_of(Item("a", lambda: []), stem="ablation-fp32"), tmp_path, "escort paper")
    assert later.raced["googlenet", "inception_5a/5x5", 1, "fp32"] == Result.read(tmp_path / "layers-fp32.json").rows
    other = replace(QUICK, search=QUICK.search + 1, raced={})
    with pytest.raises(ValueError, match="another study"):
        study.run(other, work_of(Item("a", lambda: []), stem="ablation-fp32"), tmp_path, "escort paper")
    study.run(other, work_of(Item("a", lambda: []), stem="break-even-fp32"), tmp_path, "escort paper")
    assert not other.raced, "what does not start from it takes another study's folder"


def test_an_item_that_fails_is_named_and_tried_again(tmp_path: Path) -> None:
    def fail() -> list[Row]:
        raise RuntimeError("wrong result")

    work = work_of(Item("a", fail), Item("b", lambda: [a_row("b")]))
    assert study.run(QUICK, work, tmp_path, "escort paper") == {"layers-fp32, a": "RuntimeError: wrong result"}
    result = Result.read(tmp_path / "layers-fp32.json")
    assert result.header["failed"] == {"a": "RuntimeError: wrong result"} and not result.header["complete"]
    assert study.run(QUICK, work_of(Item("a", lambda: [a_row("a")])), tmp_path, "escort paper") == {}
    assert [row.layer for row in Result.read(tmp_path / "layers-fp32.json").rows] == ["b", "a"]


def test_what_is_left_out_is_named_in_the_header(tmp_path: Path) -> None:
    def measure() -> list[Row]:
        warnings.warn("direct {} is left out: out of device memory", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return [a_row("a")]

    with pytest.warns(UserWarning, match="something else"):
        study.run(QUICK, work_of(Item("a", measure)), tmp_path, "escort paper")
    header = Result.read(tmp_path / "layers-fp32.json").header
    assert header["left_out"] == ["direct {} is left out: out of device memory"]


def test_results_of_another_study_are_not_mixed(tmp_path: Path) -> None:
    study.run(QUICK, work_of(Item("a", lambda: [a_row("a")])), tmp_path, "escort paper")
    with pytest.raises(ValueError, match="another study .*--again"):
        study.run(replace(QUICK, seed=1), work_of(Item("b", lambda: pytest.fail("measured"))), tmp_path, "escort paper")
    (tmp_path / "layers-fp32.json").write_text("{}")
    with pytest.raises(ValueError, match=r"layers-fp32\.json is not a result file"):
        study.run(QUICK, work_of(), tmp_path, "escort paper")


def test_sparse_methods_meet_the_dense_one_on_real_patterns(tmp_path: Path) -> None:
    files = write_patterns(tmp_path), write_patterns(tmp_path, "net_l2")
    asked = replace(QUICK, layers="conv2,other", patterns=files, batch=2)
    items = study.compare_on_patterns(asked, "fp32")
    assert [item.label for item in items] == ["net_l1 conv2 N=2", "net_l2 conv2 N=2"]
    rows = measured(items)
    assert {(row.weights, row.layer, row.batch) for row in rows} == {("net_l1", "conv2", 2), ("net_l2", "conv2", 2)}
    assert {row.method for row in rows} == {"direct", "dense"}
    with pytest.raises(ValueError, match=r"net_l1\.npz: no layer is named like conv3; there are conv1, conv2"):
        study.compare_on_patterns(replace(asked, layers="conv3"), "fp32")
    with pytest.raises(ValueError, match="name them with --patterns"):
        study.compare_on_patterns(QUICK, "fp32")


def test_questions_share_their_files() -> None:
    both = [part for question in ("rq1", "rq3") for part in study.QUESTIONS[question]]
    assert list(study.plan(QUICK, both)) == ["layers-fp32"]
    assert list(study.plan(replace(QUICK, device="cuda:0"), both)) == [
        f"layers-{dtype}" for dtype in ("fp32", "fp16", "tf32", "bf16")
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
def test_every_question_on_a_gpu(tmp_path: Path) -> None:
    files = (write_patterns(tmp_path),)
    on_gpu = replace(QUICK, device="cuda:0", batch=2, factories=TINY, raced={}, layers=f"{SMALL},conv?", patterns=files)
    parts = [part for question in study.QUESTIONS.values() for part in question]
    dtypes = ("fp32", "fp16")
    assert study.run(on_gpu, study.plan(on_gpu, parts, dtypes), tmp_path, "escort paper") == {}
    found = read_results(tmp_path)
    assert set(found) == {f"{part.stem}-{dtype}" for part in parts for dtype in dtypes}
    for result in found.values():
        assert result.header["complete"] and result.rows and result.header["gpu"]
    own = {"direct", "generated", *(["sparse_tc"] if torch.cuda.get_device_capability() == (9, 0) else [])}
    assert {row.method for row in found["layers-fp16"].rows} == {*own, "cublas", "cusparse", "cudnn"}
    assert {row.method for row in found["patterns-fp16"].rows} == {*own, "cudnn"}
    assert {"escort", "eager", "graph"} <= {row.method for row in found["networks-fp16"].rows}
    for stem in ("breakdown-fp32", "breakdown-fp16"):
        spent = {(row.method, row.config["part"]) for row in found[stem].rows if row.time_us > 0}
        assert {("direct", "direct"), ("cublas", "im2col"), ("cublas", "product"), ("cudnn", "product")} <= spent


# --- the command


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, ["paper", *map(str, args)])


SMALL_RUN = (
    "--device",
    "cpu",
    "--networks",
    "googlenet",
    "--layers",
    "inception_5a/5x5",
    "--batch",
    1,
    "--budget-s",
    0,
)


def test_the_command_measures_tells_and_renders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = (*SMALL_RUN, "--questions", "rq1,rq2", "--search", 2, "--out", out)
    result = invoke(*run)
    assert result.exit_code == 0, result.output
    assert "Sums over the pruned layers" in result.output
    written = {path.name for path in out.iterdir()}
    assert {"layers-fp32.json", "ablation-fp32.json", "report.html", "speedup-googlenet-fp32.svg"} <= written
    before = (out / "layers-fp32.json").read_text()

    told = json.loads(invoke(*run, "--json").stdout)
    assert json.loads(before)["rows"] == told["rows"]["layers-fp32"] and told["failures"] == {}
    assert told["tables"]["totals"][0]["Layers"] == "1 of 19"

    document = tmp_path / "paper.md"
    image = "![bars](speedup-googlenet-fp32.svg)"
    document.write_text(f"# Report\n\n<!-- table: totals -->\nold\n<!-- end -->\n\n{image}\n")
    plots = tmp_path / "plots"
    result = invoke("--render", out, "--into", document, "--out", plots)
    assert result.exit_code == 0, result.output
    assert "| googlenet |" in document.read_text() and "old" not in document.read_text()
    assert (plots / "report.html").is_file()
    drawn = {path.read_text() for path in tmp_path.rglob("speedup-googlenet-fp32.svg")}
    assert len(drawn) == 1 and (tmp_path / "speedup-googlenet-fp32.svg").is_file()


def test_the_command_takes_files_of_patterns(tmp_path: Path) -> None:
    path = write_patterns(tmp_path)
    options = ("--device", "cpu", "--budget-s", 0, "--search", 1, "--batch", 1, "--out", tmp_path / "out")
    result = invoke("--questions", "patterns", "--patterns", path, "--layers", "conv1", *options)
    assert result.exit_code == 0, result.output
    assert read_results(tmp_path / "out")["patterns-fp32"].header["finished"] == ["net_l1 conv1 N=1"]
    result = invoke("--questions", "patterns", *options)
    assert result.exit_code == 2 and "name them with --patterns FILE.npz" in result.stderr


def test_without_ncu_the_command_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.shutil, "which", lambda _: None)
    result = invoke(*SMALL_RUN, "--questions", "rq1", "--ncu", "--search", 1, "--out", tmp_path)
    assert result.exit_code == 0 and "ncu is not on the PATH" in result.stderr


def test_a_failure_is_told_and_ends_in_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[Row]:
        raise RuntimeError("wrong result")

    monkeypatch.setattr(suite, "measure_layer", fail)
    result = invoke(*SMALL_RUN, "--questions", "rq1", "--out", tmp_path)
    assert result.exit_code == 1
    assert "failed: layers-fp32, googlenet inception_5a/5x5 N=1: RuntimeError: wrong result" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--questions", "rq9"), "--questions: there is no 'rq9'; there are rq1"),
        (("--device", "cpu", "--networks", "alexnet"), "--networks: there is no 'alexnet'"),
        (("--device", "tpu"), "'tpu' is no device"),
        (("--device", "cpu", "--dtype", "fp16"), "compute in fp32, not in fp16"),
        (("--device", "cpu", "--sparsity", "most"), "shares of zeros such as 0.9"),
        (("--into", "paper.md"), "--into goes with --render"),
        (("--render", "nowhere"), "nowhere holds no results of a study"),
    ],
)
def test_bad_input(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = invoke(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_default_device_is_a_gpu(tmp_path: Path) -> None:
    result = invoke("--out", tmp_path)
    assert result.exit_code == 2 and "use cpu" in result.stderr


@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_patterns_have_their_channels_in_the_order_of_a_network_in_channels_last(dtype: Precision) -> None:
    def layer(name: str, kernel: int, out_channels: int, stride: int, channels: int = 64) -> Layer:
        geometry = (kernel, kernel), (stride, stride), (kernel // 2,) * 4
        problem = Problem(2, channels, 7, 7, out_channels, *geometry, precision=dtype, device="cuda:0")
        return Layer("resnet50", "tiny", name, problem, suite.random_filter(problem, 0.8, seed=out_channels))

    layers = [
        layer("spatial", 3, 32, 1),
        layer("expand", 1, 128, 1),
        layer("reduce", 1, 32, 1),
        layer("downsample", 1, 128, 2),
        layer("last", 1, 64, 1, channels=128),  # of a sum that no other stage reads
    ]
    ordered, element = study.in_order_of_channels_last(layers), ELEMENTS[dtype]
    for before, after in zip(layers, ordered, strict=True):
        shares = [split(each.filter, element.kept, element.of).share for each in (before, after)]
        assert shares[1] == shares[0] if before.name == "last" else shares[1] < 0.9 * shares[0], before.name
        assert np.array_equal(np.sort(after.filter.values), np.sort(before.filter.values))
    orders = []
    for i in (2, 3):
        before, after = layers[i].filter.to_dense(), ordered[i].filter.to_dense()
        orders.append([next(c for c in range(64) if torch.equal(before[:, c], after[:, p])) for p in range(64)])
    assert orders[0] == orders[1] != list(range(64)), "what reads the same sum has one order"
    strict = replace(layers[0], problem=replace(layers[0].problem, precision="fp32"))
    assert study.in_order_of_channels_last([strict]) == [strict]


def test_methods_that_are_named_are_compared_alone() -> None:
    asked = replace(QUICK, methods=("dense", "lowered"))
    (item, *_) = study.compare(asked, "fp32")
    assert {row.method for row in item.measure()} == {"dense", "lowered"}
    assert asked.conditions()["methods"] == ["dense", "lowered"] and "methods" not in QUICK.conditions()
    with pytest.raises(ValueError, match="there is no method sparse; there are direct, dense, lowered"):
        replace(QUICK, methods=("sparse",))
