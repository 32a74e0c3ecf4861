"""From layers to plans: take over what is remembered or stored, else search, measure, remember and store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch

from escort.filter import SparseFilter
from escort.methods import Config, Method, by_name, for_device
from escort.planner import store
from escort.planner.compile_budget import Grant, Offer, check_compile_budget, estimate_s, fits, share_out
from escort.planner.cores import Limit, on_all_cores, threads
from escort.planner.measure import Ahead, Allowance, check, compile_kernel, kernels_of, measure
from escort.planner.plan import Layer, Plan, Planned
from escort.planner.search import Search, predict_compiled_us, predict_us, runs
from escort.problem import Problem

#: Seconds after which a layer's race stops at three rounds per candidate.
_BUDGET_S = 0.3
#: Seconds of one core beyond which compiling for a filter is not left for when its turn comes.
_LONG_S = 3.0
_log = logging.getLogger(__name__)

#: The plans that like layers take over.
_remembered: dict[store.Key, store.Hint] = {}


def plan_layer(
    problem: Problem,
    sparse_filter: SparseFilter,
    bias: torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
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
        slope: (K,) on any device, the slopes of the activation "prelu"; None for others.
        methods: the candidates or their names, by default all methods of the problem's device.
        budget_s: seconds after which timing stops at three rounds per candidate.
        compile_budget_s: seconds that compiling kernels for this filter may take, by the methods' estimates and with
            all cores at work. A config beyond it is not tried, and its candidate says so; 0 rules out the methods that
            compile for each filter. What other methods compile is not counted.

    Raises:
        ValueError: where filter, bias or slopes are not the problem's, there is no such device or method, or no method
            can run the problem; the message holds each one's reason.
        torch.OutOfMemoryError: where the device cannot even hold the problem's input.
    """
    check_compile_budget(compile_budget_s)
    layer = Layer(problem, sparse_filter, bias, slope)
    layer.check()
    chosen = None if methods is None else [_method(method, problem.device) for method in methods]
    task = _Task.of(layer, chosen)
    if compile_budget_s > 0.0:
        (grant,) = share_out([Offer.of(layer, task.methods)], compile_budget_s)
        task = replace(task, grant=replace(grant, seconds=compile_budget_s))
    return _plan(task, Ahead(), budget_s).plan


def plan_layers(
    layers: Sequence[Layer | tuple[Problem, SparseFilter, torch.Tensor | None]],
    compile_budget_s: float,
    preparing: Callable[[int, int], None] = lambda done, total: None,
    *,
    methods: Sequence[Method] | None = None,
    remeasure: bool = False,
) -> Iterator[Planned]:
    """The plans of a network's layers one by one, as :func:`plan_layer` makes them, each with its choice as prepared.

    What they will try on a GPU is prepared before the first is timed: preparing compiles, and so all cores have work.
    What is compiled for filters is what saves most of the network's time in a second of compiling, by the methods'
    models and by what is known of like layers; a layer where it is predicted to save nothing gets none. A layer that
    takes over a plan prepares the choice alone: before the first is timed where the plan is known by then, else with
    all others whose plan is known when it is due.

    Args:
        layers: problem, filter, bias and slopes of each; those that a layer has not may be left out.
        compile_budget_s: as of a layer, but for the sum of all. Once compiling has taken so long by the clock, nothing
            more is compiled for a filter, and its candidate says so.
        preparing: is called with how many kernels are compiled and candidates prepared, and of how many.
        methods: the candidates of every layer, by default all methods of its problem's device.
        remeasure: whether to take over no plan from before this call.

    Raises:
        ValueError, torch.OutOfMemoryError: as `plan_layer`, where the layer's plan is due.
    """
    check_compile_budget(compile_budget_s)
    if remeasure:
        _remembered.clear()
    tasks = [_Task.of(Layer(*layer), methods, reads_store=not remeasure) for layer in layers]
    if compile_budget_s > 0.0:
        tasks = _share_out(tasks, compile_budget_s)
    searches, waiting = dict[int, Search](), set[int]()
    allowance = Allowance(layers[0][0].device) if layers else None
    limit, late = Limit(compile_budget_s), set[store.Key]()
    ahead = {index: Ahead(allowance, limit) for index in range(len(tasks))}
    begin = time.perf_counter()
    choices = _to_prepare(tasks, searches, waiting)
    with limit.counting():
        on_all_cores(_jobs((tasks[index].layer, ahead[index], *choice) for index, *choice in choices), preparing)
    _log.debug("prepared %d candidates in %.2f s", sum(map(len, ahead.values())), time.perf_counter() - begin)
    for index, task in enumerate(tasks):
        if search := searches.get(index):
            yield _measured(task, search, _BUDGET_S, ahead[index])
            if ahead.pop(index).was_late:
                late.add(task.key)
            continue
        if index in waiting:
            known = {other: choice for other in waiting if (choice := _recall(tasks[other]))}
            with limit.counting():
                on_all_cores(_jobs((tasks[other].layer, ahead[other], *known[other][:2]) for other in known))
            waiting -= known.keys() | {index}
        yield _plan(task, ahead.pop(index), _BUDGET_S)
    for key in late:  # equal layers took it over; another call has time of its own
        _remembered.pop(key, None)


