"""Plans in a file: what was exported is taken in, and a file that breaks a rule is refused as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from escort import cache, methods
from escort.artifact import ArtifactError, export_plans, import_plans, plans
from escort.methods import by_name
from escort.planner import measure, plan_layer, planner, store, timing
from escort.planner.plan import Candidate, Layer
from tests.fakes import PROBLEM, Fake, a_filter

pytestmark = pytest.mark.usefixtures("plan_store", "fake")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The fastest method of the CPU, with two configs."""
    fake = Fake("fake", lambda y: y, configs=2)
    monkeypatch.setattr(methods, "METHODS", (fake, by_name("dense")))
    monkeypatch.setattr(measure, "_HOPELESS", float("inf"))
    monkeypatch.setattr(timing, "race", lambda runs, **_: [float(i + 1) for i in range(len(runs))])
    planner._remembered.clear()
    return fake


@pytest.fixture
def file(tmp_path: Path, fake: Fake) -> Path:
    """What a machine with two plans exports."""
    for batch in (2, 3):
        plan_layer(replace(PROBLEM, batch=batch), a_filter())
    path = tmp_path / "plans.json"
    assert export_plans(path) == 2
    return path


def on_a_new_machine() -> None:
    """What follows is as on another machine of the same kind."""
    planner._remembered.clear()
    cache.clear("plan")


def stored() -> list[tuple[store.Key, store.Hint]]:
    return [found for _, found in store.entries() if found is not None]


def test_what_was_exported_is_taken_in(file: Path, fake: Fake) -> None:
    before = {key: hint.plan for key, hint in stored()}
    on_a_new_machine()
    assert import_plans(file) == (2, 0, 0)
    assert {key: hint.plan for key, hint in stored()} == before and all(hint.imported for _, hint in stored())
    prepared = fake.prepared
    plan = plan_layer(PROBLEM, a_filter())
    assert (plan.method, plan.config, plan.times_from) == ("fake", {"knob": 0}, "plan store")
    assert fake.prepared == prepared + 1
    assert sorted(hint.imported for _, hint in stored()) == [False, True]  # it was validated
    assert import_plans(file) == (1, 1, 0)


def test_the_file_is_json_and_holds_no_binaries(file: Path) -> None:
    content = json.loads(file.read_text())
    assert (content["format"], content["version"]) == ("escort-plans", 1) and len(content["plans"]) == 2
    assert content["plans"][0].keys() == {"plan", "nonzeros", "methods", "compiles", "sources", "cut_at_s"}


def test_own_plans_stay(file: Path) -> None:
    content = json.loads(file.read_text())
    for entry in content["plans"]:
        entry["plan"]["config"] = {"knob": 1}
    file.write_text(json.dumps(content))
    assert import_plans(file) == (0, 2, 0)
    assert all(hint.plan.config == {"knob": 0} for _, hint in stored())


