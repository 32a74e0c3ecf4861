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
from benchmarks.findings.aims import read_aims
from benchmarks.networks import NETWORKS
from benchmarks.result_files import Item, Result
from benchmarks.study import COUNTERS, QUESTIONS, Study, plan
from benchmarks.study import Part as Question
from benchmarks.suite import NetworkRace, Row, Subject
from escort.cli.options import PrecisionName
from escort.network.check import Effort
from escort.problem import MemoryFormat, Precision

#: How whole networks are converted: strict float32 gains by kernels made for the weights.
EFFORTS: dict[Precision, Effort] = {"tf32": "fast", "fp16": "fast", "fp32": 25}
#: The memory format in which dense networks are fastest. Compiling them for the other one takes minutes of a core.
FORMATS: dict[Precision, MemoryFormat] = {"tf32": "channels_last", "fp16": "channels_last", "fp32": "contiguous"}
#: Seconds that an item of a file of these stems takes, roughly, where no file tells.
SECONDS = {
    **{"layers": 1.5, "patterns": 1.0, "break-even": 1.0, "ablation": 3.0, "counters": 15.0, "breakdown": 2.5},
    **{"networks": 15.0, "networks-fp32": 50.0, "inference": 22.0, "inference-fp32": 75.0, "conversions": 42.0},
    "conversions-fp32": 150.0,
    **{"speed": 15.0, "speed-fp32": 50.0},
}
_PATTERNS = ("resnet50_magnitude_90", "resnet50_magnitude_95")
#: Of whole networks the most telling first.
_NETWORKS = (
    "resnet50 vgg16_bn googlenet caffenet mobilenet_v2 efficientnet_b0 densenet121 resnext50_32x4d yolo unet".split()
)
#: Shares of zeros of whole networks and of layers between which a break-even is interpolated.
_SPARSITIES = (0.90, 0.80, 0.70, 0.95)


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

    def missing(self, known: Mapping[str, Result]) -> list[Item]:
        """The items that result files, by stem, do not hold yet."""
        finished = {stem: known[stem].header.get("finished", ()) if stem in known else () for stem in self.work}
        return [item for stem, items in self.work.items() for item in items if item.label not in finished[stem]]


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
    study = Study(device=device, search=4, budget_s=0.1, seed=seed, factories=NETWORKS, ahead=ahead)
    for precision, effort in EFFORTS.items():
        speed = SpeedOptions(
            networks=_NETWORKS,
            batch="1,32,128,8",
            patterns=folder,
            device=device,
            seed=seed,
            effort=str(effort),
            formats=FORMATS[precision],
            budget_s=0.5,
        )
        keys = [key for key in speed.chosen(precision) if speed.has_file(key[1])]
        work = {f"speed-{precision}": [speed.item(key, precision, device, ahead) for key in keys]}
        yield Part(work, {"study": {"device": device, "seed": seed}, "effort": effort})
    yield from _conversions_on_gpu(device, files, seed)
    yield _paper(study, QUESTIONS["rq3"])
    for precision in QUESTIONS["patterns"][0].precisions if files else ():
        yield _on_patterns(replace(study, search=2), {path.stem: path for path in files}, precision)
    for precision, effort in EFFORTS.items():
        at = replace(study, effort=effort, formats=(FORMATS[precision],), sparsities=_SPARSITIES)
        for question in (*QUESTIONS["inference"], *QUESTIONS["rq4"]):
            if precision in question.precisions:
                yield _paper(at, [question], (precision,))
    yield _paper(study, [*QUESTIONS["rq2"], *([COUNTERS] if ncu else []), *QUESTIONS["breakdown"]])


def _on_patterns(study: Study, files: Mapping[str, Path], precision: Precision) -> Part:
    """The layers of the aims, by methods that compile nothing for the weights but in strict float32."""
    if precision != "fp32":
        study = replace(study, methods=tuple(m.name for m in study.compared if not m.compiles_per_filter))
    several = [
        _paper(
            replace(study, patterns=(files[aim.weights],), layers=",".join(aim.layers), batch=aim.batch),
            QUESTIONS["patterns"],
            (precision,),
        )
        for aim in read_aims().patterns
        if precision in aim.wanted and aim.weights in files
    ]
    return _merged(several)


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
    of_cpu = ConversionOptions(load=True, calls=True, choices=False, limit_s=300.0)
    yield _conversions(of_cpu, RunOptions("1", "cpu", seed=seed))


def _paper(study: Study, questions: Sequence[Question], precisions: Sequence[Precision] | None = None) -> Part:
    return Part(plan(study, questions, precisions), {"study": study.conditions()}, study)


def _merged(several: Sequence[Part]) -> Part:
    """Parts of the same files, under the header of the first; each item once."""
    work: dict[str, dict[str, Item]] = {}
    for part in several:
        for stem, items in part.work.items():
            work.setdefault(stem, {}).update({item.label: item for item in items})
    return replace(several[0], work={stem: list(items.values()) for stem, items in work.items()})


def _conversions_on_gpu(device: str, files: Sequence[Path], seed: int) -> Iterator[Part]:
    """Conversions of the aims, calls of what they make, and what little search chooses."""
    real = ConversionOptions(
        ["resnet50"], patterns=files[0] if files else None, load=True, choices=False, limit_s=120.0
    )
    random = replace(real, networks=["densenet121", "efficientnet_b0"], patterns=None)
    raced = replace(real, conversions=False, choices=True, search_s=12.0)
    raced_random = replace(raced, networks=["vgg16_bn", "mobilenet_v2"], patterns=None)
    strict = replace(real, effort="best", load=False, limit_s=180.0)
    by_precision = {
        PrecisionName.FP16: [
            (replace(real, calls=True), "1"),
            *((options, "32") for options in (real, random, raced, raced_random)),
        ],
        PrecisionName.TF32: [(replace(raced_random, networks=["resnet18"]), "1")],
        PrecisionName.FP32: [(strict, "32")],
    }
    for precision, several in by_precision.items():
        made = [_conversions(each, RunOptions(batch, device, precision, seed=seed)) for each, batch in several]
        yield _merged(made)


def _conversions(options: ConversionOptions, run: RunOptions) -> Part:
    items = options.work(run, run.device)
    return Part({f"conversions-{run.precision.value}": items}, {"study": {"device": run.device, "seed": run.seed}})


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