def known_us(layers: Sequence[Layer], methods: Sequence[Method] | None = None) -> list[float] | None:
    """The times in us of the plans that layers would take over where nothing may be compiled for their filters.

    None where a layer would take over none.

    Args:
        methods: as of :func:`plan_layers`.
    """
    times_us: list[float] = []
    for layer in layers:
        choice = _recall(_Task.of(layer, methods))
        if choice is None or choice.hint.plan.time_us is None:
            return None
        times_us.append(choice.hint.plan.time_us)
    return times_us


def predicted_us(layers: Sequence[Layer], methods: Sequence[Method] | None = None) -> list[float | None]:
    """The least time in us that models predict for each layer, None for those of which no model says anything.

    Args:
        methods: as of :func:`plan_layers`.
    """
    tasks = [_Task.of(layer, methods) for layer in layers]
    alike = {task.key: task for task in reversed(tasks)}

    def least_us(task: _Task) -> float | None:
        return min(predict_us(task.layer, task.methods).values(), default=None)

    with threads() as pool:  # orders of channels, which take longest, are searched outside of Python's lock
        times_us = dict(zip(alike, pool.map(least_us, alike.values()), strict=True))
    return [times_us[task.key] for task in tasks]


@dataclass(frozen=True)
class _Task:
    """A layer to plan.

    Attributes:
        methods: to choose from.
        reads_store: whether it may take over a plan from disk.
        grant: what may be compiled for its filter; None where nothing may be compiled for any.
    """

    layer: Layer
    methods: Sequence[Method]
    reads_store: bool
    grant: Grant | None = None

    @classmethod
    def of(cls, layer: Layer, methods: Sequence[Method] | None, *, reads_store: bool = True) -> _Task:
        return cls(layer, for_device(layer.problem.device) if methods is None else methods, reads_store)

    @cached_property
    def key(self) -> store.Key:
        """The same for layers that share a plan."""
        return store.Key.of(self.layer, self.methods, compiles=self.grant is not None and self.compiles)

    @property
    def compile_budget_s(self) -> float:
        """What compiling for its filter may take."""
        return 0.0 if self.grant is None else self.grant.seconds

    @cached_property
    def compiles(self) -> bool:
        """Whether a method may have something to compile for the filter."""
        return any(
            method.compiles_per_filter and method.unsupported(self.layer.problem) is None for method in self.methods
        )


class _Choice(NamedTuple):
    """What a layer takes over: the method and config of a plan, and where the plan is from."""

    method: Method
    config: Config
    hint: store.Hint


def _share_out(tasks: Sequence[_Task], compile_budget_s: float) -> list[_Task]:
    """The tasks with what each may compile. A layer that has nothing to compile may do what it wants."""
    alike: dict[store.Key, list[_Task]] = {}
    for task in tasks:
        alike.setdefault(task.key, []).append(task)
    offers = {key: _offer(group[0], len(group)) for key, group in alike.items() if group[0].compiles}
    grants = dict(zip(offers, share_out(list(offers.values()), compile_budget_s), strict=True))
    return [replace(task, grant=grants.get(task.key, Grant(compile_budget_s))) for task in tasks]


def _offer(task: _Task, layers: int) -> Offer:
    """What could be compiled for so many layers like this one, and what it saves, as measured before or predicted."""
    offer = Offer.of(task.layer, task.methods, layers)
    compiled_us, known = predict_compiled_us(task.layer, offer.configs), _known(task)
    other_us = min(predict_us(task.layer, task.methods).values(), default=None) if known is None else known.plan.time_us
    saved_us = _less(compiled_us, other_us)
    if searched := _known(replace(task, grant=Grant(0.0))):
        compiling = {method.name for method, _ in offer.configs}
        others = {method.name for method in task.methods} - compiling
        measured_us = _less(_best_us(searched.plan, compiling), _best_us(searched.plan, others))
        saved_us = saved_us if measured_us is None else measured_us
    return replace(offer, compiled_us=compiled_us, saved_us=saved_us)


def _less(one_us: float | None, other_us: float | None) -> float | None:
    """How much less time one takes than another; None where a time is not known."""
    return None if one_us is None or other_us is None else other_us - one_us


def _best_us(plan: Plan, methods: set[str]) -> float | None:
    """The least time in us that a plan has of some methods."""
    times_us = (plan.best_us(name) for name in methods)
    return min((us for us in times_us if us is not None), default=None)


