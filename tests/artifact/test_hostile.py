"""Files that are forged or damaged: none gets in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from escort.artifact import ArtifactError, load
from escort.network.convert import ConvertedModel
from tests.artifact.forgery import Forgery, asking, filling, in_precision, on_gpu, problems, removing, setting
from tests.artifact.networks import X, assert_same

ATTACKS: dict[str, tuple[Callable[[Forgery], Any], str]] = {
    "format": (setting("texts", "format", to="pt"), "its format is pt 3"),
    "newer version": (setting("texts", "version", to="4"), "this version reads escort 3"),
    "no plan": (lambda f: setattr(f, "plan", None), "not a network plan"),
    "no layers": (lambda f: f.architecture.pop("layers"), "'layers' is missing"),
    "no programs": (lambda f: f.architecture.pop("programs"), "'programs' is missing"),
    "infinite time": (setting("plan", "dense_time_us", to=float("nan")), "NaN is no JSON number"),
    "absurd example": (setting("plan", "input_shapes", to=[[2**40, 3]]), "no network takes inputs"),
    "negative example": (setting("plan", "input_shapes", to=[[-1, -(2**40)]]), "no network takes inputs"),
    "machine": (setting("plan", "machine", to={}), "not a machine"),
    "no plan for a layer": (lambda f: f.plan["layers"].pop("stem.0"), "layer stem.0: 'stem.0' is missing"),
    "unknown method": (setting("plan", "layers", "stem.0", "method", to="magic"), "no method 'magic'"),
    "more channels": (asking(16, "out_channels"), "layer stem.0: tensor stem.0.weight: should be float32 of shape"),
    "fewer channels": (asking(4, "out_channels"), "layer stem.0: tensor stem.0.weight: should be float32 of shape"),
    "more groups": (asking(3, "groups"), "must both be divisible by groups 3"),
    "no stride": (asking([0, 1], "stride"), "sizes are positive"),
    "absurd stride": (asking([1, 2**40], "stride"), "layer stem.0: no network asks for"),
    "absurd dilation": (asking([2**40, 1], "dilation"), "smaller than the kernel|no network asks for"),
    "absurd padding": (asking([2**20] * 4, "padding"), "layer stem.0: no network asks for"),
    "three paddings": (asking([1, 1, 1], "padding"), "layer stem.0: no network asks for"),
    "absurd batch": (asking(2**40, "batch"), "layer stem.0: no network asks for"),
    "absurd height": (asking(2**40, "height"), "layer stem.0: no network asks for"),
    "fractional width": (asking(32.5, "width"), "layer stem.0: no network asks for"),
    "another device": (asking("cuda:0", "device"), "not a plan|its layers are for"),
    "a layer on a GPU": (
        lambda f: f.plan["layers"]["stem.0"].update(on_gpu(f.plan["layers"]["stem.0"])),
        "its layers are for .*'cuda:0'",
    ),
    "a device of no kind": (asking("mps", "device"), "no method .* on mps"),
    "a number for a device": (asking(0, "device"), "not a plan"),
    "another precision of a layer": (asking("fp16", "precision"), "its layers are for .*'fp16'"),
    "another precision": (setting("plan", "precision", to="tf32"), "its layers are for"),
    "half precision on the CPU": (
        lambda f: (setting("plan", "precision", to="fp16")(f), [in_precision(p, "fp16") for p in problems(f)]),
        "layer stem.0: no network asks for",
    ),
    "unknown precision": (
        lambda f: (setting("plan", "precision", to="fp8")(f), [in_precision(p, "fp8") for p in problems(f)]),
        "precision is one of",
    ),
    "unknown network device": (setting("plan", "device", to="cuda"), "not a network plan: .* the whole for cuda in"),
    "code for a device": (setting("plan", "device", to="cuda:0\nimport os"), "not a network plan"),
    "unknown timer": (setting("plan", "timer", to="none"), "not a network plan: .* timed by none"),
    "unknown input type": (setting("plan", "input_dtypes", to=["load"]), "not a network plan: .*'load'"),
    "too many input types": (setting("plan", "input_dtypes", to=["float32"] * 2), "not a network plan"),
    "unknown memory format": (asking("nhwc", "memory_format"), "memory_format is one of"),
    "channels_last on the CPU": (asking("channels_last", "memory_format"), "channels_last is for GPUs"),
    "unknown activation": (asking("exp", "epilogue", "activation"), "activation is one of"),
    "bias of another type": (asking("yes", "epilogue", "bias"), "layer stem.0: no network asks for"),
    "no bias": (asking(False, "epilogue", "bias"), "nothing in the network uses its tensor stem.0.bias"),
    "missing bias": (removing("stem.0.bias"), "layer stem.0: tensor stem.0.bias is missing"),
    "missing values": (removing("stem.0.weight.values"), "tensor stem.0.weight.values is missing"),
    "missing weight": (removing("full.weight"), "layer full: tensor full.weight is missing"),
    "missing parameter": (removing("scale"), "tensor scale is missing"),
    "unknown tensor": (setting("tensors", "more", to=torch.ones(3)), "nothing in the network uses its tensor more"),
    "short bias": (
        setting("tensors", "stem.0.bias", to=torch.ones(3)),
        r"layer stem.0: the plan is for a bias of shape \(8,\), got \(3,\)",
    ),
    "integer bias": (setting("tensors", "stem.0.bias", to=torch.ones(8, dtype=torch.int32)), "its bias is torch.int32"),
    "double filter": (setting("tensors", "full.weight", to=torch.ones(10, 12, 1, 1).double()), "should be float32"),
    "integer layer": (setting("tensors", "again.bias", to=torch.ones(10).int()), "layer again: bias is of shape"),
    "another layer shape": (setting("tensors", "fc.weight", to=torch.ones(10, 9)), "layer fc: weight is of shape"),
    "columns out of range": (filling("stem.0.weight.column_gaps", 200), "stem.0.weight: columns must lie in 0..74"),
    "rows too long": (filling("stem.0.weight.row_lengths", 99), "stem.0.weight: 8 row lengths must sum up"),
    "wrapping rows": (
        setting("tensors", "stem.0.weight.row_lengths", to=torch.full((8,), 2**32 - 1, dtype=torch.uint32)),
        "stem.0.weight: 8 row lengths must sum up",
    ),
    "infinite filter": (filling("stem.0.weight.values", float("inf")), "stem.0.weight.values .*NaN or infinity"),
    "NaN in a layer": (filling("fc.weight", float("nan")), "fc.weight .*NaN or infinity"),
    "absurd filter": (setting("encodings", "compressed", "stem.0.weight", to=[8, 2**40, 5, 5]), "no compressed tensor"),
    "many weights": (setting("encodings", "compressed", "stem.0.weight", to=[8, 2**20, 2**9, 1]), "limit of"),
    "unknown layer": (setting("architecture", "layers", "fc", "type", to="Sequential"), "layer fc: there is no layer"),
    "layer on a device": (
        setting("architecture", "layers", "fc", "arguments", "device", to={"device": "cpu"}),
        "layer fc: a saved Linear has no argument 'device'",
    ),
    "absurd layer": (setting("architecture", "layers", "fc", "arguments", "in_features", to=2**62), "layer fc: "),
    "pool that writes outside": (
        setting("architecture", "layers", "stem.2", "arguments", "padding", to=-9),
        "layer stem.2: a pooling window",
    ),
    "layer that shadows": (
        setting("architecture", "layers", "forward", to={"type": "ReLU", "arguments": {}}),
        "forward cannot be the name|nothing in the network uses its layer",
    ),
    "filter read as a tensor": (lambda f: f.step("scale").update(tensor="stem.0.columns"), "no tensor that a program"),
    "unknown function": (lambda f: f.step("torch.cat").update(call="torch.load"), "a call of torch.load"),
    "code for an input": (lambda f: f.program["inputs"][0].update(name="a\nimport os"), "cannot name an input"),
    "code for a path": (lambda f: f.step("fc").update(layer="fc', print(1), '"), "cannot name a layer"),
    "no output": (lambda f: f.program.pop("output"), "'output' is missing"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_forged_file_is_refused(saved: Path, tmp_path: Path, attack: str) -> None:
    forge, complaint = ATTACKS[attack]
    forgery = Forgery(saved.read_bytes())
    forge(forgery)
    (tmp_path / "forged").write_bytes(forgery.seal())
    with pytest.raises(ArtifactError, match=rf"(?s)forged: .*({complaint}).*; save the model again"):
        load(tmp_path / "forged")


def test_the_forgeries_are_what_makes_them_refused(saved: Path, tmp_path: Path, converted: ConvertedModel) -> None:
    (tmp_path / "copy").write_bytes(Forgery(saved.read_bytes()).seal())
    assert_same(load(tmp_path / "copy"), converted)


@pytest.mark.parametrize("config", [{"channel_block": -5}, {"vectors": 10**6}, {"parts": 0}, {"isa": "none"}])
def test_a_kernel_gets_no_config_that_it_does_not_offer(
    saved: Path, tmp_path: Path, converted: ConvertedModel, config: dict[str, Any]
) -> None:
    forgery = Forgery(saved.read_bytes())
    plan = forgery.plan["layers"]["blocks.0.conv1"]
    direct = next(c["config"] for c in plan["candidates"] if c["method"] == "direct")
    plan |= {"method": "direct", "config": direct | config}
    (tmp_path / "forged").write_bytes(forgery.seal())
    back = load(tmp_path / "forged", remeasure=False)
    assert back.plan.layers["blocks.0.conv1"].config != direct | config
    with torch.inference_mode():
        torch.testing.assert_close(back(X), converted(X))


@given(st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_never_passes(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(saved.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(ArtifactError, match="damaged: .*; save the model again"):
        load(tmp_path / "damaged")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_never_passes(saved: Path, tmp_path: Path, share: float) -> None:
    data = saved.read_bytes()
    (tmp_path / "short").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ArtifactError, match="short: it"):
        load(tmp_path / "short")
