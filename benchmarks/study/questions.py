"""The questions by name, what each of them measures, and the run that measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import result_files, suite
from benchmarks.result_files import Item, Outcome
from benchmarks.study.ablation import ablate, count
from benchmarks.study.inference import race_inference
from benchmarks.study.layers import compare, compare_on_patterns, find_break_even
from benchmarks.study.networks import break_down, sweep_networks
from benchmarks.study.study import Study
from escort.problem import Precision


@dataclass(frozen=True)
class Part:
    """A question's rows of one kind.

    Attributes:
        stem: of their files.
        items: what measures them.
        precisions: in which precisions they are measured by default.
        raced: whether they start from the methods raced on the paper's layers, which `layers` files hold.
    """

    stem: str
    items: Callable[[Study, Precision], list[Item]]
    precisions: tuple[Precision, ...]
    raced: bool = True


QUESTIONS: dict[str, tuple[Part, ...]] = {
    "rq1": (Part("layers", compare, ("fp32",)),),
    "rq3": (Part("layers", compare, ("fp32", "fp16", "tf32", "bf16")),),
    "rq2": (Part("ablation", ablate, ("fp32", "fp16")),),
    "rq4": (
        Part("break-even", find_break_even, ("fp32", "fp16"), raced=False),
        Part("networks", sweep_networks, ("fp32", "fp16"), raced=False),
    ),
    "inference": (Part("inference", race_inference, ("fp32", "fp16"), raced=False),),
    "breakdown": (Part("breakdown", break_down, ("fp32",)),),
    "patterns": (Part("patterns", compare_on_patterns, ("fp32", "tf32", "fp16"), raced=False),),
}
#: Those that need nothing but a device.
PAPER_QUESTIONS = tuple(name for name in QUESTIONS if name != "patterns")
COUNTERS = Part("counters", count, ("fp32", "fp16"))


def plan(study: Study, parts: Iterable[Part], precisions: Sequence[Precision] | None = None) -> dict[str, list[Item]]:
    """What is to be measured: the items of each result file by its stem, in order.

    Args:
        precisions: precisions instead of each part's own; the CPU has fp32 only.

    Raises:
        ValueError: for a precision that the device does not have.
    """
    own: tuple[Precision, ...] | None = ("fp32",) if study.device_type == "cpu" else None
    if own and set(precisions or own) - set(own):
        raise ValueError(f"the CPU's methods compute in fp32, not in {', '.join(set(precisions or ()) - set(own))}")
    work: dict[str, list[Item]] = {}
    for part in parts:
        for precision in precisions or own or part.precisions:
            work.setdefault(f"{part.stem}-{precision}", part.items(study, precision))
    return work


def run(
    study: Study,
    work: Mapping[str, Sequence[Item]],
    folder: Path,
    command: str,
    *,
    again: bool = False,
    seconds: float | None = None,
    begin: Callable[[str, str], object] = lambda stem, label: None,
    end: Callable[[str, str, Outcome], object] = lambda stem, label, outcome: None,
) -> dict[str, str]:
    """Measures what a folder does not hold yet, and returns what failed, see :func:`benchmarks.result_files.measure`.

    Args:
        work: items by the stem of their file, as :func:`plan` makes them.
        command: for the headers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = suite.header(command, study.device) | {"study": study.conditions(), "effort": study.effort}
    apart = {part.stem for parts in QUESTIONS.values() for part in parts if not part.raced}
    needed = not again and any(stem.rpartition("-")[0] not in apart for stem in work)
    for path in folder.glob("layers-*.json") if needed else ():
        for row in result_files.known(path, head).rows:
            study.raced.setdefault((row.network, row.layer, row.batch, row.dtype), []).append(row)
    return result_files.measure(
        work, folder, head, again=again, seconds=seconds, ahead=study.ahead, begin=begin, end=end
    )
