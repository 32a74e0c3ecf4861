"""Converted models come back bit by bit; files that are damaged, forged or from elsewhere are told apart."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from escort.artifact import ArtifactError, load, load_plan, save
from escort.layers.nn import SparseConv2d
from escort.network.convert import ConvertedModel, NetworkPlan, convert
from escort.planner import timing as bench
from escort.planner.machine import Machine

LOAD = importlib.import_module("escort.artifact.load")  # by that name the package has the function
ELSEWHERE = Machine("another", "none", 99, "2.0", "0")


@pytest.fixture(scope="module", autouse=True)
def _no_timing() -> Any:
    """Conversion always pays and plans do not depend on time."""
    with pytest.MonkeyPatch.context() as patch:
        times = {2: [2.0, 1.0]}
        patch.setattr(bench, "race", lambda runs, **_: times.get(len(runs), [1.0 + i for i in range(len(runs))]))
        yield


def sparse(model: nn.Module, density: float = 0.1) -> nn.Module:
    """The model, initialised and pruned in place, ready to be converted."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0.0 if "var" in name else 0.5))
            if tensor.ndim == 4:
                tensor *= torch.rand(tensor.shape, generator=generator) < density
    return model.eval()


class Block(nn.Module):
    """A residual block with a strided shortcut, as in a ResNet."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding="same", groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))) + self.shortcut(x))


class Residual(nn.Module):
    """Two blocks, a full filter, an empty one, a depthwise one, tied linear layers and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU6(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Block(8, 12, 2), Block(12, 12, 1))
        self.depthwise = nn.Conv2d(12, 12, (3, 2), padding=(2, 1), dilation=2, groups=12)
        self.empty = nn.Conv2d(12, 12, 1)
        self.full = nn.Conv2d(12, 10, 1)
        self.fc, self.again = nn.Linear(10, 10), nn.Linear(10, 10)
        self.again.weight = self.fc.weight
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = self.full(torch.cat([self.depthwise(x), self.empty(x)], 3))
        return self.again(self.fc(x.mean((2, 3)))) * self.scale


class Untraceable(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.MaxPool2d(2))
        self.conv = nn.Conv2d(channels, 6, 3, bias=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.features(x))
        return self.fc(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def converted() -> ConvertedModel:
    model = sparse(Residual())
    with torch.no_grad():
        model.empty.weight.zero_()
        model.full.weight.copy_(torch.randn(10, 12, 1, 1))
    result = convert(model, X)
    assert result.traced and not result.plan.kept_dense
    return result


@pytest.fixture(scope="module")
def untraced() -> ConvertedModel:
    result = convert(sparse(Untraceable()), X)
    assert not result.traced and isinstance(result.network.conv, SparseConv2d)
    return result


@pytest.fixture(scope="module")
def saved(converted: ConvertedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.escort"
    save(converted, path)
    return path


@pytest.fixture(scope="module")
def saved_untraced(untraced: ConvertedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "untraced.escort"
    save(untraced, path)
    return path


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for x in (X, X[:1], torch.randn(3, 3, 45, 37)):
        with torch.inference_mode():
            assert torch.equal(ours(x), theirs(x))


def test_a_traced_model_comes_back_bit_by_bit(converted: ConvertedModel, saved: Path, tmp_path: Path) -> None:
    back = load(saved)
    assert_same(back, converted)
    assert back.plan == converted.plan
    assert back.traced
    assert back.network.fc.weight.data_ptr() == back.network.again.weight.data_ptr()
    save(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_an_untraceable_model_comes_back_into_a_new_one(untraced: ConvertedModel, saved_untraced: Path) -> None:
    fresh = Untraceable()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    back = load(saved_untraced, fresh)
    assert_same(back, untraced)
    assert back.plan == untraced.plan
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


def test_an_untraceable_model_is_asked_for(saved_untraced: Path) -> None:
    with pytest.raises(ArtifactError, match=r"untraced\.escort: it holds no graph; pass load a new model of the class"):
        load(saved_untraced)


def test_a_traced_model_needs_no_other(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="its own graph; leave out the model"):
        load(saved, Residual())


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (Untraceable(channels=4), "layer features.0: the file holds SparseConv2d"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), "layer features.0: .*features"),
        (nn.Module(), "pass a new model of the class"),
    ],
    ids=["channels", "structure", "empty"],
)
def test_another_model_is_refused(saved_untraced: Path, model: nn.Module, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        load(saved_untraced, model)


def _with_more() -> nn.Module:
    model = Untraceable()
    model.more = nn.Linear(2, 2)
    return model


def _with_less() -> nn.Module:
    model = Untraceable()
    model.fc = nn.Identity()
    return model


def _with_another_shape() -> nn.Module:
    model = Untraceable()
    model.fc = nn.Linear(6, 5)
    return model


def _with_another_pool() -> nn.Module:
    model = Untraceable()
    model.features[2] = nn.MaxPool2d(3)
    return model


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_with_more, "tensor more.weight is missing"),
        (_with_less, r"nothing in the network uses its tensor fc\.(weight|bias)"),
        (_with_another_shape, "fc.weight is of shape"),
        (_with_another_pool, "layer features.2: the file holds MaxPool2d"),
    ],
)
def test_a_model_with_other_tensors_is_refused(
    saved_untraced: Path, make: Callable[[], nn.Module], complaint: str
) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        load(saved_untraced, make())


