"""What the documents show: the README's code and commands run as they stand, and what documents name exists."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import onnx
import pytest
import torch

import escort
from escort.network import choose
from tests.cli.invoking import succeed
from tests.onnx_models import classifier

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()


def commands(heading: str) -> list[str]:
    """The commands of a section of the README."""
    section = README.partition(f"# {heading}\n")[2].partition("\n#")[0]
    return [line.split("  #")[0].strip() for line in section.splitlines() if line.startswith("    escort ")]


COMMANDS = commands("On the command line")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: The reader's own model that the README imports.
MY_MODELS = """
from escort import prune
from torch import nn

def pruned_cnn():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )
    prune.uniform(model, 0.9)
    prune.make_permanent(model)
    return model
"""


@pytest.fixture
def my_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which the reader's own model is."""
    (tmp_path / "my_models.py").write_text(MY_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return tmp_path


@pytest.fixture
def converting_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original loses, however small the network is."""
    race = choose.race

    def original_loses(runs: list[Any], device: torch.device) -> Any:
        times_us, timer = race(runs, device)
        return [2 * max(times_us), *times_us[1:]], timer

    monkeypatch.setattr(choose, "race", original_loses)


def run(snippet: str, names: dict[str, Any]) -> None:
    """Runs a snippet as it stands."""
    exec(compile(snippet, "snippet", "exec"), names)


def test_the_python_snippet_runs(my_models: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    run(snippet, names)
    y = names["y"]
    assert isinstance(y, torch.Tensor) and y.shape == (1, 10)
    assert isinstance(names["fast"], escort.ConvertedModel)
    assert (my_models / "model.escort").exists()


SNIPPETS = [dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", GUIDE, re.DOTALL | re.MULTILINE)]
ON_A_GPU = "# on a GPU\n"


def test_the_guides_snippets_run_in_order(my_models: Path) -> None:
    names: dict[str, Any] = {}
    for snippet in SNIPPETS:
        if not snippet.startswith(ON_A_GPU):
            run(snippet, names)
    assert isinstance(names["fast"], escort.ConvertedModel) and (my_models / "model.escort").exists()
    assert names["fast"](torch.randn(2, 3, 64, 64)).shape == (2, 10)
    given = inspect.signature(escort.convert).parameters
    (call,) = [node for node in ast.walk(ast.parse(SNIPPETS[0])) if isinstance(node, ast.Call) and node.keywords]
    shown = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert shown == {name: one.default for name, one in given.items() if one.default is not one.empty}
    layer = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    layer.eps = 1e-5  # type: ignore[assignment]
    weight = names["folded"](layer).weight
    assert torch.allclose(weight.mean((1, 2, 3)), torch.zeros(6), atol=1e-5)
    assert torch.allclose(weight.std((1, 2, 3), correction=0), torch.ones(6), atol=1e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("converting_pays")
def test_the_guides_snippets_for_gpus_run(my_models: Path) -> None:
    from_guide = [snippet for snippet in SNIPPETS if snippet.startswith(ON_A_GPU)]
    assert len(from_guide) == 2
    names: dict[str, Any] = {"escort": escort, "torch": torch}
    run("from my_models import pruned_cnn", names)
    model, x = names["pruned_cnn"]().eval().cuda(), torch.randn(1, 3, 224, 224, device="cuda")
    names["fast"] = escort.convert(model, x, precision="fp32")
    for snippet in from_guide:
        run(snippet, names)
    assert (my_models / "model.escort.kernels").exists() and len(names["seconds"]) == 100


def test_the_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but on smaller pictures and against one rival: the others compile for half a minute."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    (tmp_path / "photos").mkdir()
    image.new("RGB", (300, 260), "teal").save(tmp_path / "photos" / "one.png")
    names = "prune convert plan run bench cache doctor".split()
    assert [shlex.split(command)[1] for command in COMMANDS] == names
    for command in COMMANDS:
        words = shlex.split(command.replace("1,3,224,224", "1,3,64,64"))[1:]
        succeed(*words, *(("--against", "eager", "--rounds", "1") if words[0] == "bench" else ()))
    assert (tmp_path / "predictions.csv").read_text().count("\n") >= 2
    assert (tmp_path / "model.escort").stat().st_size > 100_000


def test_from_onnx_to_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    image.new("RGB", (40, 30), "teal").save(tmp_path / "photos" / "one.png")
    onnx.save(classifier(), tmp_path / "pruned.onnx")
    monkeypatch.chdir(tmp_path)
    both = commands("From ONNX to predictions in two commands")
    assert len(both) == 2
    for command in both:
        succeed(*shlex.split(command)[1:])
    assert (tmp_path / "predictions.csv").read_text().count("\n") >= 2


def test_the_map_is_what_is_there() -> None:
    (drawn,) = re.findall(r"## The map\n\n(.*?)\n\n", README, re.DOTALL)
    inside, outside = drawn.split("    benchmarks/")
    package = ROOT / "src" / "escort"
    named = {name.strip("/") for name in re.findall(r"(?<=\s)[\w.]+(?:/|\.py)(?=\s)", inside.partition("\n")[2])}
    entries = {path.name for path in package.iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert named == entries
    assert all((ROOT / name).is_dir() for name in ["benchmarks", *re.findall(r"^    (\w+)/", outside, re.MULTILINE)])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_named_in_the_documents_exists(document: Path) -> None:
    text = document.read_text()
    for target, section in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if not target.startswith("http"):
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name} links to {target}"
            assert not section or section in sections(path), f"{document.name} links to {target}#{section}"


@cache
def sections(document: Path) -> set[str]:
    """The names by which links reach a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def messages() -> str:
    """All texts of the package, a line each, with three dots for what is filled in."""
    texts = []
    for path in (ROOT / "src" / "escort").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_guide_explains_messages_that_there_are() -> None:
    (table,) = re.findall(r"\n## What messages mean\n(.*)", GUIDE, re.DOTALL)
    explained = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(explained) > 9
    for message in explained:
        assert message in messages(), message
