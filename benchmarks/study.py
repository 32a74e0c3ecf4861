"""The Escoin paper's study (arXiv 1802.10280) on one device, one function per question.

A question is a list of items, an item a few rows that are raced in one go after their outputs were checked. A question
at one precision is one result file, written anew after every item: a study that was cut off goes on where it stopped.
:mod:`benchmarks.findings` says what the rows mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks import counters, suite
from benchmarks import result_files as results
from benchmarks.breakdown import marking, network_part_times, part_times
from benchmarks.findings import OURS, SPARSE, random_weights
from benchmarks.paper_layers import PAPER_LAYERS
from benchmarks.result_files import Item
from benchmarks.suite import WHOLE, Layer, Narrowed, Row
from escort.filter import SparseFilter
from escort.methods import Method, by_name, channel_order, dense_for, for_device
from escort.network.check import EFFORT_S
from escort.planner import timing as bench
from escort.problem import TORCH_DTYPE, Precision, Problem

#: The paper's networks, and the numbers of images that it took for them.
PAPER_BATCH = {entry.network: entry.batch for entry in PAPER_LAYERS}
#: Shares of zeros at which networks and shapes of layers are compared.
SPARSITIES = (0.70, 0.80, 0.85, 0.90, 0.95, 0.98)
#: Zeros in the whole networks whose time is broken down.
BREAKDOWN_SPARSITY = 0.90


class Network(Protocol):
    """How to build a network, and the shape (C, H, W) of an input."""

    @property
    def factory(self) -> Callable[..., nn.Module]: ...

    @property
    def input_size(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Study:
    """What is studied.

    Attributes:
        device: as torch writes it.
        networks: names of the paper's.
        batch: images; None for as many as the paper took for each network.
        layers: only layers that are named like this, globs with commas between them.
        sparsities: shares of zeros of networks and layers with random weights.
        search: most configurations of a method that are tried on a layer, best guesses first.
        budget_s: seconds of timing per race.
        compile_budget_s: of whole networks, as of :func:`escort.convert`.
        seed: of positions, weights and inputs.
        factories: whole networks by name.
        patterns: files of real patterns, see :func:`benchmarks.suite.pattern_layers`.
        methods: names of those that are compared, all where none are named.
    """

    device: str = "cpu"
    networks: tuple[str, ...] = tuple(PAPER_BATCH)
    batch: int | None = None
    layers: str = "*"
    sparsities: tuple[float, ...] = SPARSITIES
    search: int = 16
    budget_s: float = 0.5
    compile_budget_s: float = EFFORT_S["best"]
    seed: int = 0
    factories: Mapping[str, Network] = field(default_factory=dict)
    patterns: tuple[Path, ...] = ()
    methods: tuple[str, ...] = ()
    #: What :func:`compare` found, by network, layer, batch and precision: other questions start from it.
    raced: dict[tuple[str, str, int, str], list[Row]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        unknown = [name for name in self.networks if name not in PAPER_BATCH]
        if unknown or not self.networks:
            raise ValueError(f"there is no network {', '.join(unknown)}; there are {', '.join(PAPER_BATCH)}")
        if strangers := set(self.methods) - {method.name for method in for_device(self.device)}:
            there = ", ".join(method.name for method in for_device(self.device))
            raise ValueError(f"there is no method {', '.join(sorted(strangers))}; there are {there}")
        if not all(0.0 < sparsity < 1.0 for sparsity in self.sparsities) or not self.sparsities:
            raise ValueError(f"sparsities are shares of zeros between 0 and 1, got {self.sparsities}")
        if not self.patterns and not any(self.has(e.layer) for e in PAPER_LAYERS if e.network in self.networks):
            there = ", ".join(e.layer for e in PAPER_LAYERS if e.network in self.networks)
            raise ValueError(f"no layer is named like {self.layers}; there are {there}")

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    def has(self, layer: str) -> bool:
        """Whether layers of this name are studied."""
        return any(fnmatch(layer, pattern) for pattern in self.layers.split(","))

    def images(self, network: str) -> int:
        return self.batch or PAPER_BATCH[network]

    @property
    def compared(self) -> list[Method]:
        return [method for method in for_device(self.device) if not self.methods or method.name in self.methods]

    def conditions(self) -> dict[str, Any]:
        """What two runs must share to go into one file, beside the machine."""
        named = {"methods": list(self.methods)} if self.methods else {}
        return {"device": self.device, "search": self.search, "seed": self.seed, **named}


def compare(study: Study, dtype: Precision) -> list[Item]:
    """RQ1 and RQ3: every method on every layer at the published sparsities.

    What is compiled for the layers' filters is compiled when the first of them is measured, all side by side.
    """
    layers = _layers(study, dtype)

    @cache
    def ahead() -> dict[tuple[str, str, int, str], list[Narrowed]]:
        missing = [layer for layer in layers if _key(layer) not in study.raced]
        methods = suite.narrowed(missing, study.compared, study.search)
        return dict(zip(map(_key, missing), methods, strict=True))

    def measure(layer: Layer) -> list[Row]:
        if methods := ahead().pop(_key(layer), None):
            study.raced[_key(layer)] = _race(study, layer, methods)
        return _raced(study, layer)

    return [Item(_label(layer), partial(measure, layer)) for layer in layers]


def compare_on_patterns(study: Study, dtype: Precision) -> list[Item]:
    """Our sparse methods against the dense library on layers that were really pruned.

    Raises:
        ValueError: without files of patterns, for one that is none, and where no layer is named as asked.
    """
    if not study.patterns:
        raise ValueError("real patterns come from files: name them with --patterns FILE.npz,...")
    return [item for path in study.patterns for item in _pattern_items(study, path, dtype)]


def _pattern_items(study: Study, path: Path, dtype: Precision) -> list[Item]:
    there = suite.pattern_layers(path, study.batch, study.seed, dtype=dtype, device=study.device)
    places = [place for place, layer in enumerate(there) if study.has(layer.name)]
    if not places:
        names = ", ".join(layer.name for layer in there)
        raise ValueError(f"{path}: no layer is named like {study.layers}; there are {names}")
    methods = [method for method in study.compared if method.name in (*SPARSE, dense_for(study.device).name)]

    @cache
    def ahead() -> dict[int, tuple[Layer, list[Narrowed]]]:
        ordered = in_order_of_channels_last(there)
        layers = [ordered[place] for place in places]
        return dict(zip(places, zip(layers, suite.narrowed(layers, methods, study.search), strict=True), strict=True))

    def measure(place: int) -> list[Row]:
        return _race(study, *ahead()[place])

    return [Item(f"{there[i].weights} {there[i].name} N={there[i].problem.batch}", partial(measure, i)) for i in places]


def in_order_of_channels_last(layers: Sequence[Layer]) -> list[Layer]:
    """A residual network's layers with their input channels in the order that it gives them in channels_last.

    A larger kernel, or a pointwise one that widens, alone reads its input, which gets the order that is best for it.
    Other pointwise layers that read maps of the same shape read the sums of one stage, which has one order for all of
    them; it is free unless the stage is the last, which no layer of stride 2 reads.
    """
    alone: list[list[int]] = []
    sums: dict[tuple[int, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        p = layer.problem
        if p.groups > 1:
            continue
        if p.kernel_size != (1, 1) or (p.stride == (1, 1) and p.out_channels > p.in_channels):
            alone.append([place])
        else:
            sums.setdefault(p.input_shape, []).append(place)
    free = [places for places in sums.values() if any(layers[place].problem.stride != (1, 1) for place in places)]
    found = list(layers)
    for places in alone + free:
        weights = [layers[place].filter.to_dense() for place in places]
        problem = layers[places[0]].problem
        channels = channel_order(weights, problem.precision, problem.device)
        if channels is None:
            continue
        for place, weight in zip(places, weights, strict=True):
            found[place] = replace(layers[place], filter=SparseFilter.from_dense(weight[:, channels]))
    return found


def ablate(study: Study, dtype: Precision) -> list[Item]:
    """RQ2: `direct` in its fastest configuration and with one field of it changed at a time.

    The first row of a layer is the configuration that the others change.
    """

    def measure(layer: Layer) -> list[Row]:
        method, config = by_name(OURS, study.device), _best_config(study, layer, OURS)
        changes = [c for changed in method.neighbours(config, layer.problem, layer.filter).values() for c in changed]
        rows = _race(study, layer, [Narrowed(method, [config, *changes])])
        if not rows or _config(method, rows[0]) != config:
            raise RuntimeError(f"{config}, which was the fastest, could not be timed again")
        return rows

    return [Item(_label(layer), partial(measure, layer)) for layer in _one_per_map(_layers(study, dtype))]


def count(study: Study, dtype: Precision) -> list[Item]:
    """RQ2's evidence: hardware counters of `direct` on the same layers."""

    def measure(layer: Layer) -> list[Row]:
        config = _best_config(study, layer, OURS)
        (checked,) = _race(study, layer, [Narrowed(by_name(OURS, study.device), [config])])
        time_us, counts = counters.read(layer, OURS, config, study.seed)
        return [replace(checked, config={**checked.config, "counters": counts}, time_us=round(time_us, 2))]

    return [Item(_label(layer), partial(measure, layer)) for layer in _one_per_map(_layers(study, dtype))]


