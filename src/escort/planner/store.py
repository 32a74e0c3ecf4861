"""Plans on disk: what was measured once is a hint to whoever asks the same, in whatever process and project.

A stored plan is never trusted. The layer that finds one validates the choice on its own filter, and is measured where
that fails. The entries lie beside the compiled kernels (:mod:`escort.cache`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from escort import cache
from escort.kernels import _cpu
from escort.methods import Method, by_name
from escort.planner.checked import check_fields
from escort.planner.compile_budget import outgrows
from escort.planner.machine import Machine
from escort.planner.plan import Layer, Plan
from escort.problem import Problem

#: Set to 0, plans are neither read from disk nor written to it.
KEEP_VARIABLE = "ESCORT_KEEP_PLANS"

#: The rooms of the package whose sources have a say in a plan.
_SOURCES = ("kernels", "cuda", "methods", "planner")
_SUFFIXES = (".py", ".cu", ".cuh")
#: Layers share a plan if the logarithms of their nonzeros round to the same multiple of this.
_NONZEROS_STEP = 0.05


@dataclass(frozen=True)
class Key:
    """What layers that share a plan have in common.

    Attributes:
        problem: on "cpu" or "cuda": the number of the GPU is left out.
        nonzeros: the number of the filter's nonzeros, as a logarithm and rounded.
        methods: the names of the methods to choose from.
        compiles: whether kernels may be compiled for the filter.
        machine: what the plan is for.
        sources: a digest of what else times depend on: see :func:`digest_sources`; and versions of what methods need.
    """

    problem: Problem
    nonzeros: int
    methods: tuple[str, ...]
    compiles: bool
    machine: Machine
    sources: str

    @classmethod
    def of(cls, layer: Layer, methods: Sequence[Method], *, compiles: bool) -> Key:
        """The key of a layer on this machine."""
        problem = replace(layer.problem, device=layer.problem.device_type)
        sources = digest_sources(problem.device)
        if versions := [f"{method.name} {version}" for method in methods if (version := method.version())]:
            sources = hashlib.sha256(" ".join((sources, *versions)).encode()).hexdigest()
        return cls(
            problem,
            steps_of_nonzeros(layer.sparse_filter.nnz),
            tuple(method.name for method in methods),
            compiles,
            Machine.here(layer.problem.device),
            sources,
        )

    @property
    def about_nonzeros(self) -> int:
        """About how many nonzeros the filter has."""
        return round(math.expm1(self.nonzeros * _NONZEROS_STEP))

    @cached_property
    def digest(self) -> str:
        """What the plan is stored under."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def steps_of_nonzeros(nonzeros: int) -> int:
    """A number of nonzeros as keys have it: its logarithm, in steps."""
    return round(math.log(nonzeros + 1) / _NONZEROS_STEP)


@dataclass(frozen=True)
class Hint:
    """A plan that was measured for the same key.

    Attributes:
        cut_at_s: the compile budget of the search where a larger one would have let more be tried, else None.
        imported: whether it came out of a file, and no layer here has validated it yet.
    """

    plan: Plan
    cut_at_s: float | None = None
    imported: bool = False

    def is_outgrown(self, compile_budget_s: float) -> bool:
        """Whether a compile budget is worth a search."""
        return outgrows(compile_budget_s, self.cut_at_s)


def is_kept() -> bool:
    """Whether plans are kept on disk."""
    return os.environ.get(KEEP_VARIABLE) != "0" and cache.limit_bytes() > 0


def load(key: Key) -> Hint | None:
    """The hint that is stored for a key; None where there is none, or what is stored is no plan for that key."""
    stored = cache.load("plan", key.digest) if is_kept() else None
    if stored is None:
        return None
    try:
        found, hint = from_json(stored[0])
    except ValueError:
        return None
    return replace(hint, plan=replace(hint.plan, times_from="plan store")) if found == key else None


