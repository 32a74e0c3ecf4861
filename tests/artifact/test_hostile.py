"""Files that are forged or damaged: none gets in."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from escort.artifact import ArtifactError, build, load
from escort.network.convert import ConvertedModel
from escort.runtime.saved.limits import MAX_MEASURED_NUMBERS
from tests.artifact.forgery import Forgery, asking, filling, in_precision, on_gpu, problems, removing, setting
from tests.artifact.networks import X, assert_same

LOAD = importlib.import_module("escort.artifact.load")  # by that name the package has the function


def called(path: str) -> Callable[[Forgery], None]:
    """A forgery that calls a layer of that path."""

    def forge(forgery: Forgery) -> None:
        forgery.architecture["layers"][path] = {"type": "ReLU", "arguments": {}}
        forgery.program["steps"].append({"layer": path, "args": [{"value": 0}]})

    return forge


def repeated(forgery: Forgery, times: int) -> dict[str, Any]:
    return {"call": "Tensor.repeat", "args": [forgery.program["output"], times, 1]}


def deep(levels: int) -> Any:
    return 1 if levels == 0 else [deep(levels - 1)]


def record(name: str, field: str) -> dict[str, Any]:
    return {"named_tuple": {"name": name, "fields": [field], "values": [{"value": 0}]}}


ATTACKS: dict[str, tuple[Callable[[Forgery], Any], str]] = {
    "format": (setting("texts", "format", to="pt"), "its format is pt 3"),
    "newer version": (setting("texts", "version", to="4"), "this version reads escort 3"),
    "no plan": (lambda f: setattr(f, "plan", None), "not a network plan"),
    "no layers": (lambda f: f.architecture.pop("layers"), "'layers' is missing"),
    "no programs": (lambda f: f.architecture.pop("programs"), "'programs' is missing"),
    "infinite time": (setting("plan", "dense_time_us", to=float("nan")), "NaN is no JSON number"),
    "absurd example": (setting("plan", "input_shapes", to=[[2**40, 3]]), "input_shapes cannot be .*1099511627776"),
    "large example": (setting("plan", "input_shapes", to=[[2**30, 2**30]]), "no network takes inputs"),
    "negative example": (
        setting("plan", "input_shapes", to=[[-1, -(2**40)]]),
        r"input_shapes cannot be \(\(-1, ",
    ),
    "machine": (setting("plan", "machine", to={}), "not a machine"),
    "no plan for a layer": (lambda f: f.plan["layers"].pop("stem.0"), "layer stem.0: 'stem.0' is missing"),
    "negative config": (setting("plan", "layers", "stem.0", "config", to={"parts": -5}), "stem.0: config cannot be"),
    "unknown method": (setting("plan", "layers", "stem.0", "method", to="magic"), "no method 'magic'"),
    "more channels": (asking(16, "out_channels"), "layer stem.0: tensor stem.0.weight: should be float32 of shape"),
    "fewer channels": (asking(4, "out_channels"), "layer stem.0: tensor stem.0.weight: should be float32 of shape"),
    "more groups": (asking(3, "groups"), "must both be divisible by groups 3"),
    "no stride": (asking([0, 1], "stride"), "sizes are positive"),
    "absurd stride": (asking([1, 2**40], "stride"), "layer stem.0: stride cannot be"),
    "large stride": (asking([1, 2**30], "stride"), "layer stem.0: no network asks for"),
    "absurd dilation": (asking([2**40, 1], "dilation"), "smaller than the kernel|no network asks for"),
    "absurd padding": (asking([2**20] * 4, "padding"), "layer stem.0: no network asks for"),
    "three paddings": (asking([1, 1, 1], "padding"), "layer stem.0: padding cannot be"),
    "absurd batch": (asking(2**40, "batch"), "layer stem.0: batch cannot be"),
    "large batch": (asking(2**30, "batch"), "layer stem.0: no network asks for"),
    "absurd height": (asking(2**40, "height"), "layer stem.0: height cannot be"),
    "large height": (asking(2**30, "height"), "layer stem.0: no network asks for"),
    "fractional width": (asking(32.5, "width"), "layer stem.0: width cannot be 32.5"),
    "another device": (asking("cuda:0", "device"), "layer stem.0: no method .* on cuda:0|its layers are for"),
    "a layer on a GPU": (
        lambda f: f.plan["layers"]["stem.0"].update(on_gpu(f.plan["layers"]["stem.0"])),
        "its layers are for .*'cuda:0'",
    ),
    "a device of no kind": (asking("mps", "device"), "no method .* on mps"),
    "a number for a device": (asking(0, "device"), "layer stem.0: device cannot be 0"),
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
    "unknown timer": (setting("plan", "timer", to="none"), "not a network plan: timer cannot be 'none'"),
    "unknown input type": (setting("plan", "input_dtypes", to=["load"]), "not a network plan: .*'load'"),
    "too many input types": (setting("plan", "input_dtypes", to=["float32"] * 2), "not a network plan"),
    "unknown memory format": (asking("nhwc", "memory_format"), "memory_format is one of"),
    "channels_last on the CPU": (asking("channels_last", "memory_format"), "channels_last is for GPUs"),
    "unknown activation": (asking("exp", "epilogue", "activation"), "activation is one of"),
    "bias of another type": (asking("yes", "epilogue", "bias"), "layer stem.0: bias cannot be 'yes'"),
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
    "no layer of that name": (lambda f: f.step("fc").update(layer="fd"), "'fd' is missing"),
    "a layer that nothing calls": (
        setting("architecture", "layers", "more", to={"type": "ReLU", "arguments": {}}),
        "nothing in the network uses its layer more",
    ),
    "a layer called like a method": (called("forward"), "forward cannot be the name"),
    "a layer called like an attribute": (called("training"), "training cannot be the name"),
    "a layer called like a table": (called("_modules"), "_modules cannot be the name"),
    "a layer called like the program's own": (called("listing"), "listing cannot be the name"),
    "a layer called like Python's own": (called("__class__"), "cannot name a layer"),
    "a layer called like builtins": (called("backward.__builtins__.get"), "cannot name a layer"),
    "a layer within a layer": (called("fc.more"), "layer fc.more lies within the layer fc"),
    "a layer within a sparse one": (called("full.more"), "layer full.more lies within the layer full"),
    "a path out of the folder": (called("../../evil"), "cannot name a layer"),
    "a terminal's escape": (called("a\x1b[31m"), "cannot name a layer"),
    "a tensor that is a layer": (lambda f: f.step("scale").update(tensor="fc"), "fc is no tensor that a program"),
    "a tensor that is a number": (
        lambda f: f.step("scale").update(tensor="fc.in_features"),
        "no tensor that a program",
    ),
    "a program within a program": (
        lambda f: f.architecture["programs"].update(a=f.program),
        "lies within another part",
    ),
    "a program of no name": (lambda f: f.architecture["programs"].update({"__a__": f.program}), "cannot name a layer"),
    "a later value": (lambda f: f.step("fc").update(args=[{"value": 99}]), "value 99 is read where there are"),
    "its own value": (lambda f: f.step("stem.0").update(args=[{"value": 1}]), "value 1 is read where there are 1"),
    "an earlier value than the first": (lambda f: f.step("fc").update(args=[{"value": -1}]), "value -1 is read"),
    "an absurd value": (lambda f: f.step("fc").update(args=[{"value": 2**70}]), "value 1180591620717411303424 is read"),
    "a value of no number": (lambda f: f.step("fc").update(args=[{"value": True}]), "the number of a value"),
    "a list for a call": (lambda f: f.step("torch.cat").update(call=["torch.cat"]), "unhashable"),
    "code for a keyword": (lambda f: f.step("fc").update(kwargs={"x=1);print(": 1}), "a keyword is an identifier"),
    "another argument of a layer": (lambda f: f.step("fc").update(kwargs={"foo": 1}), "step %.*: TypeError"),
    "an absurd integer": (lambda f: f.step("torch.cat").update(args=[[], 2**64]), "more than 64 bits"),
    "an absurdly long integer": (lambda f: f.step("torch.cat").update(args=[[], 10**4000]), "more than 64 bits"),
    "NaN": (lambda f: f.step("torch.cat").update(args=[[], float("nan")]), "NaN is no JSON number"),
    "an input without an example": (lambda f: f.program["inputs"][0].pop("shape"), "what its input x is like"),
    "another example": (lambda f: f.program["inputs"][0].update(shape=[2, 4, 32, 32]), "step %1 = stem.0"),
    "an absurd example of an input": (
        lambda f: f.program["inputs"][0].update(shape=[2**31]),
        "no network takes an inp",
    ),
    "an example that takes long to lay out": (
        lambda f: f.program["inputs"][0].update(shape=[1, 3, 2**13, 2**13]),
        "pieces of rows|no network asks",
    ),
    "a stride of many phases": (
        lambda f: f.problem().update(stride=[2**12, 2**12], kernel_size=[5, 5]),
        "layer stem.0: no network asks for",
    ),
    "a bomb": (lambda f: f.program["steps"].append(repeated(f, 2**40)), "step %.* = repeat"),
    "a large bomb": (lambda f: f.program["steps"].append(repeated(f, 2**28)), "step %.* = repeat.* more than"),
    "an absurd pool": (
        lambda f: f.architecture["layers"].update(
            fc={"type": "AdaptiveAvgPool2d", "arguments": {"output_size": 10**9}}
        ),
        "layer fc: no AdaptiveAvgPool2d has output_size 1000000000",
    ),
    "containers within containers": (lambda f: f.program.update(output=deep(900)), "deep in each other"),
    "code for a tuple's name": (lambda f: f.program.update(output=record("a, b=print(1)", "x")), "cannot name a tuple"),
    "code for a tuple's field": (lambda f: f.program.update(output=record("A", "x=print(1)")), "cannot name a tuple"),
    "a tuple's own field": (lambda f: f.program.update(output=record("A", "__new__")), "cannot name a tuple"),
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


def test_deeper_than_json_can_be_read(saved: Path, tmp_path: Path) -> None:
    forgery = Forgery(saved.read_bytes())
    forgery.texts["plan"] = "[" * 10**5
    (tmp_path / "forged").write_bytes(forgery.seal(replacing=False))
    with pytest.raises(ArtifactError, match="forged: .*; save the model again"):
        load(tmp_path / "forged")


def test_nothing_large_is_measured_without_being_asked_for(saved: Path, tmp_path: Path) -> None:
    forgery = Forgery(saved.read_bytes())
    forgery.plan["machine"]["device"] = "another"
    numbers = 3 * 32 * 32
    for batch, is_refused in ((MAX_MEASURED_NUMBERS // numbers, False), (MAX_MEASURED_NUMBERS // numbers + 1, True)):
        forgery.plan["input_shapes"] = [[batch, 3, 32, 32]]
        (tmp_path / "forged").write_bytes(forgery.seal())
        load(tmp_path / "forged", remeasure=False)
        with pytest.MonkeyPatch.context() as patch:
            measured: list[Any] = []
            patch.setattr(LOAD, "replan", lambda model, **options: measured.append(model) or model)  # noqa: B023
            if is_refused:
                with pytest.raises(
                    ArtifactError, match="pass remeasure=True if you trust the file, or remeasure=False"
                ):
                    load(tmp_path / "forged")
            else:
                load(tmp_path / "forged")
            load(tmp_path / "forged", remeasure=True)
        assert len(measured) == 1 if is_refused else 2


@pytest.mark.parametrize("limit", ["MAX_MEASURED_WRITES", "MAX_MEASURED_MULTIPLY_ADDS", "MAX_LOWERED"])
def test_no_long_work_is_measured_without_being_asked_for(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    forgery = Forgery(saved.read_bytes())
    forgery.plan["machine"]["device"] = "another"
    (tmp_path / "forged").write_bytes(forgery.seal())
    monkeypatch.setattr(LOAD, "replan", lambda model, **options: model)
    load(tmp_path / "forged")
    monkeypatch.setattr(LOAD, limit, 1000)
    with pytest.raises(ArtifactError, match="pass remeasure=True if you trust the file, or remeasure=False"):
        load(tmp_path / "forged")


def test_no_method_writes_out_a_large_input(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgery = Forgery(saved.read_bytes())
    forgery.plan["layers"]["stem.0"] |= {"method": "lowered", "config": {}}
    (tmp_path / "forged").write_bytes(forgery.seal())
    assert load(tmp_path / "forged", remeasure=False).plan.layers["stem.0"].method == "lowered"
    monkeypatch.setattr(build, "MAX_LOWERED", 1000)
    assert load(tmp_path / "forged", remeasure=False).plan.layers["stem.0"].method != "lowered"


def test_the_number_of_layers_is_limited(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = len(Forgery(saved.read_bytes()).architecture["layers"])
    monkeypatch.setattr(build, "MAX_STEPS", layers)
    load(saved)
    monkeypatch.setattr(build, "MAX_STEPS", layers - 1)
    with pytest.raises(ArtifactError, match=f"a network has at most {layers - 1} layers"):
        load(saved)


def test_the_forgeries_are_what_makes_them_refused(saved: Path, tmp_path: Path, converted: ConvertedModel) -> None:
    (tmp_path / "copy").write_bytes(Forgery(saved.read_bytes()).seal())
    assert_same(load(tmp_path / "copy"), converted)


@pytest.mark.parametrize("config", [{"channel_block": 1 << 30}, {"vectors": 10**6}, {"parts": 0}, {"isa": "none"}])
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
