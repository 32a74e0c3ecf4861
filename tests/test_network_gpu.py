"""Whole models on a GPU: converted equals original in every precision, wherever and however it is called."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import escort
from benchmarks.networks import NETWORKS
from escort import prune, reference
from escort.cli import app
from escort.layers import ops
from escort.layers.nn import SparseConv2d
from escort.methods import by_name
from escort.network.convert import NETWORK_ERROR_BOUND, ConvertedModel
from escort.planner import planner
from escort.planner import timing as bench
from escort.planner.machine import Machine
from escort.problem import TORCH_DTYPE, Precision

pytestmark = pytest.mark.gpu

PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class Mixed(nn.Module):
    """Stride, groups, a depthwise and a pointwise layer, a residual, both pools, a concatenation and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = F.relu(self.norm(self.grouped(x)) + x)
        x = torch.cat([F.relu(self.pointwise(self.depthwise(x))), x], 1)
        return self.head(x.mean((2, 3)))


class Branching(nn.Module):
    """Its control flow depends on the data: it can be neither traced nor captured."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    prune.uniform(model, sparsity)
    prune.make_permanent(model)
    return model.eval()


@pytest.fixture(autouse=True)
def strict_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def quick_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans look at each method's first config only, and the first contestant of a race, the original, loses."""
    race = bench.race_on_gpu

    def ordered(runs: Any, device: Any, **options: Any) -> list[bench.Timing]:
        timings = race(runs, device, **{**options, "rounds": 3, "budget_s": 0.0})
        worst = max(timing.time_us or 0.0 for timing in timings)
        return timings if len(timings) == 1 else [replace(timings[0], time_us=2 * worst), *timings[1:]]

    monkeypatch.setattr(bench, "race_on_gpu", ordered)
    monkeypatch.setattr(planner, "_MOST_CONFIGS", 1)
    monkeypatch.setattr(planner, "_remembered", {})


@pytest.fixture(autouse=True)
def memory_formats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Those in which networks are tried: NCHW where a test does not name others."""
    formats: tuple[str, ...] = getattr(request, "param", ("contiguous",))
    module: Any = sys.modules["escort.network.convert"]
    tried = module._by_memory_format

    def some(*asked: Any) -> dict[str, nn.Module]:
        return {name: network for name, network in tried(*asked).items() if name in formats}

    monkeypatch.setattr(module, "_by_memory_format", some)
    return formats


def in_formats(*formats: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize("memory_formats", formats, indirect=True, ids="-".join)


BOTH = in_formats(("contiguous",), ("channels_last",))


def each(*precisions: Precision) -> Any:
    """These precisions in each memory format that they have."""
    found = [
        (p, (name,))
        for p in precisions
        for name in ("contiguous", "channels_last")
        if p != "fp32" or name == "contiguous"
    ]
    ids = ["-".join((precision, *formats)) for precision, formats in found]
    return pytest.mark.parametrize(("precision", "memory_formats"), found, indirect=["memory_formats"], ids=ids)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Leaves the planner one method to choose."""
    return lambda name: monkeypatch.setattr(planner, "for_device", lambda device: (by_name(name, device),))


def on_gpu(model: nn.Module, precision: Precision) -> nn.Module:
    return model.to("cuda", TORCH_DTYPE[precision])


def images(precision: Precision, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 32, 32), device="cuda").to(TORCH_DTYPE[precision])


def converted(precision: Precision, model: nn.Module | None = None, *shape: int) -> ConvertedModel:
    model = on_gpu(pruned(Mixed()) if model is None else model, precision)
    fast = escort.convert(model, images(precision, *shape), precision=precision)
    assert not fast.plan.kept_dense and fast.plan.precision == precision
    return fast


def assert_close(fast: nn.Module, model: nn.Module, x: Tensor, precision: Precision) -> None:
    """Both by the same float64 truth, with bounds for the precision."""
    with torch.inference_mode():
        out = fast(x)
        expected = copy.deepcopy(model).double()(x.double())
    assert out.dtype is x.dtype and out.shape == expected.shape
    assert reference.compare(out, expected) < NETWORK_ERROR_BOUND[precision]


def assert_same(out: Tensor, expected: Tensor) -> None:
    """The same computation: bits may differ, as not every kernel fixes the order of its sums."""
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(out.dtype, "fp32")
    assert out.dtype is expected.dtype and reference.compare(out, expected) < reference.ERROR_BOUND[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["direct", "cudnn"])