def find_break_even(study: Study, dtype: Precision) -> list[Item]:
    """RQ4 for layers: `direct` at several sparsities against the dense library, on each shape once."""

    def measure(layer: Layer, sparsity: float) -> list[Row]:
        sparse_filter = suite.random_filter(layer.problem, sparsity, study.seed)
        methods = [by_name(name, study.device) for name in (OURS, dense_for(study.device).name)]
        return _race(study, replace(layer, weights=random_weights(sparsity), filter=sparse_filter), methods)

    shapes: dict[Problem, Layer] = {}
    for layer in _layers(study, dtype):
        shapes.setdefault(layer.problem, layer)
    return [
        Item(f"{_label(layer)} {sparsity:.2f}", partial(measure, layer, sparsity))
        for layer in shapes.values()
        for sparsity in study.sparsities
    ]


def sweep_networks(study: Study, dtype: Precision) -> list[Item]:
    """RQ4 for networks: converted ones against torch's ways to run them dense, at several sparsities."""

    def measure(name: str, sparsity: float) -> list[Row]:
        model, x = _pruned(study, name, sparsity, dtype)
        against = () if study.device_type == "cpu" else suite.RIVALS["cuda"]
        return suite.measure_network(
            model,
            x,
            network=name,
            weights=random_weights(sparsity),
            against=against,
            precision=dtype,
            budget_s=4 * study.budget_s,
            compile_budget_s=study.compile_budget_s,
        )

    return [
        Item(f"{name} {sparsity:.2f} N={study.images(name)}", partial(measure, name, sparsity))
        for name in study.networks
        for sparsity in study.sparsities
    ]


