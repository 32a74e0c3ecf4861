"""Whole files, byte by byte, as docs/format.md describes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from escort.artifact import ArtifactError, load, load_plan, save
from escort.planner.machine import Machine
from tests.artifact.forgery import sealed

# The keys of a plan that may be missing.
OPTIONAL = (
    b',\\"precision\\":\\"fp32\\",\\"device\\":\\"cpu\\",\\"input_dtypes\\":[\\"float32\\"],\\"timer\\":\\"calls\\"'
    b',\\"native_steps\\":2'
)
# A model that adds a parameter to its input.
TINY_HEADER = (
    b'{"__metadata__":{"sha256":"0000000000000000000000000000000000000000000000000000000000000000",'
    b'"format":"escort","version":"3","escort":"0",'
    b'"architecture":"{\\"layers\\":{},\\"programs\\":{\\"\\":{'
    b'\\"inputs\\":[{\\"name\\":\\"x\\",\\"shape\\":[2],\\"dtype\\":\\"float32\\"}],'
    b'\\"steps\\":[{\\"tensor\\":\\"shift\\"},'
    b'{\\"call\\":\\"operator.add\\",\\"args\\":[{\\"value\\":0},{\\"value\\":1}]}],'
    b'\\"output\\":{\\"value\\":2}}}}",'
    b'"plan":"{\\"layers\\":{},\\"skipped\\":{},\\"input_shapes\\":[[2]],\\"dense_time_us\\":2.0,'
    b'\\"converted_time_us\\":1.0,\\"rel_error\\":0.0,\\"kept_dense\\":false,'
    b'\\"machine\\":{\\"device\\":\\"cpu\\",\\"isa\\":\\"generic\\",\\"threads\\":1,'
    b'\\"torch\\":\\"2.13.0\\",\\"escort\\":\\"0\\"},\\"samples\\":null' + OPTIONAL + b'}",'
    b'"tensors":"{\\"compressed\\":{},\\"shared\\":{}}"},'
    b'"shift":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
)
TINY_DATA = b"\x00\x00\x80\x3f\x00\x00\x00\xc0"  # 1.0, -2.0


@pytest.fixture
def tiny_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine that the file put together by hand was planned on."""
    machine = Machine("cpu", "generic", 1, "2.13.0", "0")
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device="cpu": machine))
    return machine


@pytest.mark.usefixtures("tiny_machine")
def test_a_file_put_together_by_hand(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_bytes(sealed(TINY_HEADER, TINY_DATA))
    model = load(tmp_path / "tiny")
    assert model(torch.tensor([1.0, 1.0])).tolist() == [2.0, -1.0]
    save(model, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == sealed(TINY_HEADER, TINY_DATA)


def test_keys_that_may_be_missing(tmp_path: Path, tiny_machine: Machine) -> None:
    assert OPTIONAL in TINY_HEADER
    (tmp_path / "tiny").write_bytes(sealed(TINY_HEADER.replace(OPTIONAL, b""), TINY_DATA))
    plan = load(tmp_path / "tiny").plan
    assert plan.machine == tiny_machine
    assert (plan.precision, plan.device, plan.input_types, plan.timer) == ("fp32", "cpu", (torch.float32,), "calls")


@pytest.mark.parametrize("version", [b"1", b"2"])
def test_a_file_of_an_older_version_says_what_to_do(tmp_path: Path, version: bytes) -> None:
    header = TINY_HEADER.replace(b'"version":"3","escort":"0"', b'"version":"%s","escort":"0.1.0"' % version)
    (tmp_path / "old").write_bytes(sealed(header, TINY_DATA))
    remedy = "convert the model again, or load it with the version that wrote it$"
    for read in (load, load_plan):
        with pytest.raises(
            ArtifactError, match=f"old: its format is escort {version.decode()}, written by escort 0.1.0; .*; {remedy}"
        ):
            read(tmp_path / "old")


def test_nothing_is_pickled(saved: Path) -> None:
    tensors = safetensors.torch.load(saved.read_bytes())  # it is a plain safetensors file
    assert {"stem.0.weight.values", "stem.0.weight.row_lengths", "stem.0.weight.column_gaps"} <= tensors.keys()
    assert tensors["full.weight"].shape == (10, 12, 1, 1)  # more than half full
    assert "again.weight" not in tensors
