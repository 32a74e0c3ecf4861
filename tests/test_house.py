"""The house rules that a machine can hold: where things stand, which way imports go, how large a thing may be."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
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
    "escort.report",
    "escort.cache",
    "escort.arguments",
    "escort.problem",
    "escort.filter",
    "escort.reference",
    "escort.kernels",
    "escort.cuda",
    "escort.methods",
    "escort.planner",
    "escort.layers",
    "escort.runtime",
    "escort.prune",
    "escort.network",
    "escort.artifact",
    "escort.integrations",
    "escort",
    "escort.cli",
    "escort.__main__",
]
#: Functions that may take more than seven parameters, and why.
MANY_PARAMETERS = {
    "escort.network.convert.convert": "what a conversion can be asked for, each of it by name",
    "escort.cuda.tensor_map.im2col": "what the driver's own function takes, each of it by name",
    "escort.layers.operator._sparse_conv2d": "what the operator's schema names",
}


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports(module: str) -> frozenset[str]:
    """The escort modules that a module imports when it runs, at its top or inside a function."""
    names = set()
    typing_only = [node for node in ast.walk(tree(module)) if isinstance(node, ast.If) and _is_for_types(node)]
    left_out = {inner for node in typing_only for inner in ast.walk(node)}
    for node in ast.walk(tree(module)):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if name in MODULES else str(node.module) for name in members)
    return frozenset(name for name in names if name.split(".")[0] == "escort")


def _is_for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def level(module: str) -> int:
    """How many rooms stand on one another below a module, its own among them, on the longest way down."""
    below = [name for name in imports(module) if name in MODULES]
    return max((level(name) + (room(name) != room(module)) for name in below), default=1)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    assert room(module) in ROOMS, "give the module a room"
    allowed = ROOMS[: ROOMS.index(room(module)) + 1]
    assert {room(name) for name in imports(module)} <= set(allowed), f"{module} imports what stands behind it"


def test_report_is_ground() -> None:
    assert {room(name) for module in MODULES if room(module) == "escort.report" for name in imports(module)} <= {
        "escort.report"
    }


def method_of(module: str) -> str:
    """The method that a module belongs to: a module of its own, or a package."""
    return ".".join(module.split(".")[:4])


METHODS_MODULES = sorted(name for name in MODULES if name.count(".") > 2 and room(name) == "escort.methods")


@pytest.mark.parametrize("module", METHODS_MODULES)
def test_a_method_knows_no_other_method(module: str) -> None:
    others = {method_of(name) for name in imports(module) if room(name) == "escort.methods" and name.count(".") > 2}
    assert others <= {method_of(module)}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name) != "escort.methods"))
def test_nobody_knows_a_methods_insides(module: str) -> None:
    assert not {name for name in imports(module) if name.startswith(("escort.methods.cpu", "escort.methods.cuda"))}


def test_imports_have_no_circle() -> None:
    TopologicalSorter({module: imports(module) & MODULES.keys() for module in MODULES}).prepare()


def test_rooms_stand_at_most_twelve_high() -> None:
    assert max(level(module) for module in MODULES) <= 12


def test_the_house_is_seen_at_a_glance() -> None:
    entries = {path.name for path in SOURCE.iterdir()} - {"__pycache__"}
    assert len(entries) <= 20, sorted(entries)


FILES = sorted(
    str(path.relative_to(SOURCE))
    for suffix in ("py", "cu", "cuh", "cpp", "hpp")
    for path in SOURCE.rglob(f"*.{suffix}")
)


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name: str) -> None:
    assert len((SOURCE / name).read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_are_short_and_take_little(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            name = f"{module}.{node.name}"
            assert body_lines(node) <= 60, f"{name} is long"
            assert parameters(node) <= 7 or name in MANY_PARAMETERS, f"{name} takes {parameters(node)} parameters"


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    taken = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    return sum(argument.arg not in ("self", "cls") for argument in taken)


def body_lines(function: ast.FunctionDef) -> int:
    """The lines of a function without its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)


def test_few_functions_take_much() -> None:
    assert len(MANY_PARAMETERS) <= 3


@pytest.mark.parametrize("name", [name for name in escort.__all__ if name != "__version__"])
def test_public_names_have_docstrings(name: str) -> None:
    assert (getattr(escort, name).__doc__ or "").strip()


def test_public_names_are_all_that_shows() -> None:
    assert dir(escort) == sorted(escort.__all__)
