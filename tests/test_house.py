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
#: A module imports only what stands before it; `escort` is the package itself, with all that it exports.
ORDER = [
    "escort._kernels",
    "escort.problem",
    "escort.sparse",
    "escort.reference",
    "escort.paper_layers",
    "escort.memory",
    "escort.cache",
    "escort.compiler",
    "escort.jit",
    "escort.tensor_maps",
    "escort.program",
    "escort.codegen",
    "escort.gpu",
    "escort.methods",
    "escort.bench",
    "escort.planner",
    "escort.ops",
    "escort.nn",
    "escort.fuse",
    "escort.channels_last",
    "escort.batching",
    "escort.converted",
    "escort.convert",
    "escort.container",
    "escort.graph",
    "escort.artifact",
    "escort.prune",
    "escort",
    "escort.forecast",
    "escort.models",
    "escort.suite",
    "escort.report",
    "escort.demo",
    "escort.breakdown",
    "escort.counters",
    "escort.results",
    "escort.findings",
    "escort.exhibits",
    "escort.study",
    "escort.cli",
]


def part(module: str) -> str:
    """The entry of ORDER that a module belongs to: itself, or its package."""
    return ".".join(module.split(".")[:2])


def imports(module: str) -> set[str]:
    """The escort modules that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if name in MODULES or name in ORDER else str(node.module) for name in members)
    return {name for name in names if name.split(".")[0] == "escort"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    assert part(module) in ORDER, "give the module a place in ORDER"
    before = ORDER[: ORDER.index(part(module))]
    late = [name for name in imports(module) if part(name) not in before and part(name) != part(module)]
    assert not late, f"{module} may import only what stands before it in ORDER"


def method_of(module: str) -> str:
    """The method that a module belongs to: a module of its own, or a package."""
    return ".".join(module.split(".")[:3])


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("escort.methods.")))
def test_a_method_knows_no_other_method(module: str) -> None:
    others = {method_of(name) for name in imports(module) if part(name) == "escort.methods"}
    assert others <= {"escort.methods.base", method_of(module)}


@pytest.mark.parametrize("name", [name for name in escort.__all__ if name != "__version__"])
def test_public_names_have_docstrings(name: str) -> None:
    assert (getattr(escort, name).__doc__ or "").strip()
