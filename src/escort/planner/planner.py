"""From layers to plans: take over what is remembered, else search, measure and remember."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from escort.filter import SparseFilter
from escort.methods import Method, by_name, for_device
from escort.planner.compile_budget import SharedBudget, check_compile_budget, estimate_s, fits
from escort.planner.cores import on_all_cores
from escort.planner.machine import Machine
from escort.planner.measure import Ahead, Allowance, measure
from escort.planner.plan import Layer, Plan
from escort.planner.search import Search, predict_us
from escort.problem import Problem

#: Seconds after which a layer's race stops at three rounds per candidate.
_BUDGET_S = 0.3
_log = logging.getLogger(__name__)

#: The plans that like layers take over, each with the search that it came from.
_remembered: dict[Hashable, tuple[Plan, Search]] = {}


def plan_layer(
    problem: Problem,
    sparse_filter: SparseFilter,
    bias: torch.Tensor | None = None,
    *,
    methods: Sequence[Method | str] | None = None,
    budget_s: float = _BUDGET_S,
    compile_budget_s: float = 60.0,
) -> Plan:
    """Measure the ways to run a convolution on this machine and choose the fastest that is right.

    A layer takes over the plan of an earlier one of the same problem and nearly the same number of nonzeros. It is
    measured anew in two cases: where compiling the choice for its filter exceeds `compile_budget_s`, and where the
    earlier search left configs out for lack of time and `compile_budget_s` is now more than twice as large.

    Example:
        >>> weight = torch.randn(16, 8, 3, 3) * (torch.rand(16, 8, 3, 3) < 0.1)
        >>> problem = Problem(1, 8, 28, 28, 16, (3, 3), padding=(1, 1, 1, 1))
        >>> plan = plan_layer(problem, SparseFilter.from_dense(weight))
        >>> plan.method in ("direct", "dense", "lowered")
        True

    Args:
        problem: the convolution, with its device; see :class:`escort.Problem`.
        sparse_filter: the weights, (K, C / groups, R, S).
        bias: (K,) on any device, or None; there is one if and only if ``problem.epilogue.bias``.
        methods: the candidates or their names, by default all methods of the problem's device.
        budget_s: seconds after which timing stops at three rounds per candidate.
        compile_budget_s: seconds that compiling kernels for this filter may take, by the methods' estimates and with
            all cores at work. A config beyond it is not tried, and its candidate says so; 0 rules out the methods that
            compile for each filter. What other methods compile is not counted.

    Raises:
        ValueError: where filter or bias are not the problem's, there is no such device or method, or no method can run
            the problem; the message holds each one's reason.
        torch.OutOfMemoryError: where the device cannot even hold the problem's input.
    """
    check_compile_budget(compile_budget_s)
    layer = Layer(problem, sparse_filter, bias)
    layer.check()
    chosen = None if methods is None else [_method(method, problem.device) for method in methods]
    task = _Task.of(layer, chosen)
    if recalled := _recall(task, compile_budget_s):
        return recalled[0]
    search = Search.of(task.layer, task.methods, compile_budget_s)
    return _remember(task, search, measure(task.layer, search, budget_s, Ahead()))


def plan_layers(
    layers: Sequence[tuple[Problem, SparseFilter, torch.Tensor | None]],
    compile_budget_s: float,
    preparing: Callable[[int, int], None] = lambda done, total: None,
    *,
    methods: Sequence[Method] | None = None,
) -> Iterator[Plan]:
    """The plans of a network's layers one by one, as :func:`plan_layer` makes them.

    What they will try on a GPU is prepared before the first is timed: preparing compiles, and so all cores have work.
    Each layer that has something to compile for its filter gets an equal share of what is left of the budget; what it
    does not need goes to those behind it. A layer that takes over a plan compiles the choice alone, when it first
    runs.

    Args:
        layers: problem, filter and bias of each.
        compile_budget_s: as of a layer, but for the sum of all.
        preparing: is called with how many candidates are prepared, and of how many.
        methods: the candidates of every layer, by default all methods of its problem's device.

    Raises:
        ValueError, torch.OutOfMemoryError: as `plan_layer`, where the layer's plan is due.
    """
    check_compile_budget(compile_budget_s)
    tasks = [_Task.of(Layer(*layer), methods) for layer in layers]
    searches, shares_s = _share_out(tasks, compile_budget_s)
    allowance = Allowance(layers[0][0].device) if layers else None
    ahead = {index: Ahead(allowance) for index in searches}
    begin = time.perf_counter()
    on_all_cores(
        [
            partial(ahead[index].prepare, tasks[index].layer, method, config)
            for index, search in searches.items()
            for method, configs in search.tried
            for config in configs
            if method.compiles_per_filter or tasks[index].layer.problem.device_type == "cuda"
        ],
        preparing,
    )
    _log.debug("prepared %d candidates in %.2f s", sum(map(len, ahead.values())), time.perf_counter() - begin)
    for index, task in enumerate(tasks):
        if search := searches.get(index):
            yield _remember(task, search, measure(task.layer, search, _BUDGET_S, ahead.pop(index)))
        else:
            yield plan_layer(*task.layer, methods=task.methods, compile_budget_s=shares_s[index])


def predicted_us(layers: Sequence[Layer], methods: Sequence[Method] | None = None) -> list[float | None]:
    """The least time in us that models predict for each layer, None for those of which no model says anything.

    Args:
        methods: as of :func:`plan_layers`.
    """
    known: dict[Hashable, float | None] = {}
    times: list[float | None] = []
    for task in (_Task.of(layer, methods) for layer in layers):
        key = task.key
        if key not in known:
            known[key] = min(predict_us(task.layer, task.methods).values(), default=None)
        times.append(known[key])
    return times


@dataclass(frozen=True)
class _Task:
    """A layer to plan, and the methods to choose from."""

    layer: Layer
    methods: Sequence[Method]

    @classmethod
    def of(cls, layer: Layer, methods: Sequence[Method] | None) -> _Task:
        return cls(layer, for_device(layer.problem.device) if methods is None else methods)

    @property
    def key(self) -> Hashable:
        """The same for layers that share a plan."""
        problem, nnz = self.layer.problem, self.layer.sparse_filter.nnz
        names = tuple(method.name for method in self.methods)
        return problem, round(math.log(nnz + 1) / 0.05), names, Machine.here(problem.device)

    @property
    def compiles(self) -> bool:
        """Whether a method may have something to compile for the filter."""
        return any(
            method.compiles_per_filter and method.unsupported(self.layer.problem) is None for method in self.methods
        )


def _share_out(tasks: Sequence[_Task], compile_budget_s: float) -> tuple[dict[int, Search], list[float]]:
    """What to try for the layers, by index, that will not take over a plan; and each one's share of the budget."""
    compiles = [task.compiles for task in tasks]
    budget = SharedBudget(compile_budget_s, sum(compiles))
    searches, shares_s = dict[int, Search](), list[float]()
    first: dict[Hashable, Search] = {}  # of those layers whose plans others will take over
    for index, task in enumerate(tasks):
        share_s = budget.next_share(compiles=compiles[index])
        shares_s.append(share_s)
        if not compiles[index] and task.layer.problem.device_type == "cpu":
            continue  # nothing takes time before it is timed
        key = task.key
        if recalled := _recall(task, share_s):
            budget.spend(recalled[1])
        elif key in first and not first[key].is_outgrown(share_s):
            budget.spend(max(first[key].compile_s, default=0.0))  # which of them it will be is not known yet
        else:
            searches[index] = first[key] = Search.of(task.layer, task.methods, share_s)
            budget.spend(sum(first[key].compile_s))
    return searches, shares_s


def _method(method: Method | str, device: str) -> Method:
    return by_name(method, device) if isinstance(method, str) else method


def forget() -> None:
    """Lets no layer take over an earlier plan: all that follow are measured."""
    _remembered.clear()


def _remember(task: _Task, search: Search, plan: Plan) -> Plan:
    _remembered[task.key] = plan, search
    return plan


def _recall(task: _Task, compile_budget_s: float) -> tuple[Plan, float] | None:
    """The plan to take over, if any, and about how long all cores take to compile its choice."""
    if (remembered := _remembered.get(task.key)) is None:
        return None
    plan, search = remembered
    if search.is_outgrown(compile_budget_s):
        return None
    method = next(method for method in task.methods if method.name == plan.method)
    if not method.compiles_per_filter:
        return plan, 0.0
    needed_s = estimate_s(method, task.layer, method.config_type(**plan.config))
    return (plan, needed_s) if fits(needed_s, compile_budget_s) else None
