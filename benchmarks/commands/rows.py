"""What becomes of the rows that a command measured: a result file, JSON, and tables for the terminal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import suite
from benchmarks.commands.options import PROGRAM, RunOptions
from benchmarks.suite import Row
from escort import report
from escort.artifact.files import replace_file
from escort.cli.console import Output, command_line, note
from escort.cli.options import check_writable
from escort.network.wording import machine_line
from escort.planner.machine import Machine

#: Share of the cores that may be in use by others before a result is worth a warning.
_BUSY = 0.4


@dataclass(frozen=True)
class Results:
    """Rows to come, and where they go.

    Attributes:
        path: the result file; None for none.
        head: its header, made before anything is timed.
        ours: the method that is compared with all others.
        device, precision: of all rows.
    """

    path: Path | None
    head: dict[str, Any]
    ours: str
    device: str
    precision: str

    @classmethod
    def begin(cls, options: RunOptions, device: str, name: str, ours: str, *, kept: bool = True) -> Results:
        """Finds out where the rows go, and warns of a busy machine.

        Args:
            name: of the result file where --output names none.
            kept: whether there is a result file where --output names none.
        """
        path = options.output_path
        if path is not None:
            check_writable(path)
        elif kept:
            stem = name if options.precision.value == "fp32" else f"{name}-{options.precision.value}"
            path = results_folder(device) / f"{stem}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
        head = suite.header(command_line(PROGRAM), device)
        if device == "cpu" and head["load_average"] > _BUSY * (os.cpu_count() or 1):
            note(
                f"warning: other processes keep this machine busy (load average {head['load_average']}): ratios to "
                "dense methods come out far too high; measure on an idle machine"
            )
        return cls(path, head, ours, device, options.precision.value)

    def finish(self, output: Output, rows: list[Row]) -> None:
        """Writes and prints them."""
        if self.path is not None:
            replace_file(self.path, lambda path: suite.write_results(path, self.head, rows))
        means = suite.geometric_means(rows, self.ours)
        output.result = {
            "output": None if self.path is None else str(self.path),
            "header": self.head,
            "rows": [row.to_json() for row in rows],
            "geometric_means": means,
        }
        caption = f"{machine_line(Machine.here(self.device))}, {self.precision}, medians in microseconds."
        output.text.print(report.terminal(_times(rows, self.ours, caption)))
        output.text.print(report.terminal(_means(means, self.ours)))
        if self.path is not None:
            output.text.print(f"wrote {self.path}")


def results_folder(device: str) -> Path:
    """Results are kept by device: `cpu`, or the GPU's name as in `h200`."""
    name = "cpu"
    if device != "cpu":
        name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ").lower().replace(" ", "-")
    return Path("benchmarks/results") / name


def _times(rows: list[Row], ours: str, caption: str) -> report.Table:
    """One line per layer and batch: the best time of each method, and how many times faster ours is."""
    best = suite.best_times(rows)
    rivals = list(dict.fromkeys(row.method for row in rows if row.method != ours))
    methods = (ours, *rivals)
    columns = ("Network", "Layer", "Batch", *(f"{m}, µs" for m in methods), *(f"vs {rival}" for rival in rivals))
    lines = []
    for (network, layer, batch), times in best.items():
        cells = [f"{times[m]:,.0f}" if m in times else "-" for m in methods]
        ratios = [f"{times[m] / times[ours]:.2f}x" if m in times and ours in times else "-" for m in rivals]
        lines.append((network, layer, str(batch), *cells, *ratios))
    return report.Table("Best time of each method", columns, tuple(lines), caption)


def _means(means: dict[str, dict[str, float]], ours: str) -> report.Table:
    rivals = list(dict.fromkeys(rival for ratios in means.values() for rival in ratios))
    lines = [(name, *(f"{ratios[m]:.2f}x" if m in ratios else "-" for m in rivals)) for name, ratios in means.items()]
    columns = ("Network", *(f"vs {rival}" for rival in rivals))
    return report.Table(f"How many times faster {ours} is, geometric mean", columns, tuple(lines))