def _to_prepare(
    tasks: Sequence[_Task], searches: dict[int, Search], waiting: set[int]
) -> Iterator[tuple[int, Method, Config]]:
    """What is prepared, by the index of its task: what will be tried, and what is taken over of a plan that is known.

    What compiles nothing on a CPU is left out: it takes no time before it is timed. Where kernels for the weights take
    one core long and are likely to win, layers that will take over a plan are prepared for the best guess of it.

    Args:
        searches: those of the tasks that will not take over a plan are written to it.
        waiting: the tasks whose plan is that of another one are written to it.
    """
    begun: dict[store.Key, Search] = {}  # of those layers whose plans others will take over
    for index, task in enumerate(tasks):
        on_gpu = task.layer.problem.device_type == "cuda"
        if not task.compiles and not on_gpu:
            continue
        if choice := _recall(task):
            yield index, choice.method, choice.config
        elif (other := begun.get(task.key)) is not None:
            waiting.add(index)
            yield from ((index, *guess) for guess in _guess(other, task))
        else:
            search = searches[index] = begun[task.key] = Search.of(task.layer, task.methods, task.grant)
            for method, configs in search.tried:
                if on_gpu or method.compiles_per_filter:
                    yield from ((index, method, config) for config in configs)


def _guess(search: Search, task: _Task) -> list[tuple[Method, Config]]:
    """What a search is likely to choose for a layer that shares its plan, if that takes long to compile."""
    if task.grant is None or not task.grant.is_likely:
        return []
    guesses = [(method, configs[0]) for method, configs in search.tried if method.compiles_per_filter and configs]
    return [guess for guess in guesses[:1] if _compile_s(task.layer, *guess) > _LONG_S]


def _compile_s(layer: Layer, method: Method, config: Config) -> float:
    """About how many seconds of one core it takes to compile a config for the layer's filter."""
    return method.compile_s(layer.problem, layer.sparse_filter, config) if method.compiles_per_filter else 0.0


def _jobs(choices: Iterable[tuple[Layer, Ahead, Method, Config]]) -> Iterator[Callable[[], None]]:
    """Jobs that prepare choices: first each kernel that any of them needs, then the choices, what takes longest first.

    Layers ask for the same few kernels: threads that prepared them one by one would wait for each other. The first are
    compiled while what comes next is searched.
    """
    prepare: list[tuple[float, Callable[[], None]]] = []
    compiled: set[Hashable] = set()
    for layer, ahead, method, config in choices:
        prepare.append((_compile_s(layer, method, config), partial(ahead.prepare, layer, method, config)))
        for variant in kernels_of(layer, method, config):
            if variant.key not in compiled:
                compiled.add(variant.key)
                yield partial(compile_kernel, layer, variant)
    prepare.sort(key=lambda timed: -timed[0])
    yield from (job for _, job in prepare)


def _method(method: Method | str, device: str) -> Method:
    return by_name(method, device) if isinstance(method, str) else method


def _plan(task: _Task, ahead: Ahead, budget_s: float) -> Planned:
    """The plan that a layer takes over, where its choice is right for the layer; else it is measured."""
    if choice := _recall(task):
        planned = check(task.layer, choice.hint.plan, choice.method, ahead)
        if planned is not None:
            if choice.hint.imported or not store.is_stored(task.key):  # it may have been cleared, or lie elsewhere
                _keep(task.key, replace(choice.hint, imported=False))
            return planned
    search = Search.of(task.layer, task.methods, task.grant)
    return _measured(task, search, budget_s, ahead.afresh())


def _measured(task: _Task, search: Search, budget_s: float, ahead: Ahead) -> Planned:
    """The plan by measurement, which is remembered where nothing disturbed it."""
    planned = measure(task.layer, search, budget_s, ahead)
    if (plan := planned.plan).is_steady and not ahead.was_late:
        _keep(task.key, store.Hint(plan, search.cut_at_s))
    elif ahead.was_late:
        _remembered[task.key] = store.Hint(plan, search.cut_at_s)
        _log.info("no time was left to compile all that %s tries: its plan is for this conversion alone", plan.problem)
    else:
        _log.info("others disturbed the times of %s: no other layer takes over its plan", plan.problem)
    return planned


def _keep(key: store.Key, hint: store.Hint) -> None:
    _remembered[key] = hint
    store.save(key, hint)


def _recall(task: _Task) -> _Choice | None:
    """What to take over, if anything."""
    hint = _known(task)
    if hint is None or hint.is_outgrown(task.compile_budget_s):
        return None
    method, config = _choice_of(hint.plan, task)
    if method.compiles_per_filter and not fits(estimate_s(method, task.layer, config), task.compile_budget_s):
        return None
    return _Choice(method, config, hint)


def _known(task: _Task) -> store.Hint | None:
    """The plan that was measured for like layers, in this process or in another."""
    if (hint := _remembered.get(task.key)) is not None or not task.reads_store:
        return hint
    hint = store.load(task.key)
    if hint is None or not _can_run(hint, task):
        return None
    _remembered[task.key] = hint
    return hint


def _choice_of(plan: Plan, task: _Task) -> tuple[Method, Config]:
    method = next(method for method in task.methods if method.name == plan.method)
    return method, method.config_type(**plan.config)


def _can_run(hint: store.Hint, task: _Task) -> bool:
    """Whether the method runs a layer here by a stored choice.

    Of another's it must be one that the method itself offers for the layer: kernels trust their configs.
    """
    method, config = _choice_of(hint.plan, task)
    problem, sparse_filter = task.layer.problem, task.layer.sparse_filter
    if method.unsupported(problem) or (hint.imported and not method.offers(problem, sparse_filter, config)):
        return False
    return runs(method, task.layer, config)
