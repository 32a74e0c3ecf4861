"""escort plan: what was chosen per layer, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from escort import artifact, report
from escort.cli import models
from escort.cli.console import Output, check_is_file
from escort.cli.options import SAVED, ConvertOptions, command
from escort.network.plan import NetworkPlan, plan_table
from escort.planner.plan import Candidate


@command
def main(
    options: ConvertOptions,
    output: Output,
    candidates: Annotated[bool, typer.Option("--candidates", help="Every candidate of every layer.")] = False,
) -> None:
    """Show what runs each layer, how long each candidate took, and why a method was refused.

    MODEL may also be a saved model: its stored plan is shown, nothing runs. Any other model is planned for --input
    first.
    """
    plan = _stored_plan(options) if _is_saved(options.model) else options.convert().plan
    output.result = plan.to_json()
    output.text.print(report.terminal(plan_table(plan)))
    if candidates:
        output.text.print(report.terminal(_candidates(plan)))


def _stored_plan(options: ConvertOptions) -> NetworkPlan:
    if not options.are_default:
        names = "--input, --checkpoint, --device, --precision, --effort, --favor and --plan"
        raise ValueError(f"{options.model} is saved with its plan and weights; leave out {names}")
    check_is_file(Path(options.model), SAVED)
    return artifact.load_plan(Path(options.model))


def _is_saved(model: str) -> bool:
    """Whether it is a path, of any suffix but those of archives, ONNX files and checkpoints."""
    return ":" not in model and Path(model).suffix not in models.SUFFIXES


def _candidates(plan: NetworkPlan) -> report.Table:
    rows = []
    for name, layer in plan.layers.items():
        for candidate in layer.candidates:
            chosen = (candidate.method, candidate.config) == (layer.method, layer.config)
            time = "-" if candidate.time_us is None else f"{candidate.time_us:,.1f}"
            error = "-" if candidate.rel_error is None else f"{candidate.rel_error:.1e}"
            note = "chosen" if chosen else candidate.reason or ""
            config = _settings(candidate.config)
            rows.append((name, candidate.method, config, time, error, _kernel(candidate), note))
    columns = "Layer", "Method", "Config", "Time, µs", "Error", "Kernel", ""
    return report.Table("Candidates", columns, tuple(rows))


def _kernel(candidate: Candidate) -> str:
    """The size of what was compiled, how long that took, and what share of the filter it adds separately."""
    parts = []
    if candidate.compile_s is not None and candidate.code_bytes is not None:
        parts.append(f"{candidate.code_bytes / 1000:,.0f} kB in {candidate.compile_s:,.1f} s")
    if candidate.remainder_share is not None:
        parts.append(f"{candidate.remainder_share:.1%} left over")
    return ", ".join(parts) or "-"


def _settings(config: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (config or {}).items())
