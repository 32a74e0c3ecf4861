"""ONNX files of two exporters, of others, and the ONNX project's own tests, on what escort.from_onnx makes of them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import escort
from escort.integrations.onnx.operators import OPERATORS
from tests.integrations.onnx.document import DOCUMENT, NO_TESTS, operators_table
from tests.integrations.onnx.networks import EXPORTERS, NETWORKS, row
from tests.integrations.onnx.node_cases import Outcome, outcomes

#: Files of others that a checkout may have beside it.
FOLDER = Path("shared/data/networks")


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(("network", "size", "legacy", "dynamo"), NETWORKS, ids=[each[0] for each in NETWORKS])
def test_networks(network: str, size: int, legacy: int, dynamo: int, exporter: str) -> None:
    found = row(network, size, legacy if exporter == "legacy" else dynamo, exporter)
    assert max(found.errors) < 5e-6
    assert found.own_names == found.modules[0] > 0


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.onnx")), ids=lambda path: path.stem)
def test_files_of_others(path: Path) -> None:
    network = escort.from_onnx(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    shapes = {
        given.name: [size if isinstance(size, int) else 1 for size in given.shape] for given in session.get_inputs()
    }
    inputs = {name: np.random.default_rng(0).standard_normal(shape, np.float32) for name, shape in shapes.items()}
    with torch.no_grad():
        found = network(*map(torch.from_numpy, inputs.values()))
    for ours, theirs in zip(found if isinstance(found, tuple) else (found,), session.run(None, inputs), strict=True):
        assert np.abs(ours.numpy() - theirs).max() < 1e-5 * np.abs(theirs).max()


@cache
def node_outcomes() -> tuple[Outcome, ...]:
    return tuple(outcomes())


def test_no_operator_is_wrong() -> None:
    assert not [outcome for outcome in node_outcomes() if outcome.result == "wrong"]


def test_every_operator_is_right_somewhere() -> None:
    right = Counter(outcome.operator for outcome in node_outcomes() if outcome.result == "right")
    assert set(OPERATORS) - set(right) == NO_TESTS


def test_the_document_has_the_table() -> None:
    assert operators_table(node_outcomes()) in DOCUMENT.read_text()
