"""All that is measured of a device, file by file: what ``python -m benchmarks all`` runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import suite
from benchmarks.ahead import Ahead
from benchmarks.commands.conversions import ConversionOptions
from benchmarks.commands.options import RunOptions
from benchmarks.commands.speed import SpeedOptions
from benchmarks.networks import NETWORKS
from benchmarks.result_files import Item, Result
from benchmarks.study import COUNTERS, QUESTIONS, Study, plan
from benchmarks.study import Part as Question
from benchmarks.suite import NetworkRace, Row, Subject
from escort.cli.options import PrecisionName
from escort.network.check import Effort
from escort.problem import Precision

#: How whole networks are converted for the paper's questions: strict float32 gains by kernels made for the weights.
EFFORTS: dict[Precision, Effort] = {"fp16": "fast", "tf32": "fast", "fp32": 25.0}
#: Seconds that an item of a file of these stems takes, roughly, where no file tells.
SECONDS = {
    **{"layers": 2.5, "patterns": 1.5, "break-even": 2.0, "ablation": 4.0, "counters": 15.0, "breakdown": 3.0},
    **{"networks": 40.0, "inference": 90.0, "speed": 60.0, "speed-fp32": 90.0, "conversions": 60.0},
}
_PATTERNS = ("resnet50_magnitude_90", "resnet50_magnitude_95")


@dataclass(frozen=True)
class Part:
    """Files that are measured under one header.

    Attributes:
        work: items by the stem of their file.
        head: what the header says besides the machine.
        study: the paper's study that the work is of, if it is.
    """

    work: dict[str, list[Item]]
    head: dict[str, Any]
    study: Study | None = None


@dataclass(frozen=True)
class OnCpu:
    """A network that is raced against other engines on a CPU, each alone.

    Attributes:
        network: a name, or that of a file of :data:`NETWORK_FILES` in the folder beside that of patterns.
        input_size: (C, H, W), where the name does not tell it.
    """

    network: str
    batches: tuple[int, ...]
    sparsity: float | None = None
    patterns: str | None = None
    dense_depthwise: bool = False
    input_size: tuple[int, ...] | None = None

    @property
    def weights(self) -> str:
        """What is pruned, for labels."""
        return self.patterns or ("as-given" if self.sparsity is None else f"random-{self.sparsity:.2f}")

    def files(self, patterns: Path) -> dict[str, Path]:
        """Files of the network that are there, by ending."""
        paths = {ending: patterns.parent / "networks" / f"{self.network}.{ending}" for ending in NETWORK_FILES}
        return {ending: path for ending, path in paths.items() if path.is_file()}

    def is_there(self, patterns: Path) -> bool:
        """Whether the files that it takes are there."""
        if self.patterns is not None:
            return (patterns / f"{self.patterns}.npz").is_file()
        return self.input_size is None or "pt2" in self.files(patterns)


#: A network out of a file: for us and torch, for ONNX Runtime and OpenVINO, and for LiteRT.
NETWORK_FILES = ("pt2", "onnx", "tflite")


CPU_NETWORKS = (
    OnCpu("resnet50", (1, 8), 0.90),
    OnCpu("resnet50", (1, 8), 0.95),
    OnCpu("resnet50", (1, 8), patterns="resnet50_magnitude_95"),
    OnCpu("mobilenet_v2", (1,), 0.90, dense_depthwise=True),
    OnCpu("efficientnet_b0", (1,), 0.90, dense_depthwise=True),
    OnCpu("yolo", (1,), 0.90, dense_depthwise=True),
    OnCpu("pose_detection", (1,), input_size=(3, 224, 224)),
)


def parts(device: str, patterns: Path, *, seed: int = 0, ncu: bool = False, ahead: Ahead | None = None) -> list[Part]:
    """What there is to measure on a device, what documents quote most first.

    Args:
        patterns: the folder of files of real patterns; what needs one that is not there is left out.
        ncu: read hardware counters too.
        ahead: compiles meanwhile what torch.compile makes of networks.
    """
    found = tuple(path for name in _PATTERNS if (path := patterns / f"{name}.npz").is_file())
    return list(
        _on_cpu(patterns, seed) if device == "cpu" else _on_gpu(device, found, patterns, seed, ncu, ahead or Ahead())
    )


def with_seconds(part: Part, known: Mapping[str, Result]) -> Part:
    """A part whose items know how long they took, or the others of their file, or those of :data:`SECONDS`.

    Args:
        known: result files by stem, of which headers say how long items took.
    """

    def told(stem: str, item: Item) -> Item:
        taken = known[stem].header.get("seconds", {}) if stem in known else {}
        mean = fmean(taken.values()) if taken else SECONDS.get(stem, SECONDS[stem.rpartition("-")[0]])
        return replace(item, seconds=taken.get(item.label, mean))

    return replace(part, work={stem: [told(stem, item) for item in items] for stem, items in part.work.items()})


def _on_gpu(device: str, files: Sequence[Path], folder: Path, seed: int, ncu: bool, ahead: Ahead) -> Iterator[Part]:
    study = Study(device=device, search=6, budget_s=0.1, seed=seed, factories=NETWORKS, ahead=ahead)
    yield _paper(study, QUESTIONS["rq3"])
    for precision, effort in EFFORTS.items():
        speed = SpeedOptions(patterns=folder, device=device, seed=seed, effort=str(effort))
        keys = [key for key in speed.chosen(precision) if speed.has_file(key[1])]
        work = {f"speed-{precision}": [speed.item(key, precision, device, ahead) for key in keys]}
        yield Part(work, {"study": {"device": device, "seed": seed}, "effort": effort})
    if files:
        pruned = replace(study, patterns=tuple(files), layers="module*,conv2d_[!0]*", search=3)
        yield _merged([_paper(replace(pruned, batch=batch), QUESTIONS["patterns"]) for batch in (32, 128)])
    for precision, effort in EFFORTS.items():
        about = [
            question for question in (*QUESTIONS["rq4"], *QUESTIONS["inference"]) if _is_about(question, precision)
        ]
        yield _paper(replace(study, effort=effort), about, (precision,))
    yield _paper(study, [*QUESTIONS["rq2"], *([COUNTERS] if ncu else []), *QUESTIONS["breakdown"]])
    yield _conversions(device, PrecisionName.FP16, "1,32", seed)


def _is_about(question: Question, precision: Precision) -> bool:
    return precision in question.precisions or (question.stem, precision) == ("networks", "tf32")


def _on_cpu(patterns: Path, seed: int) -> Iterator[Part]:
    study = Study(device="cpu", batch=8, search=16, budget_s=2.0, seed=seed, factories=NETWORKS)
    networks = [
        Item(f"{one.network} {one.weights} N={batch}", partial(_race, one, batch, patterns, seed))
        for one in CPU_NETWORKS
        for batch in one.batches
        if one.is_there(patterns)
    ]
    yield Part({"networks-fp32": networks}, {"study": {"device": "cpu", "seed": seed}, "effort": "best"})
    yield _paper(study, QUESTIONS["rq1"])
    yield _conversions("cpu", PrecisionName.FP32, "1", seed)


def _paper(study: Study, questions: Sequence[Question], precisions: Sequence[Precision] | None = None) -> Part:
    return Part(plan(study, questions, precisions), {"study": study.conditions()}, study)


def _merged(several: Sequence[Part]) -> Part:
    """Parts of the same files, under the header of the first."""
    stems = dict.fromkeys(stem for part in several for stem in part.work)
    return replace(several[0], work={stem: [item for part in several for item in part.work[stem]] for stem in stems})


def _conversions(device: str, precision: PrecisionName, batch: str, seed: int) -> Part:
    run = RunOptions(batch=batch, device=device, precision=precision, seed=seed)
    items = ConversionOptions(load=True, calls=True, choices=False, limit_s=300.0).work(run, device)
    return Part({f"conversions-{precision.value}": items}, {"study": {"device": device, "seed": seed}})


def _race(one: OnCpu, batch: int, patterns: Path, seed: int) -> list[Row]:
    torch.manual_seed(seed)
    files = one.files(patterns)
    subject = Subject.load(
        str(files.pop("pt2", one.network)),
        sparsity=one.sparsity,
        patterns=None if one.patterns is None else patterns / f"{one.patterns}.npz",
        dense_depthwise=one.dense_depthwise,
        input_size=one.input_size,
    )
    packages = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
    if "tflite" in files:
        packages["litert"] = "ai_edge_litert"
    engines = [name for name, package in packages.items() if find_spec(package) is not None]
    x = torch.randn(batch, *subject.input_size)
    race = NetworkRace(engines, rounds=3, files=files)
    return suite.measure_network(subject.model, x, network=subject.name, weights=subject.weights, race=race)
