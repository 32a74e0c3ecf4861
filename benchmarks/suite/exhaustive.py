"""What a search of all candidates chooses for a network, within a time: by it what little search costs is measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suite.by_method import convert_keeping
from escort.layers import SparseConv2d
from escort.methods import for_device
from escort.network.check import Request
from escort.network.choose import NETWORK_ERROR_BOUND
from escort.network.model import ConvertedModel
from escort.network.passes.operations import replace_module
from escort.network.swap import Swapped, alternatives
from escort.network.values import largest_error, tensors_of
from escort.planner import plan_layers
from escort.planner.plan import Layer, Planned
from escort.planner.store import Key
from escort.problem import Precision
from escort.runtime.stand_in import adopt

#: Seconds for compiling kernels for the weights that compile none, but have all configs tried of what compiles none.
_ALL_CONFIGS_S = 0.001
#: A network is searched where its layers take up to so many times what those of another memory format do.
_CLOSE = 1.25
#: Kinds of layers whose candidates are prepared together, on all cores.
_AT_ONCE = 4


@dataclass(frozen=True)
class Searched:
    """A network that was searched exhaustively, as far as there was time.

    Attributes:
        runs: calls of it on the example, one for each alternative of it.
        rel_error: of its outputs.
        about: its memory format, and of how many of its layers all candidates were tried, and how many candidates.
    """

    runs: tuple[Callable[[], Any], ...]
    rel_error: float
    about: dict[str, Any]


def convert_and_search(
    model: nn.Module, x: Tensor, *, precision: Precision, search_s: float
) -> tuple[ConvertedModel, list[Searched]]:
    """The model converted by the effort "fast", and what exhaustive searches choose, by the same compiled kernels.

    All configs of all methods are tried that compile nothing for the weights and do not write their input out patch by
    patch (24 of a method at most), in each memory format whose layers take nearly as little as those of another. What
    takes longest comes first. A layer that is not reached keeps the plan of the effort "fast".

    Args:
        search_s: seconds after which no further layer is searched.

    Raises:
        RuntimeError: where what was searched computes something else.
    """
    converted, networks = convert_keeping(model, x, precision=precision, effort="fast", only_likely=True)
    until_s = time.perf_counter() + search_s
    times_us = {id(network): _time_us(network) for network in networks}
    close = [network for network in networks if times_us[id(network)] <= _CLOSE * min(times_us.values())]
    close.sort(key=lambda network: times_us[id(network)])
    with torch.no_grad():
        expected = tensors_of(model(x))
        bound = max(NETWORK_ERROR_BOUND[precision], 3.0 * converted.plan.rel_error)
        found = [_searched(network, x, precision, until_s) for network in close]
        return converted, [_checked(each, expected, bound) for each in found]


def _time_us(network: Swapped) -> float:
    return sum(plan.time_us or 0.0 for plan in network.layers.values())


def _searched(swapped: Swapped, x: Tensor, precision: Precision, until_s: float) -> Searched:
    """A copy of a network, with the layers that there was time for as a search of all candidates has them."""
    network, plans = copy.deepcopy(swapped.network), dict(swapped.layers)
    searched, candidates = 0, 0
    for name, (plan, prepared) in _plans(network, list(plans), until_s):
        old = _sparse(network, name)
        new = SparseConv2d(old.filter, old.bias, plan, name, old.unfolded, old.slope)
        new.run_by(prepared)
        adopt(new, old)
        replace_module(network, name, new)
        plans[name], searched = plan, searched + 1
        candidates += sum(candidate.time_us is not None for candidate in plan.candidates)
    every = alternatives(Swapped(network, plans, {}), Request(x.device, precision))
    if x.is_cuda:
        torch.cuda.synchronize()  # any stream may read the tables from now on
    memory_format = next(iter(plans.values())).problem.memory_format
    about = {
        "memory_format": memory_format,
        "searched_layers": searched,
        "all_layers": len(plans),
        "candidates": candidates,
    }
    return Searched(tuple(partial(_run, each, x) for each in every), 0.0, about)


def _plans(network: nn.Module, names: Sequence[str], until_s: float) -> Iterator[tuple[str, Planned]]:
    """The layers' plans by all candidates, those of a kind together, until there is no more time."""
    device = _sparse(network, names[0]).plan.problem.device
    methods = [method for method in for_device(device) if not (method.lowers or method.compiles_per_filter)]
    kinds: dict[Key, list[tuple[str, Layer]]] = {}
    for name in names:
        sparse = _sparse(network, name)
        layer = Layer(sparse.plan.problem, sparse.filter, sparse.bias, sparse.slope)
        kinds.setdefault(Key.of(layer, methods, compiles=False), []).append((name, layer))

    def taken_us(kind: Sequence[tuple[str, Layer]]) -> float:
        return sum(_sparse(network, name).plan.time_us or 0.0 for name, _ in kind)

    longest_first = iter(sorted(kinds.values(), key=taken_us, reverse=True))
    while time.perf_counter() < until_s and (some := list(islice(longest_first, _AT_ONCE))):
        layers = [named for kind in some for named in kind]
        planned = plan_layers([layer for _, layer in layers], _ALL_CONFIGS_S, methods=methods)
        for (name, _), each in zip(layers, planned, strict=True):
            yield name, each
            if time.perf_counter() > until_s:
                return


def _sparse(network: nn.Module, name: str) -> SparseConv2d:
    layer = network.get_submodule(name)
    assert isinstance(layer, SparseConv2d)
    return layer


def _run(swapped: Swapped, x: Tensor) -> Any:
    swapped.put_in_place()
    return swapped.network(x)


def _checked(searched: Searched, expected: Sequence[Tensor], bound: float) -> Searched:
    """What was searched with its error. Raises RuntimeError where that is beyond the bound."""
    error = max(largest_error(tensors_of(run()), expected) for run in searched.runs)
    if not error <= bound:
        raise RuntimeError(f"what an exhaustive search chose is off by {error:.1e} (bound {bound:.0e})")
    return replace(searched, rel_error=error)
