"""From layers to plans: take over what is remembered or stored, else search, measure, remember and store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch

from escort.filter import SparseFilter
from escort.methods import Config, Method, by_name, for_device
from escort.planner import store
from escort.planner.compile_budget import SharedBudget, check_compile_budget, estimate_s, fits, outgrows
from escort.planner.cores import on_all_cores
from escort.planner.measure import Ahead, Allowance, check, measure
from escort.planner.plan import Layer, Plan
from escort.planner.search import Search, predict_us
from escort.problem import Problem

#: Seconds after which a layer's race stops at three rounds per candidate.
_BUDGET_S = 0.3
_log = logging.getLogger(__name__)

#: The plans that like layers take over.
_remembered: dict[store.Key, store.Hint] = {}


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

    A layer takes over the plan of an earlier one of the same problem and nearly the same number of nonzeros, from this
    process or from those that are stored on disk. Of such a plan the choice is validated on this filter. The layer is
    measured anew where that fails, where compiling the choice for its filter exceeds `compile_budget_s`, and where the
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
    return _plan(_Task.of(layer, chosen, compile_budget_s), Ahead(), budget_s)


def plan_layers(
    layers: Sequence[tuple[Problem, SparseFilter, torch.Tensor | None]],
    compile_budget_s: float,
    preparing: Callable[[int, int], None] = lambda done, total: None,
    *,
    methods: Sequence[Method] | None = None,
    remeasure: bool = False,
) -> Iterator[Plan]:
    """The plans of a network's layers one by one, as :func:`plan_layer` makes them.

    What they will try on a GPU is prepared before the first is timed: preparing compiles, and so all cores have work.
    Each layer that has something to compile for its filter gets an equal share of what is left of the budget; what it
    does not need goes to those behind it. A layer that takes over a plan prepares the choice alone: before the first
    is timed where the plan is known by then, else with all others whose plan is known when it is due.

    Args:
        layers: problem, filter and bias of each.
        compile_budget_s: as of a layer, but for the sum of all.
        preparing: is called with how many candidates are prepared, and of how many.
        methods: the candidates of every layer, by default all methods of its problem's device.
        remeasure: whether to take over no plan from before this call.

    Raises:
        ValueError, torch.OutOfMemoryError: as `plan_layer`, where the layer's plan is due.
    """
    check_compile_budget(compile_budget_s)
    if remeasure:
        _remembered.clear()
    tasks, searches, recalled, waiting = _share_out(
        [_Task.of(Layer(*layer), methods, reads_store=not remeasure) for layer in layers], compile_budget_s
    )
    allowance = Allowance(layers[0][0].device) if layers else None
    ahead = {index: Ahead(allowance) for index in range(len(tasks))}
    begin = time.perf_counter()
    on_all_cores(
        [
            partial(ahead[index].prepare, tasks[index].layer, method, config)
            for index, search in searches.items()
            for method, configs in search.tried
            for config in configs
            if method.compiles_per_filter or tasks[index].layer.problem.device_type == "cuda"
        ]
        + [partial(ahead[index].prepare, tasks[index].layer, *choice[:2]) for index, choice in recalled.items()],
        preparing,
    )
    _log.debug("prepared %d candidates in %.2f s", sum(map(len, ahead.values())), time.perf_counter() - begin)
    for index, task in enumerate(tasks):
        if search := searches.get(index):
            yield _remember(task, search, measure(task.layer, search, _BUDGET_S, ahead.pop(index)))
            continue
        if index in waiting:
            known = {other: choice for other in waiting if (choice := _recall(tasks[other]))}
            on_all_cores([partial(ahead[other].prepare, tasks[other].layer, *known[other][:2]) for other in known])
            waiting -= known.keys() | {index}
        yield _plan(task, ahead.pop(index), _BUDGET_S)


def are_known(layers: Sequence[Layer], methods: Sequence[Method] | None = None) -> bool:
    """Whether each layer would take over a plan where nothing may be compiled for its filter.

    Args:
        methods: as of :func:`plan_layers`.
    """
    return all(_recall(_Task.of(layer, methods)) for layer in layers)


def predicted_us(layers: Sequence[Layer], methods: Sequence[Method] | None = None) -> list[float | None]:
    """The least time in us that models predict for each layer, None for those of which no model says anything.

    Args:
        methods: as of :func:`plan_layers`.
    """
    known: dict[store.Key, float | None] = {}
    times: list[float | None] = []
    for task in (_Task.of(layer, methods) for layer in layers):
        key = task.key
        if key not in known:
            known[key] = min(predict_us(task.layer, task.methods).values(), default=None)
        times.append(known[key])
    return times


@dataclass(frozen=True)
class _Task:
    """A layer to plan.

    Attributes:
        methods: to choose from.
        compile_budget_s: what compiling for its filter may take.
        reads_store: whether it may take over a plan from disk.
    """

    layer: Layer
    methods: Sequence[Method]
    compile_budget_s: float
    reads_store: bool

    @classmethod
    def of(
        cls,
        layer: Layer,
        methods: Sequence[Method] | None,
        compile_budget_s: float = 0.0,
        *,
        reads_store: bool = True,
    ) -> _Task:
        return cls(
            layer, for_device(layer.problem.device) if methods is None else methods, compile_budget_s, reads_store
        )

    @cached_property
    def key(self) -> store.Key:
        """The same for layers that share a plan."""
        return store.Key.of(self.layer, self.methods, compiles=self.compile_budget_s > 0.0 and self.compiles)

    @cached_property
    def compiles(self) -> bool:
        """Whether a method may have something to compile for the filter."""
        return any(
            method.compiles_per_filter and method.unsupported(self.layer.problem) is None for method in self.methods
        )


class _Choice(NamedTuple):
    """What a layer takes over.

    Attributes:
        method, config: of the plan.
        hint: the plan, and where it is from.
        compile_s: about how long all cores take to compile the choice.
    """

    method: Method
    config: Config
    hint: store.Hint
    compile_s: float


def _share_out(
    tasks: Sequence[_Task], compile_budget_s: float
) -> tuple[list[_Task], dict[int, Search], dict[int, _Choice], set[int]]:
    """Gives each task its share of the budget, and says what is prepared for it, by its index.

    Returns:
        The tasks; what to try for those that will not take over a plan; what those take over whose plan is known; and
        those whose plan is that of another one. What compiles nothing on a CPU is in none: it takes no time before it
        is timed.
    """
    budget = SharedBudget(compile_budget_s, sum(task.compiles for task in tasks))
    sharing, searches, recalled, waiting = list[_Task](), dict[int, Search](), dict[int, _Choice](), set[int]()
    first: dict[store.Key, Search] = {}  # of those layers whose plans others will take over
    for index, without_share in enumerate(tasks):
        compiles, share_s = without_share.compiles, budget.next_share(compiles=without_share.compiles)
        task = replace(without_share, compile_budget_s=share_s)
        sharing.append(task)
        if not compiles and task.layer.problem.device_type == "cpu":
            continue
        if choice := _recall(task):
            recalled[index] = choice
            budget.spend(choice.compile_s)
        elif task.key in first and not outgrows(share_s, first[task.key].cut_at_s):
            waiting.add(index)
            budget.spend(max(first[task.key].compile_s, default=0.0))  # which of them it will be is not known yet
        else:
            searches[index] = first[task.key] = Search.of(task.layer, task.methods, share_s)
            budget.spend(sum(searches[index].compile_s))
    return sharing, searches, recalled, waiting


def _method(method: Method | str, device: str) -> Method:
    return by_name(method, device) if isinstance(method, str) else method


def _plan(task: _Task, ahead: Ahead, budget_s: float) -> Plan:
    """The plan that a layer takes over, where its choice is right for the layer; else it is measured."""
    if choice := _recall(task):
        plan = check(task.layer, choice.hint.plan, choice.method, ahead)
        if plan is not None:
            if choice.hint.imported:
                _keep(task.key, replace(choice.hint, imported=False))
            return plan
    search = Search.of(task.layer, task.methods, task.compile_budget_s)
    return _remember(task, search, measure(task.layer, search, budget_s, Ahead()))


def _remember(task: _Task, search: Search, plan: Plan) -> Plan:
    _keep(task.key, store.Hint(plan, search.cut_at_s))
    return plan


def _keep(key: store.Key, hint: store.Hint) -> None:
    _remembered[key] = hint
    store.save(key, hint)


def _recall(task: _Task) -> _Choice | None:
    """What to take over, if anything."""
    hint = _known(task)
    if hint is None or hint.is_outgrown(task.compile_budget_s):
        return None
    method, config = _choice_of(hint.plan, task)
    if not method.compiles_per_filter:
        return _Choice(method, config, hint, 0.0)
    needed_s = estimate_s(method, task.layer, config)
    return _Choice(method, config, hint, needed_s) if fits(needed_s, task.compile_budget_s) else None


def _known(task: _Task) -> store.Hint | None:
    """The plan that was measured for like layers, in this process or in another."""
    if (hint := _remembered.get(task.key)) is not None or not task.reads_store:
        return hint
    hint = store.load(task.key)
    if hint is None or (hint.imported and not _is_offered(hint.plan, task)):
        return None
    _remembered[task.key] = hint
    return hint


def _choice_of(plan: Plan, task: _Task) -> tuple[Method, Config]:
    method = next(method for method in task.methods if method.name == plan.method)
    return method, method.config_type(**plan.config)


def _is_offered(plan: Plan, task: _Task) -> bool:
    """Whether a plan's choice is one that the method itself offers for a layer. Kernels trust their configs."""
    method, config = _choice_of(plan, task)
    problem, sparse_filter, _ = task.layer
    return method.unsupported(problem) is None and method.offers(problem, sparse_filter, config)
