"""escort prune: zero the smallest weights of a model's convolutions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from safetensors.torch import save

from escort import prune
from escort.artifact.files import replace_file
from escort.cli import models
from escort.cli.console import Output
from escort.cli.options import SourceOptions, check_writable, command


class Recipe(StrEnum):
    """How the zeros are spread over the layers."""

    UNIFORM = "uniform"
    GLOBAL = "global"


@command
def main(
    source: SourceOptions,
    sparsity: Annotated[float, typer.Option(help="Share of the weights to zero, for example 0.9.")],
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The pruned state dict, .safetensors.")],
    output: Output,
    method: Annotated[
        Recipe, typer.Option(help="uniform: each layer to that sparsity; global: all layers together.")
    ] = Recipe.UNIFORM,
    skip: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A layer to leave dense; may repeat.")] = None,
) -> None:
    """Zero the smallest weights and save the state dict. Accuracy suffers: fine-tune with escort.prune in Python."""
    if output_path.suffix != ".safetensors":
        raise ValueError(f"--output {output_path}: the pruned weights are a .safetensors file; name it so")
    if source.model.endswith((models.ARCHIVE_SUFFIX, models.ONNX_SUFFIX)):
        raise ValueError(f"{source.model} has no state dict to go on with; prune the model before it is exported")
    check_writable(output_path, source.checkpoint)
    network = source.load()
    recipe = prune.uniform if method is Recipe.UNIFORM else prune.global_magnitude
    recipe(network, sparsity, skip=skip or ())
    prune.make_permanent(network)
    # Tied weights share memory, which safetensors refuses; each name gets its own copy.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    replace_file(output_path, lambda path: path.write_bytes(save(state)))

    shares = prune.sparsity(network)
    output.result = {"output": str(output_path), "method": method.value, "sparsity": shares}
    table = Table("layer", "sparsity", title=f"{method.value} magnitude pruning")
    for name, share in shares.items():
        table.add_row(name, f"{share:.1%}", end_section=True)
    output.text.print(table)
    output.text.print(f"wrote {output_path}")