def test_imported_plans_take_no_room_of_what_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three plans two fit; the own one is older, and yet it is the last to go."""
    content = json.loads(file.read_text())
    on_a_new_machine()
    own = replace(PROBLEM, batch=7)
    plan_layer(own, a_filter())
    (path,) = cache.folder().iterdir()
    os.utime(path, (1000, 1000))
    size = path.stat().st_size
    content["plans"].append(json.loads(json.dumps(content["plans"][0])))
    content["plans"][2]["plan"]["problem"]["batch"] = 4
    file.write_text(json.dumps(content))
    monkeypatch.setattr(cache, "limit_bytes", lambda: 3 * size + 50)
    assert import_plans(file) == (2, 0, 1)
    assert import_plans(file) == (2, 0, 1)  # they take the place of themselves
    assert sorted(entry.used for entry, _ in store.entries()) == [0, 0, 1000]
    plan_layer(replace(PROBLEM, batch=5), a_filter())  # makes room
    assert {key.problem.batch for key, hint in stored() if not hint.imported} == {5, 7} and len(stored()) == 2


def test_a_choice_that_the_method_does_not_offer_is_not_tried(file: Path, fake: Fake) -> None:
    """A kernel trusts its config, and a hostile one may have any numbers in it."""
    file.write_text(file.read_text().replace('"knob": 0', '"knob": 1234'))
    on_a_new_machine()
    assert import_plans(file) == (2, 0, 0)
    tried: list[Any] = []
    prepare = fake.prepare
    fake.prepare = lambda *args: (tried.append(args[3]), prepare(*args))[1]  # type: ignore[method-assign]
    plan = plan_layer(PROBLEM, a_filter())
    assert (plan.config, plan.times_from) == ({"knob": 0}, "measured") and {config.knob for config in tried} == {0, 1}


def test_a_choice_that_the_method_refuses_now_is_not_tried(file: Path, fake: Fake) -> None:
    on_a_new_machine()
    import_plans(file)
    fake.refuses = "not on Sundays"
    assert plan_layer(PROBLEM, a_filter()).method == "dense"


def test_a_wrong_choice_is_measured_anew(file: Path, fake: Fake) -> None:
    on_a_new_machine()
    import_plans(file)
    fake.change = lambda y: y * 1.01
    plan = plan_layer(PROBLEM, a_filter())
    assert (plan.method, plan.times_from) == ("dense", "measured")
    own = store.Key.of(Layer(PROBLEM, a_filter()), methods.for_device("cpu"), compiles=False)
    hint = store.load(own)
    assert hint is not None and (hint.plan.method, hint.imported) == ("dense", False)


def test_plans_of_another_machine_take_no_effect(file: Path) -> None:
    file.write_text(file.read_text().replace('"threads": ', '"threads": 7'))
    on_a_new_machine()
    assert import_plans(file) == (2, 0, 0)
    assert plan_layer(PROBLEM, a_filter()).times_from == "measured"


Change = Callable[[dict[str, Any]], object]


def setting(path: str, value: Any) -> Change:
    """A change of the second plan of a file."""

    def change(content: dict[str, Any]) -> None:
        place: Any = content["plans"][1]
        *way, last = path.split(".")
        for name in way:
            place = place[int(name) if name.isdecimal() else name]
        place[last] = value

    return change


HOSTILE: list[tuple[Change, str]] = [
    (lambda content: content.update(format="escort"), "its format is 'escort' 1, not escort-plans 1"),
    (lambda content: content.update(version=2), "its format is 'escort-plans' 2"),
    (lambda content: content.update(version=[1] * 10**5), "its format is 'escort-plans'"),
    (lambda content: content.update(more=1), "it is none that escort cache export wrote"),
    (lambda content: content.update(plans={}), "a list of at most 16,384 plans"),
    (lambda content: content.update(plans=[{}] * ((1 << 14) + 1)), "a list of at most 16,384 plans"),
    (lambda content: content["plans"].append(1), "plan 2: it is no plan"),
    (lambda content: content["plans"].append({}), "plan 2: not a stored plan"),
    (setting("imported", False), "plan 1: it is no plan"),
    (setting("more", 1), "plan 1: a stored plan has the fields .*, got .*more"),
    (setting("nonzeros", -1), "plan 1: nonzeros cannot be -1"),
    (setting("nonzeros", 1e300), "plan 1: nonzeros cannot be 1e"),
    (setting("nonzeros", (1 << 31) - 1), "plan 1: nonzeros cannot be 2147483647: the filter has "),
    (setting("nonzeros", 122), "plan 1: nonzeros cannot be 122"),  # of 8 x 6 x 3 x 3 weights
    (setting("nonzeros", True), "plan 1: nonzeros cannot be True"),
    (setting("methods", ["fake", "eval"]), "plan 1: no method 'eval' on cpu"),
    (setting("methods", ["fake", "dense", "dense"]), "plan 1: its methods are named twice"),
    (setting("methods", ["dense"]), "plan 1: a candidate is of the method fake"),
    (setting("methods", [["dense"]]), "plan 1: methods cannot be"),
    (setting("methods", 5), "plan 1: not a stored plan"),
    (setting("compiles", 1), "plan 1: compiles cannot be 1"),
    (setting("sources", "x" * ((1 << 14) + 1)), "plan 1: sources cannot be 'xxx"),
    (setting("cut_at_s", "soon"), "plan 1: cut_at_s cannot be 'soon'"),
    (setting("cut_at_s", 10**400), "plan 1: "),
    (setting("plan.more", "x"), "plan 1: a stored plan's plan has no field 'more'"),
    (setting("plan.times_from", "plan store"), "plan 1: a stored plan's plan has no field 'times_from'"),
    (setting("plan.is_steady", False), "plan 1: a stored plan's plan has no field 'is_steady'"),
    (setting("plan.method", "eval"), "plan 1: no method 'eval' on cpu"),
    (setting("plan.method", ["fake"]), "plan 1: method cannot be"),
    (setting("plan.config", {"knob": 0, "code": "x"}), "plan 1: not a plan: .*code"),
    (setting("plan.config", {"knob": "0"}), "plan 1: knob cannot be '0'"),
    (setting("plan.config", {"knob": 7}), "plan 1: its choice, fake with .* is none of the candidates"),
    (setting("plan.candidates.0.config", {"knob": "0"}), "plan 1: knob cannot be '0'"),
    (setting("plan.candidates.0.config", {"knob": 1 << 31}), "plan 1: knob cannot be 2147483648"),
    (setting("plan.candidates.0.config", {"bulb": 0}), "plan 1: .*bulb"),
    (setting("plan.candidates.0.config", [0]), "plan 1: config cannot be"),
    (setting("plan.candidates.0.method", "direct"), "plan 1: no method 'direct' on cpu"),
    (setting("plan.candidates.0.time_us", -1.0), "plan 1: time_us cannot be -1.0"),
    (setting("plan.candidates.0.time_us", "1"), "plan 1: time_us cannot be '1'"),
    (setting("plan.candidates.0.time_us", None), "plan 1: its choice, fake with .* is none of the candidates"),
    (setting("plan.candidates.0.reason", "x" * ((1 << 14) + 1)), "plan 1: reason cannot be 'xxx"),
    (setting("plan.candidates.0.timer", "sundial"), "plan 1: timer cannot be 'sundial'"),
    (setting("plan.candidates.0.more", 1), "plan 1: not a plan: .*more"),
    (setting("plan.candidates", []), "plan 1: its choice, fake with .* is none of the candidates"),
    (setting("plan.candidates", [{"method": "fake"}] * ((1 << 14) + 1)), "plan 1: candidates cannot be"),
    (setting("plan.candidates", 3), "plan 1: not a plan"),
    (setting("plan.machine", {}), "plan 1: not a machine"),
    (setting("plan.machine.threads", "2"), "plan 1: not a machine"),
    (setting("plan.machine.threads", -2), "plan 1: threads cannot be -2"),
    (setting("plan.machine.device", "x" * ((1 << 14) + 1)), "plan 1: device cannot be 'xxx"),
    (setting("plan.machine.code", "x"), "plan 1: not a machine"),
    (setting("plan.problem.batch", 1.5), "plan 1: batch cannot be 1.5"),
    (setting("plan.problem.batch", 1 << 40), "plan 1: batch cannot be"),
    (setting("plan.problem.height", 1 << 30), "plan 1: no network asks for"),
    (setting("plan.problem.kernel_size", [3, 3, 3]), "plan 1: kernel_size cannot be"),
    (setting("plan.problem.kernel_size", "33"), "plan 1: not a problem"),
    (setting("plan.problem.precision", "fp64"), "plan 1: precision is one of"),
    (setting("plan.problem.device", "cpu:0"), "plan 1: a stored plan is for cpu or cuda, not for cpu:0"),
    (setting("plan.problem.device", "tpu"), "plan 1: no method 'fake' on tpu"),
    (setting("plan.problem.epilogue.bias", 1), "plan 1: bias cannot be 1"),
    (setting("plan.problem.more", 1), "plan 1: not a problem"),
    (setting("plan.times_from", "hearsay"), "plan 1: times_from cannot be 'hearsay'"),
]


@pytest.mark.parametrize(("change", "says"), HOSTILE, ids=[says[:60] for _, says in HOSTILE])
def test_a_file_that_breaks_a_rule_is_refused_as_a_whole(file: Path, change: Change, says: str) -> None:
    content = json.loads(file.read_text())
    on_a_new_machine()
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=f"^{file}: .*{says}.*; export the plans again with this version") as caught:
        import_plans(file)
    assert len(str(caught.value)) < 1000
    assert not store.entries()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("\udcff", "it is no text, and none that escort cache export wrote; export the plans"),
        ("[" * 10**5, "RecursionError|recursion"),
        ("[]", "it is none that escort cache export wrote"),
        ('{"format": "escort-plans", "version": 1, "plans": NaN}', "NaN is no JSON number"),
        ('{"format": "escort-plans", "version": 1, "plans": [' + "1" * 5000 + "]}", "limit"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "plans.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match=says):
        import_plans(path)


def test_a_large_file_is_not_read_to_its_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = file.stat().st_size
    on_a_new_machine()
    monkeypatch.setattr(plans, "_MOST_BYTES", size - 1)
    with pytest.raises(ArtifactError, match=f"it has more than {size - 1:,} bytes"):
        import_plans(file)
    monkeypatch.setattr(plans, "_MOST_BYTES", size)
    assert import_plans(file) == (2, 0, 0)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="is not a file; name one that escort cache export wrote"):
            import_plans(path)
    with pytest.raises(FileNotFoundError):
        import_plans(tmp_path / "nothing")


@pytest.mark.parametrize(("variable", "value"), [("ESCORT_KEEP_PLANS", "0"), ("ESCORT_CACHE_MB", "0")])
def test_nothing_is_taken_in_where_plans_are_not_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="plans are not kept here; leave out ESCORT_KEEP_PLANS=0"):
        import_plans(file)


def test_what_could_not_be_stored_does_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_new_machine()
    monkeypatch.setattr(cache, "_warned", set())

    def refuse(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "_write", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert import_plans(file) == (0, 0, 0)


def test_every_method_of_every_device_has_plans_that_are_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever scalars its configs have, they survive the file."""
    monkeypatch.undo()
    measured = plan_layer(PROBLEM, a_filter(), methods=["dense"])
    for method in methods.METHODS:
        problem = replace(PROBLEM, device=method.device_type)
        config = _some_config(method.config_type)
        candidates = (Candidate(method.name, config, 1.0),)
        plan = replace(measured, problem=problem, method=method.name, config=config, candidates=candidates)
        key = store.Key(problem, 90, (method.name,), False, plan.machine, "0" * 64)
        data = json.loads(json.dumps(store.to_json(key, store.Hint(plan))))
        assert store.from_json(data) == (key, store.Hint(plan))


def _some_config(config_type: type[Any]) -> dict[str, Any]:
    return {
        name: get_args(kind)[0] if get_args(kind) else {int: 4, bool: True, str: "avx2"}[kind]
        for name, kind in get_type_hints(config_type).items()
    }


def test_the_cpu_has_its_own_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fakes: what this machine measures, another process takes in and runs."""
    monkeypatch.undo()
    monkeypatch.setenv("ESCORT_KEEP_PLANS", "1")
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / "cache"))
    planner._remembered.clear()
    earlier = plan_layer(PROBLEM, a_filter())
    assert export_plans(tmp_path / "plans.json") == 1
    on_a_new_machine()
    assert import_plans(tmp_path / "plans.json") == (1, 0, 0)
    plan = plan_layer(PROBLEM, a_filter())
    assert (plan.method, plan.config, plan.times_from) == (earlier.method, earlier.config, "plan store")
    assert torch.get_num_threads() == plan.machine.threads