def test_any_input_is_right(precision: Precision, method: str, only: Callable[[str], None]) -> None:
    only(method)
    model = on_gpu(pruned(Mixed()), precision)
    fast = converted(precision, model)
    assert len(fast.plan.layers) == 4 and not fast.plan.skipped and fast.traced
    assert {(p.method, p.problem.precision, p.problem.device) for p in fast.plan.layers.values()} == {
        (method, precision, "cuda:0")
    }
    for shape in ((2, 3, 32, 32), (1, 3, 32, 32), (7, 3, 32, 32), (2, 3, 45, 37), (3, 3, 9, 70)):
        assert_close(fast, model, images(precision, *shape), precision)
    base = images(precision, 4, 33, 34, 3)
    for x in (
        base.permute(0, 3, 1, 2),
        images(precision, 4, 3, 32, 32)[::2],
        images(precision, 2, 3, 32, 64)[..., ::2],
    ):
        assert_close(fast, model, x, precision)
    assert_close(fast, model, images(precision).contiguous(memory_format=torch.channels_last), precision)
    with torch.inference_mode():
        assert fast(images(precision)[:0]).shape == (0, 10)


@in_formats(("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resnet_18_is_the_same_network(precision: Precision) -> None:
    torch.manual_seed(0)
    model = on_gpu(pruned(NETWORKS["resnet18"].factory(num_classes=10), 0.9), precision)
    fast = escort.convert(model, images(precision, 2, 3, 64, 64), precision=precision, compile_budget_s=0.0)
    assert len(fast.plan.layers) == 20 and not fast.plan.skipped and not fast.plan.kept_dense
    assert fast.plan.timer == "graph" and fast.plan.machine == Machine.here("cuda:0") and fast.plan.images is None
    for plan in fast.plan.layers.values():
        assert {candidate.method for candidate in plan.candidates} >= {"direct", "cudnn"}
        assert plan.time_us is not None and plan.dense_time_us is not None
    for shape in ((2, 3, 64, 64), (3, 3, 96, 64)):
        assert_close(fast, model, images(precision, *shape), precision)


@in_formats(("channels_last",))
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize("method", [None, "cudnn"])
def test_a_network_in_channels_last_is_right(
    precision: Precision, method: str | None, only: Callable[[str], None]
) -> None:
    if method:
        only(method)
    model = on_gpu(pruned(Mixed()), precision)
    fast = converted(precision, model)
    assert fast.plan.memory_format == "channels_last" and len(fast.plan.layers) == 4 and not fast.plan.skipped
    for shape in ((2, 3, 32, 32), (1, 3, 32, 32), (7, 3, 32, 32), (2, 3, 45, 37), (3, 3, 9, 70)):
        x = images(precision, *shape)
        assert_close(fast, model, x, precision)
        assert_close(fast, model, x.contiguous(memory_format=torch.channels_last), precision)
    lying = []
    for layer in fast.network.modules():
        if isinstance(layer, SparseConv2d):
            layer.register_forward_hook(
                lambda *called: lying.append(called[2].is_contiguous(memory_format=torch.channels_last))
            )
    with torch.inference_mode():
        fast(images(precision))
        assert fast(images(precision)[:0]).shape == (0, 10)
    assert lying and all(lying)


@BOTH
def test_a_model_in_channels_last_stays_right() -> None:
    model = on_gpu(pruned(Mixed()), "fp16").to(memory_format=torch.channels_last)
    x = images("fp16").contiguous(memory_format=torch.channels_last)
    fast = escort.convert(model, x)
    assert_close(fast, model, x, "fp16")


def test_what_cannot_be_captured_is_timed_by_events_and_converted_layer_by_layer() -> None:
    model = pruned(Branching()).cuda()
    fast = escort.convert(model, images("fp32"), precision="fp32")
    assert not fast.traced and fast.plan.timer == "events" and set(fast.plan.layers) == {"conv"}
    for x in (images("fp32").abs(), -images("fp32").abs()):
        assert_close(fast, model, x, "fp32")


def test_a_dense_network_is_kept_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "race_on_gpu", lambda runs, *_, **__: [bench.Timing(1.0 + i) for i in range(len(runs))])
    fast = escort.convert(pruned(Mixed()).cuda(), images("fp32"), precision="fp32")
    assert fast.plan.kept_dense and not any(isinstance(module, SparseConv2d) for module in fast.modules())


def test_strict_float32_is_strict_whatever_torch_allows(
    monkeypatch: pytest.MonkeyPatch, only: Callable[[str], None]
) -> None:
    only("cudnn")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    conv = pruned(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), 0.5).cuda()
    x = images("fp32", 4, 64, 28, 28)
    with pytest.warns(UserWarning, match="pass precision='tf32' to allow TF32"):
        strict = escort.convert(conv, x)
    assert strict.plan.precision == "fp32"
    assert torch.backends.cudnn.allow_tf32
    loose = escort.convert(conv, x, precision="tf32")
    with torch.inference_mode():
        expected = copy.deepcopy(conv).double()(x.double())
        assert reference.compare(strict(x), expected) < reference.ERROR_BOUND["fp32"]
        assert reference.compare(loose(x), expected) < reference.ERROR_BOUND["tf32"]


