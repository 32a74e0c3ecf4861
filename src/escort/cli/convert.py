"""escort convert: measure every layer and save the fastest network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    ModelArgument,
    check_writable,
    command,
    examples,
    place,
)
from escort.network.convert import COMPILE_BUDGET_S


def main(
    model: ModelArgument,
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The converted model, for example model.escort.")],
    shapes: InputOption = None,
    checkpoint: CheckpointOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.FP32,
    compile_budget: CompileBudgetOption = COMPILE_BUDGET_S,
    as_json: JsonOption = False,
) -> None:
    """Convert a pruned model: every convolution runs by whichever method measures fastest on this machine."""
    with command(as_json) as output:
        inputs = examples(shapes)
        check_writable(output_path)
        network, inputs = place(models.load(model, checkpoint), inputs, device, dtype)
        converted = escort.convert(
            network, inputs, precision=dtype.value, compile_budget_s=compile_budget, progress=True
        )
        artifact.save(converted, output_path)
        plan = converted.plan
        output.result = {"output": str(output_path), "bytes": output_path.stat().st_size, **plan.to_json()}
        output.text.print(report.plan_table(plan))
        output.text.print(f"wrote {output_path}, {output_path.stat().st_size / 1e6:.1f} MB")
