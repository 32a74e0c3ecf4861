"""The names of methods in result files: which are ours, and which are rivals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

#: The paper's method, which its questions compare with all rivals.
OURS = "direct"
#: The method whose kernels are made for a filter.
GENERATED = "generated"
#: Our methods that multiply outside of the tensor cores, and all our sparse ones; the others are rivals.
ON_FMA = (OURS, GENERATED)
SPARSE = (*ON_FMA, "sparse_tc")


def methods_in(times: Iterable[Mapping[str, float]]) -> list[str]:
    """All methods that were timed, in the order in which they come first. times: of each layer, by method."""
    return list(dict.fromkeys(method for of_layer in times for method in of_layer))


def rivals_in(times: Iterable[Mapping[str, float]]) -> list[str]:
    """The methods that are not our sparse ones."""
    return [method for method in methods_in(times) if method not in SPARSE]
