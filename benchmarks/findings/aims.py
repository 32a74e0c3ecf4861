"""What the methods are to reach. The numbers are data: :data:`AIMS_FILE`, beside the results that they judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.suite import Row

AIMS_FILE = Path(__file__).parents[1] / "results" / "aims.json"


@dataclass(frozen=True)
class Aim:
    """A least ratio of total times, ``rival / direct``, over the layers of a network at the paper's batch.

    Attributes:
        against: the rival, for readers.
        least: by network.
        config: what the rival's configurations that count have in common; by default the fastest of all counts.
        least_sparsity: only layers with at least this share of zeros count.
        paper: the speedup that the paper reports over all networks, None where it does not compare.
    """

    against: str
    rival: str
    precision: str
    least: Mapping[str, float]
    config: Mapping[str, Any] = field(default_factory=dict)
    least_sparsity: float = 0.0
    paper: float | None = None

    def counts(self, row: Row) -> bool:
        """Whether the row counts."""
        return row.method != self.rival or self.config.items() <= row.config.items()


@dataclass(frozen=True)
class Wanted:
    """The geometric mean of ``cudnn / fastest sparse method`` over some layers: what it must be, and what it should."""

    floor: float
    goal: float


@dataclass(frozen=True)
class SparseAim:
    """What the faster of our sparse methods is to gain over cuDNN at the same precision.

    Attributes:
        against: cuDNN and its precision, for readers.
        wanted: by network, over its layers at the paper's batch; "all" for the layers of all networks.
        sparsities: only layers with shares of zeros from the first to the second count.
    """

    against: str
    precision: str
    wanted: Mapping[str, Wanted]
    sparsities: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SparseAim:
        sparsities = data.get("sparsities", (0.0, 1.0))
        return cls(**{**data, "wanted": _wanted(data), "sparsities": tuple(sparsities)})


@dataclass(frozen=True)
class PatternAim:
    """As :class:`SparseAim`, on layers that were really pruned.

    Attributes:
        weights: the stem of the pattern file.
        kind: which layers, for readers.
        layers: globs of their names.
        count: how many there are.
        batch: samples.
        wanted: by precision.
    """

    weights: str
    kind: str
    layers: tuple[str, ...]
    count: int
    batch: int
    wanted: Mapping[str, Wanted]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PatternAim:
        return cls(**{**data, "wanted": _wanted(data), "layers": tuple(data["layers"])})

    def counts(self, row: Row) -> bool:
        """Whether the row counts."""
        named = any(fnmatch(row.layer, pattern) for pattern in self.layers)
        return named and (row.weights, row.batch) == (self.weights, self.batch)


@dataclass(frozen=True)
class ConversionAim:
    """How long converting a network on a GPU may take.

    Attributes:
        networks, precision, effort: which conversions.
        batches: samples; empty for any.
        seconds: at most, by state of the caches; "load" for loading what was converted, with the first call.
    """

    networks: tuple[str, ...]
    precision: str
    effort: str
    seconds: Mapping[str, float]
    batches: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConversionAim:
        return cls(**{**data, "networks": tuple(data["networks"]), "batches": tuple(data.get("batches", ()))})

    def is_about(self, network: str, precision: str, effort: str, batch: int) -> bool:
        """Whether a conversion is one of those."""
        same = network in self.networks and (precision, effort) == (self.precision, self.effort)
        return same and (not self.batches or batch in self.batches)


@dataclass(frozen=True)
class CallAim:
    """How long a call of a converted network may take.

    Attributes:
        times, plus_us: where it is waited for: so many times the time of its graph, and so much more.
        host_us_per_layer: of the host's time, where it replays no graph.
    """

    times: float
    plus_us: float
    host_us_per_layer: float

    def most_us(self, graph_us: float) -> float:
        return self.times * graph_us + self.plus_us


@dataclass(frozen=True)
class InferenceAim:
    """What whole networks of the paper are to gain over the same networks with their pruned layers by a rival.

    Attributes:
        least: by rival, what the paper reports for it.
        share_of_cap: at least, of the gain that there would be if the pruned layers took no time.
    """

    least: Mapping[str, float]
    share_of_cap: float


@dataclass(frozen=True)
class SpeedAim:
    """What whole networks are to gain over torch.compile of the dense model in a CUDA graph.

    Attributes:
        weights: ``random-0.90`` and the like, or the stem of a pattern file.
        wanted: by precision.
    """

    networks: tuple[str, ...]
    weights: str
    batches: tuple[int, ...]
    wanted: Mapping[str, Wanted]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SpeedAim:
        lists = {name: tuple(data[name]) for name in ("networks", "batches")}
        return cls(**{**data, **lists, "wanted": _wanted(data)})


def _wanted(data: dict[str, Any]) -> dict[str, Wanted]:
    return {name: Wanted(**ratios) for name, ratios in data["wanted"].items()}


@dataclass(frozen=True)
class Aims:
    """All aims, each kind in the order in which it is shown.

    Attributes:
        speed: of whole networks against torch.compile.
        slower: how many times as long as the fastest dense network a converted one may take.
        choices: how many times as long as what an exhaustive search chooses that of the effort "fast" may take, in the
            geometric mean over networks.
    """

    direct: tuple[Aim, ...]
    sparse: tuple[SparseAim, ...]
    patterns: tuple[PatternAim, ...]
    conversions: tuple[ConversionAim, ...]
    inference: InferenceAim
    speed: tuple[SpeedAim, ...]
    slower: float
    choices: float
    calls: CallAim


@cache
def read_aims(path: Path = AIMS_FILE) -> Aims:
    """The aims in a file. Raises ValueError, naming the file, where they are none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Aims(
            direct=tuple(Aim(**aim) for aim in data["direct"]),
            sparse=tuple(map(SparseAim.from_json, data["sparse"])),
            patterns=tuple(map(PatternAim.from_json, data["patterns"])),
            conversions=tuple(map(ConversionAim.from_json, data["conversions"])),
            inference=InferenceAim(**data["inference"]),
            speed=tuple(map(SpeedAim.from_json, data["speed"])),
            slower=float(data["slower"]),
            choices=float(data["choices"]),
            calls=CallAim(**data["calls"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no aims: {error}") from error
