"""The house rules that a machine can hold: imports go one way, and what is public explains itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import escort

SOURCE = Path(escort.__file__).parent
MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}
#: The rooms. A module imports its own room and those that stand before it.
ROOMS = [
    "escort.problem",
    "escort.filter",
    "escort.reference",
    "escort.kernels",
    "escort.cuda",
    "escort.methods",
    "escort.planner",
    "escort.layers",
    "escort.network",
    "escort.artifact",
    "escort.prune",
    "escort",
    "escort.report",
    "escort.cli",
    "escort.__main__",
]


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(module: str) -> set[str]:
    """The escort modules that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if name in MODULES else str(node.module) for name in members)
    return {name for name in names if name.split(".")[0] == "escort"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    assert room(module) in ROOMS, "give the module a room"
    allowed = ROOMS[: ROOMS.index(room(module)) + 1]
    assert {room(name) for name in imports(module)} <= set(allowed), f"{module} imports what stands behind it"


def method_of(module: str) -> str:
    """The method that a module belongs to: a module of its own, or a package."""
    return ".".join(module.split(".")[:4])


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.count(".") > 2 and "methods" in name))
def test_a_method_knows_no_other_method(module: str) -> None:
    others = {method_of(name) for name in imports(module) if room(name) == "escort.methods" and name.count(".") > 2}
    assert others <= {method_of(module)}


@pytest.mark.parametrize("name", [name for name in escort.__all__ if name != "__version__"])
def test_public_names_have_docstrings(name: str) -> None:
    assert (getattr(escort, name).__doc__ or "").strip()