@pytest.mark.parametrize(("density", "share"), [(0.45, 0.65), (0.1, 0.18), (0.02, 0.07)])
def test_the_file_shrinks_with_the_density(tmp_path: Path, density: float, share: float) -> None:
    model = sparse(nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU()), density)
    save(convert(model, torch.randn(1, 32, 9, 9)), tmp_path / "model")
    assert (tmp_path / "model").stat().st_size <= share * len(save_tensors(model.state_dict()))


def test_nothing_is_pickled(saved: Path) -> None:
    tensors = load_tensors(saved.read_bytes())  # it is a plain safetensors file
    assert {"stem.0.weight.values", "stem.0.weight.row_lengths", "stem.0.weight.column_gaps"} <= tensors.keys()
    assert tensors["full.weight"].shape == (10, 12, 1, 1)  # more than half full
    assert "again.weight" not in tensors


# What docs/format.md shows: a model that adds a parameter to its input, byte by byte.
# Keys that may be missing.
OPTIONAL = (
    b',\\"precision\\":\\"fp32\\",\\"device\\":\\"cpu\\",\\"input_dtypes\\":[\\"float32\\"],\\"timer\\":\\"calls\\"'
)
TINY_HEADER = (
    b'{"__metadata__":{"sha256":"0000000000000000000000000000000000000000000000000000000000000000",'
    b'"format":"escort","version":"2","escort":"0",'
    b'"architecture":"{\\"layers\\":{},\\"graph\\":['
    b'{\\"op\\":\\"placeholder\\",\\"name\\":\\"x\\",\\"target\\":\\"x\\",\\"args\\":[],\\"kwargs\\":{}},'
    b'{\\"op\\":\\"get_attr\\",\\"name\\":\\"shift\\",\\"target\\":\\"shift\\",\\"args\\":[],\\"kwargs\\":{}},'
    b'{\\"op\\":\\"call_function\\",\\"name\\":\\"add\\",\\"target\\":\\"operator.add\\",'
    b'\\"args\\":[{\\"node\\":\\"x\\"},{\\"node\\":\\"shift\\"}],\\"kwargs\\":{}},'
    b'{\\"op\\":\\"output\\",\\"name\\":\\"output\\",\\"target\\":\\"output\\",'
    b'\\"args\\":[{\\"node\\":\\"add\\"}],\\"kwargs\\":{}}]}",'
    b'"plan":"{\\"layers\\":{},\\"skipped\\":{},\\"input_shapes\\":[[2]],\\"dense_time_us\\":2.0,'
    b'\\"converted_time_us\\":1.0,\\"rel_error\\":0.0,\\"kept_dense\\":false,'
    b'\\"machine\\":{\\"device\\":\\"cpu\\",\\"isa\\":\\"generic\\",\\"threads\\":1,'
    b'\\"torch\\":\\"2.13.0\\",\\"escort\\":\\"0\\"},\\"images\\":null' + OPTIONAL + b'}",'
    b'"tensors":"{\\"compressed\\":{},\\"shared\\":{}}"},'
    b'"shift":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
)
TINY_DATA = b"\x00\x00\x80\x3f\x00\x00\x00\xc0"  # 1.0, -2.0


def sealed(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    whole = len(header).to_bytes(8, "little") + header + data
    return whole[:35] + hashlib.sha256(whole).hexdigest().encode() + whole[99:]


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


def test_a_file_of_version_1_says_what_to_do(tmp_path: Path) -> None:
    header = TINY_HEADER.replace(b'"version":"2","escort":"0"', b'"version":"1","escort":"0.1.0"')
    (tmp_path / "old").write_bytes(sealed(header, TINY_DATA))
    remedy = "convert the model again, or load it with the version that wrote it$"
    for read in (load, load_plan):
        with pytest.raises(ArtifactError, match=f"old: its format is escort 1, written by escort 0.1.0; .*; {remedy}"):
            read(tmp_path / "old")


class Forgery:
    """The parts of a file, to be changed and sealed again: what an attacker can do."""

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:8], "little")
        self.header = json.loads(data[8 : 8 + size])
        self.texts = self.header["__metadata__"]
        self.architecture, self.plan, self.encodings = (
            json.loads(self.texts[key]) for key in ("architecture", "plan", "tensors")
        )
        self.tensors = load_tensors(data)

    def node(self, name: str) -> dict[str, Any]:
        return next(node for node in self.architecture["graph"] if node["name"] == name)

    def problem(self, layer: str = "stem.0") -> dict[str, Any]:
        return self.plan["layers"][layer]["problem"]

    def seal(self) -> bytes:
        texts = self.texts | {"architecture": json.dumps(self.architecture), "plan": json.dumps(self.plan)}
        texts |= {"tensors": json.dumps(self.encodings)} | {"sha256": "0" * 64}
        body = save_tensors(self.tensors)
        size = int.from_bytes(body[:8], "little")
        return sealed(
            json.dumps({"__metadata__": texts, **json.loads(body[8 : 8 + size])}, separators=(",", ":")).encode(),
            body[8 + size :],
        )


