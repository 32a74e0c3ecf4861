"""python -m benchmarks check: a random sample of committed results, measured again on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import checks, suite
from benchmarks.checks import Bench, Difference, Drawn, Limits, NotHereError
from benchmarks.commands.options import PROGRAM, SecondsOption, SeedOption
from benchmarks.result_files import Result
from escort import report
from escort.artifact.files import replace_file
from escort.cli.console import Output, command_line, note
from escort.cli.options import VerboseOption, check_writable, command

_CLOCKS = {
    "gpu": "times by the GPU's clock",
    "ratio": "ratios to ours of the same run",
    "wall": "wall times and calls without a rival, not judged",
}


@dataclass(frozen=True)
class CheckOptions:
    """What is measured again, and what differences are allowed."""

    folder: Annotated[Path, typer.Argument(metavar="RESULTS", help="A folder of results.")]
    sample: Annotated[int, typer.Option(min=1, help="How many numbers are drawn at random.")] = 50
    only: Annotated[str, typer.Option(metavar="GLOB,...", help="Only of files named like these.")] = "*"
    seed: SeedOption = 0
    seconds: SecondsOption = None
    patterns: Annotated[Path, typer.Option(help="Folder of the files of sparsity patterns.")] = Path(
        "shared/data/patterns"
    )
    device: Annotated[str, typer.Option(help="The GPU for files of GPUs.")] = "cuda:0"
    median: Annotated[float, typer.Option(help="Most percent that differences may be in the median.")] = 3.0
    most: Annotated[float, typer.Option(help="Most percent that any may be.")] = 10.0
    output_path: Annotated[
        Path | None, typer.Option("--output", "-o", help="What was found, as JSON; out/check/RESULTS.json by default.")
    ] = None
    again: Annotated[bool, typer.Option("--again", help="Measure anew what that file holds already.")] = False
    verbose: VerboseOption = 0

    @property
    def path(self) -> Path:
        return self.output_path or Path("out/check") / f"{self.folder.resolve().name}.json"

    @property
    def limits(self) -> Limits:
        return Limits(self.median / 100, self.most / 100)

    @property
    def drawn_by(self) -> dict[str, Any]:
        """What a sample depends on, besides the files."""
        return {"results": self.folder.resolve().name, "sample": self.sample, "only": self.only, "seed": self.seed}

    def results(self) -> dict[str, Result]:
        """The folder's files, with those of folders in it. Raises ValueError where there are none."""
        found = {}
        for path in sorted(self.folder.rglob("*.json")):
            name = str(path.relative_to(self.folder).with_suffix(""))
            if any(fnmatch(name, glob) for glob in self.only.split(",")):
                try:
                    found[name] = Result.read(path)
                except ValueError as error:
                    note(f"{name} is left out: {error}")
        if not found:
            raise ValueError(f"{self.folder} holds no results that are named like {self.only}")
        return found


@dataclass
class Found:
    """What was found so far, by subject."""

    differences: list[Difference] = field(default_factory=list)
    not_here: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def has(self, drawn: Drawn) -> bool:
        label = drawn.subject.label
        return label in self.not_here or any(difference.subject == label for difference in self.differences)


@command
def main(options: CheckOptions, output: Output) -> None:
    """Measure a random sample of committed results again, each by the code that made it, and compare.

    Times by a GPU's clock are compared as they are. What the host's clock took is compared as the ratio of a rival to
    ours, within one run. What was found is written after each measurement; the same command goes on where it was cut
    off. It fails where differences exceed the limits, or something fails.
    """
    if options.output_path is not None:
        check_writable(options.output_path)
    sample = checks.draw(checks.subjects_of(options.results()), options.sample, options.seed)
    found = Found() if options.again else _before(options)
    for drawn in _measured(sample, found, options):
        note(f"{drawn.subject.label}: measured")
        options.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_as_json(sample, found, options), indent=1) + "\n"
        replace_file(options.path, partial(Path.write_text, data=text, encoding="utf-8"))
    output.text.print(report.terminal(_table(found.differences)))
    for verdict in checks.verdicts(found.differences, options.limits):
        judged = {None: "", True: ": within the limits", False: ": BEYOND THE LIMITS"}[verdict.is_within]
        line = (
            f"{verdict.count} {_CLOCKS[verdict.clock]}: median {verdict.median:.1%}, worst {verdict.most:.1%}{judged}"
        )
        output.text.print(line)
        output.failed |= verdict.is_within is False
    for what, label in ((found.not_here, "not measured here"), (found.failed, "failed")):
        for subject, why in what.items():
            note(f"{label}: {subject}: {why}")
    left = sum(len(drawn.keys) for drawn in sample if not found.has(drawn) and drawn.subject.label not in found.failed)
    if left:
        note(f"{left} of the sample are left; the same command goes on")
    output.failed |= bool(found.failed)
    output.result = _as_json(sample, found, options) | {"left": left, "output": str(options.path)}


def _measured(sample: Sequence[Drawn], found: Found, options: CheckOptions) -> Any:
    """Measures what was not found yet, and yields each that was."""
    bench = Bench(options.device, options.patterns)
    last = None if options.seconds is None else time.perf_counter() + options.seconds
    for drawn in sample:
        if found.has(drawn) or (last is not None and time.perf_counter() > last):
            continue
        label = drawn.subject.label
        try:
            found.differences += checks.differences_of(drawn, checks.measure_again(drawn.subject, drawn.keys, bench))
        except NotHereError as reason:
            found.not_here[label] = str(reason)
        except Exception as error:  # whatever it is: the rest of the sample may do well
            found.failed[label] = f"{type(error).__name__}: {error}"
        yield drawn


def _before(options: CheckOptions) -> Found:
    """What an earlier run of the same sample found. Raises ValueError where the file is of another."""
    if not options.path.is_file():
        return Found()
    data = json.loads(options.path.read_text(encoding="utf-8"))
    if data.get("drawn_by") != options.drawn_by:
        raise ValueError(
            f"{options.path} is of another sample ({data.get('drawn_by')}); take --again or another --output"
        )
    differences = [Difference(**{n: v for n, v in each.items() if n != "change"}) for each in data["differences"]]
    return Found(differences, data["not_here"])


def _as_json(sample: Sequence[Drawn], found: Found, options: CheckOptions) -> dict[str, Any]:
    device = "cpu" if all(drawn.subject.header.get("device") == "cpu" for drawn in sample) else options.device
    try:
        head = suite.header(command_line(PROGRAM), device)
    except (RuntimeError, AssertionError):  # there is no such GPU
        head = suite.header(command_line(PROGRAM))
    return {
        "header": head,
        "drawn_by": options.drawn_by,
        "limits": asdict(options.limits),
        "verdicts": [asdict(verdict) for verdict in checks.verdicts(found.differences, options.limits)],
        "differences": [asdict(each) | {"change": round(each.change, 4)} for each in found.differences],
        "not_here": found.not_here,
        "failed": found.failed,
    }


def _table(differences: Sequence[Difference]) -> report.Table:
    lines = [
        (each.subject, each.what, f"{each.committed:,.4g}", f"{each.again:,.4g}", f"{each.change:+.1%}")
        for each in sorted(differences, key=lambda each: -abs(each.change))
    ]
    columns = ("Of", "What", "Committed", "Again", "Change")
    caption = "Microseconds of the GPU's clock, or how many times as long as ours a rival takes in the same run."
    return report.Table("What was measured again", columns, tuple(lines), caption)
