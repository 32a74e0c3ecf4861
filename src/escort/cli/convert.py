"""escort convert: measure every layer and save the fastest network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import escort
from escort import report
from escort.artifact import artifact
from escort.cli import models
from escort.cli.console import (
    CheckpointOption,
    CompileBudgetOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    InputOption,
    JsonOption,
    ModelArgument,
    check_writable,
    command,
    examples,
    place,
)
from escort.network.check import EFFORT_S
from escort.network.plan_table import plan_table


def main(
    model: ModelArgument,
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The converted model, for example model.escort.")],
    shapes: InputOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.FP32,
    compile_budget: CompileBudgetOption = EFFORT_S["best"],
    as_json: JsonOption = False,
) -> None:
    """Convert a pruned model: every convolution runs by whichever method measures fastest on this machine."""
    with command(as_json) as output:
        inputs = examples(shapes)
        check_writable(output_path)
        network, inputs = place(models.load(model, checkpoint), inputs, device, dtype)
        converted = escort.convert(network, inputs, precision=dtype.value, effort=compile_budget, progress=True)
        artifact.save(converted, output_path)
        plan = converted.plan
        output.result = {"output": str(output_path), "bytes": output_path.stat().st_size, **plan.to_json()}
        output.text.print(report.terminal(plan_table(plan)))
        output.text.print(f"wrote {output_path}, {output_path.stat().st_size / 1e6:.1f} MB")
