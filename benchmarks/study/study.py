"""What a study is about, and what its questions share: the layers, and the races that were run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from benchmarks import suite
from benchmarks.ahead import Ahead
from benchmarks.paper_layers import PAPER_BATCH, PAPER_LAYERS
from benchmarks.suite import Layer, Limited, Row
from escort.methods import Method, by_name, for_device
from escort.network.check import Effort
from escort.problem import MemoryFormat, Precision

#: Shares of zeros at which networks and shapes of layers are compared.
SPARSITIES = (0.70, 0.80, 0.85, 0.90, 0.95, 0.98)
#: Network, layer, batch and precision of a race.
Key = tuple[str, str, int, str]


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
        batch: samples; None for as many as the paper took for each network.
        layers: only layers that are named like this, globs with commas between them.
        sparsities: shares of zeros of networks and layers with random weights.
        search: most configurations of a method that are tried on a layer, best guesses first.
        budget_s: seconds of timing per race.
        effort: what compiling for whole networks may take, as of :func:`escort.convert`.
        formats: the memory formats in which whole networks are tried on a GPU.
        seed: of positions, weights and inputs.
        factories: whole networks by name.
        patterns: files of real patterns, see :func:`benchmarks.suite.pattern_layers`.
        methods: names of those that are compared, all where none are named.
        raced: what was raced on the paper's layers so far, from which other questions start.
        ahead: what compiles whole networks ahead.
    """

    device: str = "cpu"
    networks: tuple[str, ...] = tuple(PAPER_BATCH)
    batch: int | None = None
    layers: str = "*"
    sparsities: tuple[float, ...] = SPARSITIES
    search: int = 16
    budget_s: float = 0.5
    effort: Effort = "best"
    formats: Sequence[MemoryFormat] = suite.BOTH_FORMATS
    seed: int = 0
    factories: Mapping[str, Network] = field(default_factory=dict)
    patterns: tuple[Path, ...] = ()
    methods: tuple[str, ...] = ()
    raced: dict[Key, list[Row]] = field(default_factory=dict, repr=False)
    ahead: Ahead = field(default_factory=Ahead, repr=False, compare=False)

    def __post_init__(self) -> None:
        unknown = [name for name in self.networks if name not in PAPER_BATCH]
        if unknown or not self.networks:
            raise ValueError(f"there is no network {', '.join(unknown)}; there are {', '.join(PAPER_BATCH)}")
        known = [method.name for method in for_device(self.device)]
        if strangers := set(self.methods) - set(known):
            raise ValueError(f"there is no method {', '.join(sorted(strangers))}; there are {', '.join(known)}")
        if not all(0.0 < sparsity < 1.0 for sparsity in self.sparsities) or not self.sparsities:
            raise ValueError(f"sparsities are shares of zeros between 0 and 1, got {self.sparsities}")
        layers = [entry.layer for entry in PAPER_LAYERS if entry.network in self.networks]
        if not self.patterns and not any(map(self.has, layers)):
            raise ValueError(f"no layer is named like {self.layers}; there are {', '.join(layers)}")

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def compared(self) -> list[Method]:
        return [method for method in for_device(self.device) if not self.methods or method.name in self.methods]

    def has(self, layer: str) -> bool:
        """Whether layers of this name are studied."""
        return any(fnmatch(layer, pattern) for pattern in self.layers.split(","))

    def samples(self, network: str) -> int:
        """The batch size of a network."""
        return self.batch or PAPER_BATCH[network]

    def conditions(self) -> dict[str, Any]:
        """What two runs must share to go into one file, beside the machine."""
        named = {"methods": list(self.methods)} if self.methods else {}
        return {"device": self.device, "search": self.search, "seed": self.seed, **named}


def layers_of(study: Study, precision: Precision) -> list[Layer]:
    """The paper's layers that are studied, in its order."""
    layers = suite.paper_layers(study.batch, study.seed, precision=precision, device=study.device)
    return [layer for layer in layers if layer.network in study.networks and study.has(layer.name)]


def one_per_map(layers: Sequence[Layer]) -> list[Layer]:
    """The first layer of each network on each size of map."""
    first: dict[tuple[str, int, int], Layer] = {}
    for layer in layers:
        first.setdefault((layer.network, layer.problem.height, layer.problem.width), layer)
    return list(first.values())


def label(layer: Layer) -> str:
    """What tells a layer's item from the others."""
    return f"{layer.network} {layer.name} N={layer.problem.batch}"


def key(layer: Layer) -> Key:
    """Where a study keeps what it raced on the layer."""
    return layer.network, layer.name, layer.problem.batch, layer.problem.precision


def race(study: Study, layer: Layer, methods: Sequence[Method]) -> list[Row]:
    """The methods on a layer, each with as many configurations as the study tries."""
    limited = [m if isinstance(m, Limited) else Limited(m, most=study.search) for m in methods]
    return suite.measure_layer(layer, methods=limited, seed=study.seed, budget_s=study.budget_s)


def raced(study: Study, layer: Layer) -> list[Row]:
    """All methods on a layer, measured once per study."""
    if key(layer) not in study.raced:
        study.raced[key(layer)] = race(study, layer, study.compared)
    return study.raced[key(layer)]


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """Each method's fastest."""
    best: dict[str, Row] = {}
    for row in rows:
        best[row.method] = min(row, best.get(row.method, row), key=lambda row: row.time_us)
    return list(best.values())


def best_config(study: Study, layer: Layer, name: str) -> Any:
    """The fastest configuration of a method on a layer."""
    method = by_name(name, study.device)
    rows = study.raced.get(key(layer)) or race(study, layer, [method])
    return suite.config_of(method, next(row for row in best_rows(rows) if row.method == name))
