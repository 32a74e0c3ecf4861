"""What the README shows, run as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for line in README.splitlines() if line.startswith("    escort ")]


def test_the_python_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    y = names["y"]
    assert isinstance(y, torch.Tensor) and y.shape == (1, 1000)
    assert (tmp_path / "resnet18.escort").exists()


def test_the_commands_run_in_order(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    image.new("RGB", (300, 260), "teal").save(tmp_path / "photos" / "one.png")
    names = "prune convert plan run cache doctor".split()
    assert [shlex.split(command)[1] for command in COMMANDS] == names
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] == "bench":
            words += ["--layers", "inception_5b/5x5"]  # all of them take a minute and a half
        if words[0] == "paper":
            words += "--device cpu --questions rq1 --layers inception_5b/5x5 --batch 1 --budget-s 0.1".split()
        program = [sys.executable, "-c", "from escort.cli import app; app()", *words]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "predictions.csv").read_text().count("\n") >= 2
    assert (tmp_path / "model.escort").stat().st_size > 100_000


def test_every_path_named_in_the_documents_exists() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
