"""Names, cells and messages that would act on a terminal are shown, and do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from escort import artifact, cache, report
from escort.cli import engines, models
from escort.network.plan import NetworkPlan
from escort.planner import plan_layer, planner
from escort.planner.plan import Plan
from escort.report import Console, printable
from tests.cli.invoking import invoke, succeed
from tests.cli.named import TINY, tiny
from tests.fakes import PROBLEM, a_filter

HOSTILE = "\x1b]0;x\x07[bold]:smile:\u202e\r\nerror: forged\x9b31m\x7f\u200b"
#: The same as it is shown, and what of it is left where a table or a terminal breaks the line.
SHOWN = r"\x1b]0;x\x07[bold]:smile:\u202e\r\nerror: forged\x9b31m\x7f\u200b"


def shows(text: str, *, whole: bool = True) -> None:
    """Nothing in it acts on a terminal, and markup and codes are as they were."""
    assert all(c.isprintable() or c == "\n" for c in text), text
    joined = "".join(line.strip() for line in text.splitlines())
    assert not whole or SHOWN.replace(" ", "") in joined.replace(" ", ""), text
    assert not any(line.lstrip().startswith("error: forged") for line in text.splitlines())


def both(result: Result) -> str:
    return result.stdout + result.stderr


class Net(torch.nn.Module):
    """A layer of that name, which torch allows but for a dot."""

    def __init__(self) -> None:
        super().__init__()
        inner = tiny()
        self.add_module(HOSTILE, inner[0])
        self.rest = inner[1:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.get_submodule(HOSTILE)(x))


def forged_plan(saved: Path) -> NetworkPlan:
    """The plan of a file in which every text is hostile."""
    plan = artifact.load_plan(saved)
    layer = plan.layers["3"]
    refused = replace(layer.candidates[-1], time_us=None, reason=HOSTILE)
    layers: dict[str, Plan] = {HOSTILE: replace(layer, candidates=(*layer.candidates[:-1], refused))}
    machine = replace(plan.machine, device=HOSTILE)
    return replace(plan, layers=layers, skipped={HOSTILE: HOSTILE}, not_tried={"graph": HOSTILE}, machine=machine)


def test_printable() -> None:
    assert printable(HOSTILE) == SHOWN and printable("µs -> 3 * 3, [a] :b:") == "µs -> 3 * 3, [a] :b:"
    assert printable("\udcff\u2028\u00ad") == r"\udcff\u2028\xad"
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert printable(every).isprintable()


def test_a_console_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200, force_terminal=True, color_system="truecolor")
    console.print(HOSTILE, 123, "'a'")
    assert capsys.readouterr().out == f"{SHOWN} 123 'a'\n"


def test_tables_print_text() -> None:
    table = report.Table(HOSTILE, (HOSTILE, "b"), ((HOSTILE, HOSTILE),), HOSTILE)
    shows(report.text(table), whole=False)
    assert report.text(table).replace("\n", "").count(r"\x1b") >= 4


def test_plan(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = forged_plan(saved)
    monkeypatch.setattr(artifact, "load_plan", lambda path: plan)
    result = succeed("plan", saved, "--candidates")
    shows(both(result), whole=False)
    assert result.stdout.count(r"\x1b") >= 6 and "[bold]" in result.stdout and ":smile:" in result.stdout
    shows(str(plan), whole=False)
    shows(succeed("plan", saved, "--json").stdout, whole=False)
    assert json.loads(succeed("plan", saved, "--json").stdout)["skipped"] == {HOSTILE: HOSTILE}
    shows(plan._repr_html_(), whole=False)
    assert plan._repr_html_().count(r"\x1b]0;x\x07[bold]:smile:") >= 5


def test_prune_and_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda spec, checkpoint=None: Net().eval())
    output = tmp_path / f"{HOSTILE.replace('/', '')}.safetensors"
    shows(both(succeed("prune", TINY, "--sparsity", "0.5", "--output", output)))
    shows(both(succeed("plan", TINY, "--input", "1,3,8,8")), whole=False)
    shows(invoke("convert", TINY, "--input", "1,3,8,8", "--output", tmp_path / "x.escort").stderr)
    shows(both(succeed("bench", TINY, "--input", "1,3,8,8", "--against", "eager", "--rounds", "1")), whole=False)


def test_run(saved: Path, images: Path, tmp_path: Path) -> None:
    (images / "b.png").rename(images / f"{HOSTILE}.png")
    (images / "notes.txt").rename(images / f"{HOSTILE}.txt")
    result = succeed("run", saved, images, "--output", tmp_path / f"{HOSTILE}.csv")
    shows(result.stdout)
    shows(result.stderr)
    shows((tmp_path / f"{HOSTILE}.csv").read_text())
    (images / f"{HOSTILE}.png").write_bytes(b"no png")
    shows(invoke("run", saved, images).stderr)


def test_bench_says_why_a_rival_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(bench: Any) -> Any:
        raise RuntimeError(f"{HOSTILE}")

    monkeypatch.setitem(engines.ENGINES, "eager", failing)
    result = succeed("bench", TINY, "--input", "1,3,8,8", "--against", "eager", "--rounds", "1")
    shows(both(result), whole=False)
    assert "RuntimeError" in result.stdout


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESCORT_CACHE_DIR", str(tmp_path / HOSTILE))
    described = {"source": HOSTILE, "arch": HOSTILE, "defines": {HOSTILE: HOSTILE}, "registers": 1}
    cache.store("kernel", "a" * 64, described)
    (tmp_path / HOSTILE / f"{HOSTILE}.kernel").touch()
    shows(both(succeed("cache")), whole=False)
    shows(both(succeed("doctor")), whole=False)
    shows(both(succeed("cache", "--clear")))


@pytest.mark.usefixtures("plan_store")
def test_plans_of_a_file(tmp_path: Path) -> None:
    planner._remembered.clear()
    plan_layer(PROBLEM, a_filter())
    path = tmp_path / f"{HOSTILE}.json"
    shows(both(succeed("cache", "export", path)))
    content = json.loads(path.read_text())
    content["plans"][0]["plan"]["machine"]["device"] = HOSTILE
    path.write_text(json.dumps(content))
    shows(both(succeed("cache", "import", path)))
    result = succeed("cache")
    shows(both(result), whole=False)
    assert r"\x1b" in result.stdout
    content["plans"][0]["plan"]["method"] = HOSTILE
    path.write_text(json.dumps(content))
    result = invoke("cache", "import", path)
    assert result.exit_code == 2
    shows(result.stderr)


def _value_error(*args: Any, **options: Any) -> Any:
    raise ValueError(HOSTILE)


def _os_error(*args: Any, **options: Any) -> Any:
    raise PermissionError(13, HOSTILE, HOSTILE)


def _runtime_error(*args: Any, **options: Any) -> Any:
    raise RuntimeError(HOSTILE)


def _fault(*args: Any, **options: Any) -> Any:
    raise ZeroDivisionError(HOSTILE)


@pytest.mark.parametrize(("raises", "code"), [(_value_error, 2), (_os_error, 2), (_runtime_error, 1), (_fault, 1)])
def test_messages_of_exceptions(
    raises: Callable[..., Any], code: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "load_plan", raises)
    result = invoke("plan", saved)
    assert result.exit_code == code
    shows(result.stderr)
    assert ("please report this" in result.stderr and "test_hostile_text.py" in result.stderr) == (raises is _fault)


@pytest.mark.filterwarnings("default")
def test_warnings(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_plan(path: Path) -> NetworkPlan:
        warnings.warn(HOSTILE, RuntimeWarning, stacklevel=2)
        return plan

    plan = artifact.load_plan(saved)
    monkeypatch.setattr(artifact, "load_plan", load_plan)
    result = succeed("plan", saved, "--json")
    shows(result.stderr)
    assert result.stderr.startswith(r"warning: \x1b") and json.loads(result.stdout)


@pytest.mark.parametrize(
    "args",
    [
        ("prune", HOSTILE, "--sparsity", "0.5", "--output", "x.safetensors"),
        ("prune", TINY, "--sparsity", "0.5", "--output", "x.safetensors", "--skip", HOSTILE),
        ("prune", TINY, "--sparsity", "0.5", "--output", "x.safetensors", "--method", HOSTILE),
        ("convert", f"tests.cli.named:{HOSTILE}", "--input", "1,3,8,8", "--output", "x.escort"),
        ("convert", TINY, "--input", "1,3,8,8", "--output", f"{HOSTILE}/x.escort"),
        ("convert", TINY, "--checkpoint", f"{HOSTILE}.pt", "--input", "1,3,8,8", "--output", "x.escort"),
        ("convert", TINY, "--input", HOSTILE, "--output", "x.escort"),
        ("run", f"{HOSTILE}.escort", "."),
        ("plan", f"{HOSTILE}.pt2", "--input", "1,3,8,8"),
        ("run", "x.escort", HOSTILE),
        ("bench", TINY, "--input", "1,3,8,8", "--against", HOSTILE),
        ("bench", TINY, "--input", "1,3,8,8", "--device", HOSTILE),
        ("doctor", HOSTILE),
        ("doctor", f"--{HOSTILE}"),
        (HOSTILE,),
        (f"--{HOSTILE}",),
    ],
)
def test_what_a_user_types(args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.exit_code == 2 and not result.stdout
    shows(result.stderr, whole=False)
    assert "[bold]:smile:" in result.stderr and result.stderr.count("\n") == 1


def test_a_terminal_that_lacks_characters(saved: Path) -> None:
    command = [sys.executable, "-m", "escort", "plan", str(saved)]
    result = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and rb"Dense \xb5s" in result.stdout


def test_the_whole_program(tmp_path: Path) -> None:
    """As a process of its own, where nothing stands between it and the terminal."""
    archive = tmp_path / f"{HOSTILE}.pt2"
    archive.write_bytes(b"nonsense")
    command = [sys.executable, "-m", "escort", "plan", str(archive), "--input", "1,3,8,8"]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 2 and not result.stdout
    shows(result.stderr)