def test_another_stream() -> None:
    fast, stream = converted("fp32"), torch.cuda.Stream()
    x = images("fp32", 4, 3, 40, 40)  # a size that is laid out on the stream
    with torch.inference_mode():
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(20):
                y = fast(x * 2.0)  # x is made on the stream too
        stream.synchronize()
        assert_same(y, fast(x * 2.0))


@in_formats(("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_captured_graph_follows_its_input(precision: Precision) -> None:
    fast, x = converted(precision), images(precision)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.inference_mode():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                fast(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            y = fast(x)
        for _ in range(3):
            x.copy_(images(precision))
            graph.replay()
            assert_same(y, fast(x.clone()))


def test_what_was_not_laid_out_before_a_capture_says_so() -> None:
    fast = converted("fp32")
    layer = fast.network.get_submodule("grouped")
    x = images("fp32", 1, 16, 21, 23)
    with torch.inference_mode():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
            with pytest.raises(RuntimeError, match="grouped: a CUDA graph cannot be captured from the first"):
                layer(x, x)
        layer(x, x)


@BOTH
def test_compiled_and_exported(tmp_path: Path) -> None:
    fast, x = converted("fp16"), images("fp16")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fast(x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x), expected)
        torch.export.save(torch.export.export(fast, (x,)), tmp_path / "network.pt2")
        program = torch.export.load(tmp_path / "network.pt2").module()
        assert_same(program(x), expected)


def test_compiled_with_graphs_of_its_own() -> None:
    layer, x = converted("fp32").network.get_submodule("pointwise"), images("fp32", 2, 16, 19, 17)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # run, record, replay
            x.normal_()
            assert_same(compiled(x), layer(x))


@each("fp32", "bf16")
def test_the_operator_passes_torchs_own_checks(precision: Precision) -> None:
    layer = converted(precision).network.get_submodule("grouped")
    x = images(precision, 2, 16, 8, 8)
    arrays = layer.values, layer.columns, layer.indptr, layer.bias, layer._spec
    torch.library.opcheck(ops.sparse_conv2d, (x, x, *arrays))
    with pytest.raises(ValueError, match="on the filter's device, cpu, got .* on cuda:0"):
        ops.sparse_conv2d(x, x, *(array.cpu() for array in arrays[:3]), *arrays[3:])


@each(*PRECISIONS)
def test_saved_and_loaded(precision: Precision, tmp_path: Path) -> None:
    fast, x = converted(precision), images(precision)
    escort.save(fast, tmp_path / "model")
    back = escort.load(tmp_path / "model")
    assert back.plan == fast.plan  # planned on this very machine
    with torch.inference_mode():
        assert_same(back(x), fast(x))
    escort.save(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()
    if precision in ("fp16", "bf16"):
        with pytest.raises(ValueError, match=f"it computes in {precision}, which takes a GPU"):
            escort.load(tmp_path / "model", device="cpu")
        return
    here = escort.load(tmp_path / "model", device="cpu")
    assert (here.plan.device, here.plan.precision, here.plan.machine) == ("cpu", "fp32", Machine.here())
    with torch.inference_mode():
        assert reference.compare(here(x.cpu()), fast(x).cpu()) < NETWORK_ERROR_BOUND[precision]


def test_from_the_cpu_to_a_gpu_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "race", lambda runs, **_: [2.0, *(1.0 for _ in runs[1:])])
    model, x = pruned(Mixed()), torch.randn(2, 3, 32, 32)
    escort.save(escort.convert(model, x), tmp_path / "model")
    fast = escort.load(tmp_path / "model", device="cuda")
    assert (fast.plan.device, fast.plan.precision, fast.plan.machine) == ("cuda:0", "fp32", Machine.here("cuda:0"))
    assert_close(fast, model.cuda(), x.cuda(), "fp32")
    with pytest.raises(ValueError, match="there is no cuda:99"):
        escort.load(tmp_path / "model", device="cuda:99")


def test_where_it_may_go_and_what_it_may_become() -> None:
    fast, x = converted("fp16"), images("fp16")
    with torch.inference_mode():
        before = fast(x)
        assert_same(fast.half().cuda().to("cuda:0", torch.float16)(x), before)
        for move, error in ((fast.cpu, ValueError), (fast.float, TypeError), (lambda: fast.to("meta"), ValueError)):
            with pytest.raises(error, match="stem.0 .*(convert the model again|convert it there)"):
                move()
            assert_same(fast(x), before)
        twin = copy.deepcopy(fast)
        twin.load_state_dict(fast.state_dict())
        assert_same(twin(x), before)
        twin.network.get_submodule("pointwise").values.zero_()
        twin.load_state_dict(twin.state_dict())
        assert not torch.equal(twin(x), before)
        assert_same(fast(x), before)
        layer = fast.network.get_submodule("pointwise")
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        read = torch.load(file, weights_only=False)
        x = images("fp16", 2, 16, 8, 8)
        assert_same(read(x), layer(x))


def test_calls_that_do_not_fit_are_named(only: Callable[[str], None]) -> None:
    only("direct")
    layer = converted("fp16").network.get_submodule("grouped")
    x = images("fp16", 1, 16, 8, 8)
    with torch.inference_mode():
        layer(x, x)
        with pytest.raises(TypeError, match="grouped computes in torch.float16, its input is torch.float32"):
            layer(x.float(), x)
        with pytest.raises(ValueError, match="grouped is on cuda:0, its input on cpu"):
            layer(x.cpu(), x)
        for residual in (x.cpu(), x.float(), x[:, :, 1:]):
            with pytest.raises(ValueError, match="grouped: "):
                layer(x, residual)
        assert_same(layer(x, x), layer(x.clone(), x))


def test_model_and_example_on_different_devices() -> None:
    with pytest.raises(ValueError, match="stem.0.weight is on cuda:0, the example on cpu; move one to the other"):
        escort.convert(pruned(Mixed()).cuda(), torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="stem.0.weight is on cpu, the example on cuda:0"):
        escort.convert(pruned(Mixed()), images("fp32"))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """This process may have 256 MiB more than it has."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_out_of_memory_names_the_remedy_and_the_next_call_works() -> None:
    model = on_gpu(pruned(Mixed()), "fp32")
    x = images("fp32", 64, 3, 256, 256)  # 48 MiB, and 64 MiB behind the first layer
    x = torch.cat([x, x])
    with pytest.raises(torch.OutOfMemoryError, match="out of memory.*; pass an example of a smaller batch"):
        escort.convert(model, x, precision="fp32")
    del x
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert_close(converted("fp32", model), model, images("fp32"), "fp32")


@TWO_GPUS
def test_the_other_gpu_as_the_current_one() -> None:
    fast, x = converted("fp32"), images("fp32")
    with torch.inference_mode():
        expected = fast(x)
        other = images("fp32", 3, 3, 50, 50)
        with torch.cuda.device(1):
            assert_same(fast(x), expected)
            laid_out_here = fast(other)
            assert laid_out_here.device == torch.device("cuda:0") and torch.cuda.current_device() == 1
            model = pruned(Mixed()).to("cuda:0")
            assert escort.convert(model, x, precision="fp32").plan.device == "cuda:0"
        assert_same(fast(other), laid_out_here)


@TWO_GPUS
def test_from_one_gpu_to_another(tmp_path: Path) -> None:
    fast, x = converted("fp16"), images("fp16")
    with torch.inference_mode():
        expected = fast(x)
        moved = copy.deepcopy(fast).to("cuda:1")
        assert_same(moved(x.to("cuda:1")).to("cuda:0"), expected)
        with pytest.raises(ValueError, match="stem.0 is on cuda:1, its input on cuda:0"):
            moved(x)
        assert_same(fast(x), expected)
        escort.save(moved, tmp_path / "model")
        loaded = escort.load(tmp_path / "model", device="cuda:1", remeasure=False)
        assert loaded.plan.device == "cuda:1"
        assert_same(loaded(x.to("cuda:1")).to("cuda:0"), expected)


def network() -> nn.Module:
    """What the command line converts, the same at every call."""
    torch.manual_seed(0)
    return pruned(Mixed())


def test_the_command_line(tmp_path: Path) -> None:
    def invoke(*args: object) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*(str(arg) for arg in args), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    model, name = tmp_path / "model.escort", "tests.test_network_gpu:network"
    report = invoke(
        "convert", name, "--input", "2,3,32,32", "--device", "cuda", "--precision", "fp16", "--output", model
    )
    assert (report["device"], report["precision"]) == ("cuda:0", "fp16")
    assert invoke("plan", model)["layers"].keys() == report["layers"].keys()
    x = torch.randn(5, 3, 32, 32)

    np.save(tmp_path / "x.npy", x.numpy())
    ran = invoke("run", model, tmp_path / "x.npy", "--output", tmp_path / "y.npz")
    assert ran["device"] == "cuda:0" and ran["inputs"] == 5
    with torch.inference_mode():
        expected = network()(x)
    with np.load(tmp_path / "y.npz", allow_pickle=False) as out:
        assert out["outputs"].dtype == np.float32
        assert reference.compare(torch.from_numpy(out["outputs"]), expected) < NETWORK_ERROR_BOUND["fp16"]