def save(key: Key, hint: Hint) -> None:
    """Stores a hint; where that cannot be done, warns once and goes on."""
    if is_kept():
        cache.store("plan", key.digest, to_json(key, hint))


def is_stored(key: Key) -> bool:
    """Whether there is an entry of that key, whatever is in it."""
    return cache.contains("plan", key.digest)


def add(plans: Mapping[Key, Hint]) -> tuple[int, int]:
    """Stores hints as far as there is room; returns how many were stored, and for how many there was no room."""
    return cache.add("plan", {key.digest: to_json(key, hint) for key, hint in plans.items()})


def entries() -> list[tuple[cache.Entry, tuple[Key, Hint] | None]]:
    """All that is stored, the most recently used first; None stands for what is no plan that this version can run.

    Raises UnsafeFolderError.
    """
    return [(entry, _read(entry)) for entry in cache.entries("plan")]


def _read(entry: cache.Entry) -> tuple[Key, Hint] | None:
    try:
        key, hint = from_json(entry.description)
    except ValueError:
        return None
    return (key, hint) if key.digest == entry.key else None


def to_json(key: Key, hint: Hint) -> dict[str, Any]:
    """Key and hint as JSON values; :func:`from_json` reads them back."""
    plan = replace(hint.plan, problem=key.problem, machine=key.machine, times_from="measured", is_steady=True)
    return {
        "plan": plan.to_json(),
        "nonzeros": key.nonzeros,
        "methods": list(key.methods),
        "compiles": key.compiles,
        "sources": key.sources,
        "cut_at_s": hint.cut_at_s,
        "imported": hint.imported,
    }


def from_json(data: Any) -> tuple[Key, Hint]:
    """Key and hint behind :func:`to_json`, of which every value has the type and the range that it must have.

    Raises:
        ValueError: naming what is wrong; also where a method or a config is none of this version.
    """
    try:
        plan = Plan.from_json(data["plan"])
        key = Key(
            plan.problem, data["nonzeros"], tuple(data["methods"]), data["compiles"], plan.machine, data["sources"]
        )
        hint = Hint(plan, data["cut_at_s"], data["imported"])
        expected = to_json(key, hint)
        if len(data) != len(expected):
            raise ValueError(f"a stored plan has the fields {', '.join(expected)}, got {', '.join(data)}")
        if unknown := data["plan"].keys() - expected["plan"].keys():
            raise ValueError(f"a stored plan's plan has no field {min(unknown)!r:.50}")
        _check(key, hint)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"not a stored plan: {error}") from error
    return key, hint


def _check(key: Key, hint: Hint) -> None:
    plan, device = hint.plan, key.problem.device
    check_fields(key)
    check_fields(hint)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"a stored plan is for cpu or cuda, not for {device}")
    if key.nonzeros > steps_of_nonzeros(math.prod(key.problem.weight_shape)):
        raise ValueError(f"nonzeros cannot be {key.nonzeros}: the filter has {key.problem.weight_shape} weights in all")
    for method in key.methods:
        by_name(method, device)
    if len(set(key.methods)) != len(key.methods):
        raise ValueError(f"its methods are named twice: {', '.join(key.methods)}")
    for candidate in plan.candidates:
        if candidate.method not in key.methods:
            raise ValueError(f"a candidate is of the method {candidate.method}, which was not to choose from")
        if candidate.config is not None:
            check_fields(by_name(candidate.method, device).config_type(**candidate.config))
    if plan.time_us is None:
        raise ValueError(f"its choice, {plan.method} with {plan.config}, is none of the candidates that were timed")


@lru_cache
def digest_sources(device: str) -> str:
    """A digest of what times on "cpu" or "cuda" depend on beside the machine: the kernels, and the code around them."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    files = sorted(path for room in _SOURCES for path in (package / room).rglob("*") if path.suffix in _SUFFIXES)
    for path in [*files, Path(_cpu.__file__)] if device == "cpu" else files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()