def break_down(study: Study, dtype: Precision) -> list[Item]:
    """Where the time goes: in every method's best configuration on the pruned layers, and in whole networks."""

    def measure(layer: Layer) -> list[Row]:
        x = bench.example_inputs(layer.problem, seed=study.seed)[0][0]
        rows = []
        for row in _best_rows(_raced(study, layer)):
            method = by_name(row.method, study.device)
            config = _config(method, row)
            run = partial(method.prepare(layer.problem, layer.filter, None, config), suite.as_taken(method, config, x))
            with torch.inference_mode():
                parts = part_times(marking(run) if row.method == OURS else run, study.device)
            for part, time_us in parts.items():
                rows.append(replace(row, config={**row.config, "part": part}, time_us=round(time_us, 2)))
        return rows

    def measure_network(name: str) -> list[Row]:
        model, x = _pruned(study, name, BREAKDOWN_SPARSITY, dtype)
        about = name, random_weights(BREAKDOWN_SPARSITY), WHOLE, len(x), dtype
        return [
            Row(*about, method, {**config, "part": part}, round(time_us, 2), error)
            for method, config, error, parts in network_part_times(model, x, dtype)
            for part, time_us in parts.items()
        ]

    layers = [Item(_label(layer), partial(measure, layer)) for layer in _layers(study, dtype)]
    return layers + [Item(f"{name} N={study.images(name)}", partial(measure_network, name)) for name in study.networks]


def _pruned(study: Study, name: str, sparsity: float, dtype: Precision) -> tuple[nn.Module, Tensor]:
    """A whole network with random weights, pruned by magnitude, and an input for it."""
    torch.manual_seed(study.seed)
    network = study.factories[name]
    model = network.factory().eval()
    suite.prune_all_but_first(model, sparsity)
    x = torch.randn(study.images(name), *network.input_size)
    return model.to(study.device, TORCH_DTYPE[dtype]), x.to(study.device, TORCH_DTYPE[dtype])


@dataclass(frozen=True)
class Part:
    """A question's rows of one kind: the stem of their files, what measures them, in which precisions by default.

    `raced` says whether it starts from the methods raced on the paper's layers, which `layers` files hold.
    """

    stem: str
    items: Callable[[Study, Precision], list[Item]]
    dtypes: tuple[Precision, ...]
    raced: bool = True


