"""escort plan: what was chosen per layer, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import escort
from escort import artifact, report
from escort.cli import models
from escort.cli.console import (
    CheckpointOption,
    CompileBudgetOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    InputOption,
    JsonOption,
    check_saved,
    command,
    examples,
    place,
)
from escort.network.convert import COMPILE_BUDGET_S
from escort.network.model import NetworkPlan
from escort.planner.planner import Candidate


def main(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A saved model, package.module:factory, or a torch.export archive.")
    ],
    shapes: InputOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.FP32,
    compile_budget: CompileBudgetOption = COMPILE_BUDGET_S,
    candidates: Annotated[bool, typer.Option("--candidates", help="Every candidate of every layer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what runs each layer, how long each candidate took, and why a method was refused.

    Of a saved model the stored plan is shown, nothing runs; any other model is planned for --input first.
    """
    with command(as_json) as output:
        if _is_saved(model):
            chosen = device, dtype, compile_budget
            if shapes or checkpoint is not None or chosen != ("cpu", Dtype.FP32, COMPILE_BUDGET_S):
                options = "--input, --checkpoint, --device, --dtype and --compile-budget"
                raise ValueError(f"{model} is saved with its plan and weights; leave out {options}")
            check_saved(Path(model))
            plan = artifact.load_plan(Path(model))
        else:
            network, inputs = place(models.load(model, checkpoint), examples(shapes), device, dtype)
            plan = escort.convert(
                network, inputs, precision=dtype.value, compile_budget_s=compile_budget, progress=True
            ).plan
        output.result = plan.to_json()
        output.text.print(report.plan_table(plan))
        if candidates:
            output.text.print(report.terminal(_candidates(plan)))


def _is_saved(model: str) -> bool:
    """A path, of whatever suffix, that is not one of another kind of file."""
    return ":" not in model and Path(model).suffix not in (models.ARCHIVE_SUFFIX, *models.CHECKPOINT_SUFFIXES)


def _candidates(plan: NetworkPlan) -> report.Table:
    rows = []
    for name, layer in plan.layers.items():
        for candidate in layer.candidates:
            chosen = (candidate.method, candidate.config) == (layer.method, layer.config)
            time = "-" if candidate.time_us is None else f"{candidate.time_us:,.1f}"
            error = "-" if candidate.rel_error is None else f"{candidate.rel_error:.1e}"
            note = "chosen" if chosen else candidate.reason or ""
            kernel = _kernel(candidate)
            rows.append((name, candidate.method, _settings(candidate.config), time, error, kernel, note))
    columns = "Layer", "Method", "Config", "Time, µs", "Error", "Kernel", ""
    return report.Table("Candidates", columns, tuple(rows))


def _kernel(candidate: Candidate) -> str:
    """The size of what was compiled, how long that took, and what share of the filter it adds separately."""
    told = []
    if candidate.compile_s is not None and candidate.code_bytes is not None:
        told.append(f"{candidate.code_bytes / 1000:,.0f} kB in {candidate.compile_s:,.1f} s")
    if candidate.remainder_share is not None:
        told.append(f"{candidate.remainder_share:.1%} left over")
    return ", ".join(told) or "-"


def _settings(config: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (config or {}).items())