def setting(*keys: Any, to: Any) -> Callable[[Forgery], None]:
    """A forgery that sets an attribute, or an item somewhere within it."""

    def forge(forgery: Forgery) -> None:
        inner: Any = vars(forgery)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return forge


def asking(to: Any, *keys: str) -> Callable[[Forgery], None]:
    return setting("plan", "layers", "stem.0", "problem", *keys, to=to)


def problems(forgery: Forgery) -> list[dict[str, Any]]:
    return [layer["problem"] for layer in forgery.plan["layers"].values()]


def in_precision(problem: dict[str, Any], dtype: str) -> None:
    problem["precision"] = dtype


def on_gpu(layer: dict[str, Any], dtype: str = "fp32") -> dict[str, Any]:
    """A layer's plan as if it had been measured on a GPU."""
    config = {"memory_format": "contiguous", "output": "contiguous"}
    candidate = {"method": "cudnn", "config": config, "time_us": 1.0, "rel_error": 0.0, "reason": None}
    problem = layer["problem"] | {"device": "cuda:0", "precision": dtype}
    return layer | {"problem": problem, "method": "cudnn", "config": config, "candidates": [candidate]}


def removing(name: str) -> Callable[[Forgery], None]:
    return lambda forgery: forgery.tensors.pop(name)


def filling(name: str, value: float) -> Callable[[Forgery], None]:
    return lambda forgery: forgery.tensors[name].fill_(value)


ATTACKS: dict[str, tuple[Callable[[Forgery], Any], str]] = {
    "format": (setting("texts", "format", to="pt"), "its format is pt 2"),
    "newer version": (setting("texts", "version", to="3"), "this version reads escort 2"),
    "no plan": (lambda f: setattr(f, "plan", None), "not a network plan"),
    "no layers": (lambda f: f.architecture.pop("layers"), "'layers' is missing"),
    "no graph": (lambda f: f.architecture.pop("graph"), "'graph' is missing"),
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
    "another dtype": (asking("fp16", "precision"), "its layers are for .*'fp16'"),
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
        "layer fc: where a layer lies",
    ),
    "absurd layer": (setting("architecture", "layers", "fc", "arguments", "in_features", to=2**62), "layer fc: "),
    "pool that writes outside": (
        setting("architecture", "layers", "stem.2", "arguments", "padding", to=-9),
        "layer stem.2: a pooling window",
    ),
    "layer that shadows": (
        setting("architecture", "layers", "forward", to={"type": "ReLU", "arguments": {}}),
        "name a",
    ),
    "filter read as a tensor": (lambda f: f.node("scale").update(target="stem.0.columns"), "no tensor that the graph"),
    "unknown function": (lambda f: f.node("cat").update(target="torch.load"), "call_function of torch.load"),
    "code for a name": (lambda f: f.node("cat").update(name="a\nimport os"), "cannot be a name"),
    "code for a path": (lambda f: f.node("fc").update(target="fc', print(1), '"), "cannot name a layer"),
    "no output": (lambda f: f.architecture["graph"].pop(), "output"),
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