QUESTIONS: dict[str, tuple[Part, ...]] = {
    "rq1": (Part("layers", compare, ("fp32",)),),
    "rq3": (Part("layers", compare, ("fp32", "fp16", "tf32", "bf16")),),
    "rq2": (Part("ablation", ablate, ("fp32", "fp16")),),
    "rq4": (
        Part("break-even", find_break_even, ("fp32", "fp16"), raced=False),
        Part("networks", sweep_networks, ("fp32", "fp16"), raced=False),
    ),
    "breakdown": (Part("breakdown", break_down, ("fp32",)),),
    "patterns": (Part("patterns", compare_on_patterns, ("fp32", "tf32", "fp16"), raced=False),),
}
#: Those that need nothing but a device.
PAPER_QUESTIONS = tuple(name for name in QUESTIONS if name != "patterns")
COUNTERS = Part("counters", count, ("fp32", "fp16"))


def plan(study: Study, parts: Iterable[Part], dtypes: Sequence[Precision] | None = None) -> dict[str, list[Item]]:
    """What is to be measured: the items of each result file by its stem, in order.

    Args:
        dtypes: precisions instead of each part's own; the CPU has fp32 only.

    Raises:
        ValueError: for a precision that the device does not have.
    """
    own: tuple[Precision, ...] | None = ("fp32",) if study.device_type == "cpu" else None
    if own and set(dtypes or own) - set(own):
        raise ValueError(f"the CPU's methods compute in fp32, not in {', '.join(set(dtypes or ()) - set(own))}")
    work: dict[str, list[Item]] = {}
    for part in parts:
        for dtype in dtypes or own or part.dtypes:
            work.setdefault(f"{part.stem}-{dtype}", part.items(study, dtype))
    return work


def run(
    study: Study,
    work: Mapping[str, Sequence[Item]],
    folder: Path,
    command: str,
    *,
    again: bool = False,
    begin: Callable[[str, str], object] = lambda stem, label: None,
) -> dict[str, str]:
    """Measures what a folder does not hold yet, and returns what failed, see :func:`benchmarks.result_files.measure`.

    Args:
        work: items by the stem of their file, as :func:`plan` makes them.
        command: for the headers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = suite.header(command, study.device) | {"study": study.conditions()}
    apart = {part.stem for parts in QUESTIONS.values() for part in parts if not part.raced}
    needed = not again and any(stem.rpartition("-")[0] not in apart for stem in work)
    for path in folder.glob("layers-*.json") if needed else ():
        for row in results.known(path, head).rows:
            study.raced.setdefault((row.network, row.layer, row.batch, row.dtype), []).append(row)
    return results.measure(work, folder, head, again=again, begin=begin)


def _layers(study: Study, dtype: Precision) -> list[Layer]:
    """The paper's layers that are studied, in its order."""
    layers = suite.paper_layers(study.batch, study.seed, dtype=dtype, device=study.device)
    return [layer for layer in layers if layer.network in study.networks and study.has(layer.name)]


def _one_per_map(layers: Sequence[Layer]) -> list[Layer]:
    """The first layer of each network on each size of map."""
    found: dict[tuple[str, int, int], Layer] = {}
    for layer in layers:
        found.setdefault((layer.network, layer.problem.height, layer.problem.width), layer)
    return list(found.values())


def _label(layer: Layer) -> str:
    return f"{layer.network} {layer.name} N={layer.problem.batch}"


def _race(study: Study, layer: Layer, methods: Sequence[Method]) -> list[Row]:
    narrowed = [m if isinstance(m, Narrowed) else Narrowed(m, most=study.search) for m in methods]
    return suite.measure_layer(layer, methods=narrowed, seed=study.seed, budget_s=study.budget_s)


def _key(layer: Layer) -> tuple[str, str, int, str]:
    return layer.network, layer.name, layer.problem.batch, layer.problem.precision


def _raced(study: Study, layer: Layer) -> list[Row]:
    """All methods on a layer, measured once per study."""
    key = _key(layer)
    if key not in study.raced:
        study.raced[key] = _race(study, layer, study.compared)
    return study.raced[key]


def _best_rows(rows: Iterable[Row]) -> list[Row]:
    """Each method's fastest."""
    best: dict[str, Row] = {}
    for row in rows:
        best[row.method] = min(row, best.get(row.method, row), key=lambda row: row.time_us)
    return list(best.values())


def _best_config(study: Study, layer: Layer, name: str) -> Any:
    """The fastest configuration of a method on a layer."""
    method = by_name(name, study.device)
    rows = study.raced.get(_key(layer)) or _race(study, layer, [method])
    return _config(method, next(row for row in _best_rows(rows) if row.method == name))


def _config(method: Method, row: Row) -> Any:
    """The configuration of a row, which may say more besides."""
    return method.config_type(
        **{f.name: row.config[f.name] for f in fields(method.config_type) if f.name in row.config}
    )
