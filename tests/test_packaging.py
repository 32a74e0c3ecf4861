"""What is said of the package in several places is the same in all of them: versions, pins, names, pages."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import escort

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Of the other CUDA; and what `make test-integrations` installs into an environment of its own.
UNPINNED = {"cuda12", "ray"}


def pins(name: str) -> dict[str, str]:
    """The versions in a file of requirements."""
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def test_the_lock_is_of_the_pins() -> None:
    assert pins("requirements.lock") == pins("constraints.txt"), "run `make lock`"


def test_each_locked_file_has_a_hash() -> None:
    entries = re.split(r"\n(?=\w)", (ROOT / "requirements.lock").read_text().strip())
    assert all("--hash=sha256:" in entry for entry in entries if not entry.startswith("#"))


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    texts = [text for extra, texts in extras.items() if extra not in UNPINNED for text in texts]
    found = map(Requirement, [*PROJECT["dependencies"], *texts])
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_what_the_project_asks_for_is_pinned(requirement: Requirement) -> None:
    pinned = pins("constraints.txt")
    assert canonicalize_name(requirement.name) in pinned, "add it to constraints.txt and run `make lock`"
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_versions_agree() -> None:
    version = PROJECT["version"]
    assert escort.__version__ == version, "install the package again"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    _, *entries = re.findall(r"^## (.+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0].split()[0] == version


def test_the_documentation_has_all_public_names() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    names = {getattr(getattr(escort, name), "__name__", name).rpartition(".")[2] for name in escort.__all__}
    assert {name for name in names if not re.search(rf" escort\.(\w+\.)*{name}$", text, re.MULTILINE)} <= {
        "__version__"
    }


def test_the_documentation_has_all_pages() -> None:
    listed = {
        f"{page}.md" for pages in runpy.run_path(str(ROOT / "docs" / "conf.py"))["_CONTENTS"].values() for page in pages
    }
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert there <= listed and all((ROOT / page).is_file() for page in listed)