def test_another_machine_plans_again(
    converted: ConvertedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {name: replace(plan, machine=ELSEWHERE) for name, plan in converted.plan.layers.items()}
    there = ConvertedModel(converted.network, replace(converted.plan, layers=layers, machine=ELSEWHERE))
    save(there, tmp_path / "there")

    kept = load(tmp_path / "there", remeasure=False)
    assert kept.plan.machine == ELSEWHERE
    assert_same(kept, converted)

    here = load(tmp_path / "there")
    assert here.plan.machine == Machine.here()
    assert {plan.machine for plan in here.plan.layers.values()} == {Machine.here()}
    with torch.inference_mode():
        torch.testing.assert_close(here(X), converted(X))

    asked: list[ConvertedModel] = []
    monkeypatch.setattr(LOAD, "replan", lambda model: asked.append(model) or model)
    load(tmp_path / "there")
    assert len(asked) == 1


def planned_on_gpu(saved: Path, path: Path, dtype: str) -> Path:
    """The file as if it had been planned on a GPU, with a node that names the device."""
    forgery = Forgery(saved.read_bytes())
    layers = {name: on_gpu(layer, dtype) for name, layer in forgery.plan["layers"].items()}
    machine = asdict(Machine("A GPU", "sm_90", 0, "2.13.0", "0", "580.1", "13.0", "9.1.0"))
    forgery.plan |= {"layers": layers, "machine": machine, "device": "cuda:0", "precision": dtype, "timer": "graph"}
    mean = forgery.node("mean")
    move = {"op": "call_method", "name": "moved", "target": "to", "args": [{"node": "mean"}, {"device": "cuda:0"}]}
    nodes = forgery.architecture["graph"]
    forgery.node("fc")["args"] = [{"node": "moved"}]
    nodes.insert(nodes.index(mean) + 1, move | {"kwargs": {}})
    path.write_bytes(forgery.seal())
    return path


@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
def test_without_a_gpu_its_plan_is_made_anew_on_the_cpu(
    saved: Path, tmp_path: Path, converted: ConvertedModel, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = planned_on_gpu(saved, tmp_path / "gpu", dtype)
    for device in (None, "cpu"):
        here = load(path, device=device)
        assert (here.plan.device, here.plan.precision, here.plan.machine) == ("cpu", "fp32", Machine.here())
        assert {(p.problem.device, p.problem.precision) for p in here.plan.layers.values()} == {("cpu", "fp32")}
        assert all(plan.time_us is not None for plan in here.plan.layers.values())
        with torch.inference_mode():
            torch.testing.assert_close(here(X), converted(X))
    assert load_plan(path).layers["stem.0"].method == "cudnn" and load_plan(path).device == "cuda:0"
    with pytest.raises(ArtifactError, match="gpu: it was planned for cuda:0, not for cpu; leave out remeasure=False"):
        load(path, remeasure=False)
    with pytest.raises(ValueError, match="cuda:1 needs an NVIDIA GPU"):
        load(path, device="cuda:1")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_needs_a_gpu(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ArtifactError, match=f"gpu: it computes in {dtype}, which takes a GPU; load it where there is a GPU, or convert"
    ):
        load(planned_on_gpu(saved, tmp_path / "gpu", dtype))


def test_a_plan_is_read_without_the_rest(saved: Path, converted: ConvertedModel, tmp_path: Path) -> None:
    assert load_plan(saved) == converted.plan
    forgery = Forgery(saved.read_bytes())
    forgery.plan["layers"]["stem.0"]["method"] = "magic"
    (tmp_path / "forged").write_bytes(forgery.seal())
    with pytest.raises(ArtifactError, match="forged: no method 'magic'"):
        load_plan(tmp_path / "forged")
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "none")


def test_this_machine_plans_again_only_when_asked(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ConvertedModel] = []
    monkeypatch.setattr(LOAD, "replan", lambda model: asked.append(model) or model)
    load(saved)
    assert not asked
    load(saved, remeasure=True)
    assert len(asked) == 1


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_an_interrupted_save_leaves_the_old_file(
    converted: ConvertedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"the old file")

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)) as caught:
        save(converted, path)
    if isinstance(error, OSError):
        assert "No space left on device; name a file in a folder that" in str(caught.value)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("path", ["none/model", "file/model", "folder", ".", ""])
def test_an_unwritable_path_is_named(
    converted: ConvertedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot save: .*; name a file in a folder that exists"):
        save(converted, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is not a file"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_only_a_converted_model_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="convert the model first"):
        save(Residual(), tmp_path / "model")  # type: ignore[arg-type]


class _Custom(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda n: setattr(n, "fc", _Custom(10, 10)), "layer fc: a .*_Custom cannot be saved; use a layer of torch.nn"),
        (lambda n: n.fc.weight.data.fill_(float("nan")), "fc.weight holds NaN"),
        (lambda n: setattr(n, "scale", nn.Parameter(torch.ones(10, dtype=torch.cfloat))), "scale is a torch.complex64"),
        (lambda n: n.fc.register_forward_hook(print), "layer fc: forward hooks cannot be saved"),
    ],
    ids=["class", "nan", "complex", "hook"],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, change: Callable[[Any], Any], complaint: str) -> None:
    model = convert(sparse(Residual()), X)
    change(model.network)
    with pytest.raises((TypeError, ValueError), match=complaint):
        save(model, tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_a_dense_network_that_was_kept_comes_back(tmp_path: Path, converted: ConvertedModel) -> None:
    plan: NetworkPlan = replace(converted.plan, kept_dense=True)
    kept = ConvertedModel(sparse(Residual()), plan)
    save(kept, tmp_path / "kept")
    back = load(tmp_path / "kept", Residual())
    assert back.plan.kept_dense
    assert_same(back, kept)
