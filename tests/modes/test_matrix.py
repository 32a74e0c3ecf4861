"""Every kind of model in every mode: the right values, or one clear error. Nothing between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
from torch import nn

from tests.modes import modes
from tests.modes.kinds import KINDS, Kind
from tests.modes.modes import MODES, Cell

_TRACES = {modes.graph_of_fx, modes.jit_trace, modes.export_by_name, modes.export_by_place}
_ONNX = {modes.onnx_of_torchscript, modes.onnx_of_torch_export}

#: Cells that cannot exist, as the original itself cannot be called so: what it is about a model, in which modes, why.
LEFT_OUT = (
    ("branching", {*_TRACES, *_ONNX, modes.fake_tensor, modes.vmap}, "a branch needs the numbers that decide it"),
    ("stateful", {*_TRACES, *_ONNX, modes.fake_tensor, modes.vmap}, "a state cannot hold what a trace runs on"),
    ("stateful", {modes.threads}, "threads would share one state"),
    ("none", {modes.jit_trace, modes.onnx_of_torchscript, modes.vmap}, "neither TorchScript nor vmap returns None"),
    ("named", {modes.jit_trace, modes.onnx_of_torchscript}, "TorchScript traces tensors alone"),
    ("training", {*_ONNX}, "a model is exported for inference"),
)


def can_be(kind: Kind, mode: Callable[[Cell], None]) -> bool:
    return not any(trait in kind.traits and mode in left_out for trait, left_out, _ in LEFT_OUT)


CELLS = [(kind, mode) for kind in KINDS for mode in MODES if can_be(kind, mode)]
NAMES = [f"{kind.name}, {mode.__name__}" for kind, mode in CELLS]


@pytest.mark.parametrize(("kind", "mode"), CELLS, ids=NAMES)
def test_cell(
    kind: Kind,
    mode: Callable[[Cell], None],
    converted: Callable[[Kind], nn.Module],
    another_process: ProcessPoolExecutor,
) -> None:
    mode(Cell(kind, copy.deepcopy(converted(kind)), another_process))
