"""Whole models: converted equals original, for every network, and what cannot be converted says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

import escort
from benchmarks.networks import NETWORKS
from escort import methods, prune, reference
from escort.filter import SparseFilter
from escort.layers import MaxPool2d, SparseConv2d
from escort.methods import Prepared
from escort.methods.cpu.dense import Dense, DenseConfig
from escort.network.convert import (
    NETWORK_ERROR_BOUND,
    ConvertedModel,
    NetworkPlan,
    _dense_in,
    _race,
    _settle_precision,
    _tf32_is_allowed,
    replan,
)
from escort.planner import cores, measure, planner
from escort.planner import timing as bench
from escort.planner.timing import Timing
from escort.problem import Problem

#: The smallest input that each network takes, so that the tests stay fast.
SIZES = {"googlenet": 64, "caffenet": 227, "alexnet": 127}


class Small(nn.Module):
    """Batch norm, ReLU6, a residual, a pool by module and one by function, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu6(self.norm(self.first(x))), 3, stride=2, padding=1)
        x = self.pool(F.relu(self.second(x) + x))
        return self.head(F.dropout(x.mean((2, 3)), training=self.training))


class Branching(nn.Module):
    """Control flow on data, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(self.other(x)[:, :3])


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks need not win on a busy machine: the first contestant, the original, always loses."""
    race = bench.race

    def ordered(runs: Any, **options: Any) -> list[float]:
        times = race(runs, **{**options, "rounds": 1})
        return [2 * max(times), *times[1:]]

    monkeypatch.setattr(bench, "race", ordered)


def pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    prune.uniform(model, sparsity)
    prune.make_permanent(model)
    return model.eval()


def converted(model: nn.Module, *example: torch.Tensor) -> ConvertedModel:
    return escort.convert(model, example)


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_the_same_network(name: str) -> None:
    torch.manual_seed(0)
    model = pruned(NETWORKS[name].factory(num_classes=10), 0.9)
    size = SIZES.get(name, 32)
    fast = converted(model, torch.randn(1, 3, size, size))
    assert fast.traced and not fast.plan.kept_dense
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(fast.plan.layers) == len(convolutions) and not fast.plan.skipped
    assert not any(isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) for m in fast.modules())
    for batch, other in ((1, size), (3, size), (2, size + 32)):
        x = torch.randn(batch, 3, other, other)
        try:
            with torch.no_grad():
                expected, out = model(x), fast(x)
        except RuntimeError:  # its classifier takes one input size only
            continue
        assert reference.compare(out, expected) < NETWORK_ERROR_BOUND["fp32"]


@pytest.mark.usefixtures("always_faster")
def test_what_is_fused_and_swapped() -> None:
    model = pruned(Small())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 17, 18)
    fast = converted(model, x)
    first, second = fast.network.get_submodule("first"), fast.network.get_submodule("second")
    assert isinstance(first, SparseConv2d) and isinstance(second, SparseConv2d)
    assert (first.activation, first.residual) == ("relu6", False)
    assert (second.activation, second.residual) == ("relu", True)
    assert first.name == "first" and first.plan is fast.plan.layers["first"]
    assert sum(isinstance(m, MaxPool2d) for m in fast.modules()) == 2
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("always_faster")
def test_an_untraceable_model_is_converted_layer_by_layer() -> None:
    model = pruned(Branching())
    fast = converted(model, torch.rand(1, 3, 8, 8))
    assert not fast.traced and set(fast.plan.layers) == {"conv"}
    assert "other" not in fast.plan.layers
    for x in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)):
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
    with torch.no_grad():
        skipped = converted(model, -torch.rand(1, 3, 8, 8)).plan.skipped
    assert "reflect" in skipped["other"]


@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_compiles_and_exports() -> None:
    fast = converted(pruned(Small()), torch.randn(2, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x), atol=1e-6)
    program = torch.export.export(fast, (x,))
    assert torch.allclose(program.module()(x), fast(x), atol=1e-6)


@pytest.mark.usefixtures("always_faster")
def test_an_exported_program_can_be_converted() -> None:
    model = pruned(Small())
    x = torch.randn(2, 3, 16, 16)
    fast = converted(torch.export.export(model, (x,)).module(), x)
    assert len(fast.plan.layers) == 2
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_a_slower_network_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Small())
    monkeypatch.setattr(bench, "race", lambda runs, **_: [float(i + 1) for i in range(len(runs))])
    fast = converted(model, torch.randn(1, 3, 8, 8))
    assert fast.plan.kept_dense and fast.plan.speedup == 1.0
    assert fast.plan.reason is not None and "the original is kept" in fast.plan.reason
    assert not any(isinstance(module, SparseConv2d) for module in fast.modules())
    assert all(a is not b for a, b in zip(fast.parameters(), model.parameters(), strict=True))


@pytest.mark.usefixtures("always_faster")
def test_the_plan_survives_json() -> None:
    plan = converted(pruned(Small()), torch.randn(1, 3, 8, 8)).plan
    assert NetworkPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert (plan.precision, plan.device, plan.timer, plan.input_dtypes) == ("fp32", "cpu", "calls", ("float32",))
    with pytest.raises(ValueError, match="not a network plan"):
        NetworkPlan.from_json({"layers": 1})


@pytest.mark.usefixtures("always_faster")
def test_replanning_measures_again_and_computes_the_same() -> None:
    x = torch.randn(1, 3, 8, 8)
    fast = converted(pruned(Small()), x)
    planner._remembered.clear()
    again = replan(fast)
    assert set(again.plan.layers) == set(fast.plan.layers)
    assert again.plan.layers["first"] is not fast.plan.layers["first"]
    assert torch.allclose(again(x), fast(x), atol=1e-5)


@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_does_not_train() -> None:
    fast = converted(pruned(Small()), torch.randn(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="for inference"):
        fast.train()
    assert fast.eval() is fast


@pytest.mark.usefixtures("always_faster")
def test_what_a_converted_model_refuses_has_changed_nothing() -> None:
    x = torch.randn(1, 3, 8, 8)
    fast = converted(pruned(Small()), x)
    before = fast(x)
    for move, error in ((fast.half, TypeError), (fast.double, TypeError), (lambda: fast.to("meta"), ValueError)):
        with pytest.raises(error, match="first .*(convert the model again|convert it there)"):
            move()
        assert torch.equal(fast(x), before)
    assert fast.to("cpu", torch.float32) is fast


def test_running_out_of_memory_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    example_inputs = bench.example_inputs

    def draw(problem: Problem) -> Any:
        if problem.epilogue.residual:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 4 bytes free.")
        return example_inputs(problem)

    planner._remembered.clear()
    monkeypatch.setattr(bench, "example_inputs", draw)
    with pytest.raises(torch.OutOfMemoryError, match="^layer second: .* allocate 20.00 GiB; .*smaller batch$"):
        converted(pruned(Small()), torch.randn(1, 3, 8, 8))
    monkeypatch.undo()
    assert set(converted(pruned(Small()), torch.randn(1, 3, 8, 8)).plan.layers) == {"first", "second"}


class Compiled(Dense):
    """A method that takes ten seconds of all cores to compile each of its two configs."""

    name = "compiled"
    is_dense = False
    compiles_per_filter = True

    def __init__(self) -> None:
        self.prepared: list[str] = []

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: DenseConfig) -> float:
        return 10.0 * cores.count()

    def prepare(
        self, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, config: DenseConfig
    ) -> Prepared:
        self.prepared.append(config.memory_format)
        return super().prepare(problem, sparse_filter, bias, config)


def three_convolutions() -> nn.Module:
    """The second is like the first."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(2)), nn.Conv2d(4, 4, 3)).eval()


@pytest.mark.usefixtures("always_faster")
def test_kernels_are_compiled_within_a_budget_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, told = Compiled(), list[str]()
    monkeypatch.setattr(methods, "METHODS", (compiled, Dense()))
    monkeypatch.setattr(measure, "_HOPELESS", float("inf"))
    # Of the candidates of a layer, the method that compiles wins.
    monkeypatch.setattr(
        measure,
        "_race",
        lambda problem, contenders, *_: [
            replace(c.candidate, time_us=1.0 if c.candidate.method == "compiled" else 2.0) for c in contenders
        ],
    )
    monkeypatch.setattr(Progress, "update", lambda bar, task, description: told.append(description))
    x = torch.randn(1, 4, 8, 8)
    # Shares of 25 s, 27.5 s and 45 s: both configs, the choice alone, both configs.
    fast = escort.convert(three_convolutions(), x, compile_budget_s=75.0, progress=True)
    assert [plan.method for plan in fast.plan.layers.values()] == ["compiled"] * 3
    assert fast.plan.layers["1"] is fast.plan.layers["0"]
    # Four candidates are compiled before any is timed, then what the layers run.
    assert len(compiled.prepared) == 4 + 3
    planning = [f"planning, preparing {done} of 4 kernels" for done in range(4)] + ["planning"]
    assert told == [*planning, *(f"planning, preparing {done} of 3 kernels" for done in range(3)), "planning"]
    # Now only the first config fits a share: 15 s, 20 s.
    planner._remembered.clear()
    again = replan(fast, compile_budget_s=45.0)
    assert again.plan.layers["0"].method == "compiled"
    left_out = [c.reason for c in again.plan.layers["0"].candidates if c.reason]
    assert len(left_out) == 1 and "takes about 10 s" in left_out[0] and "more than the 5 s left" in left_out[0]
    compiled.prepared.clear()
    without = replan(fast, compile_budget_s=0.0)
    assert {plan.method for plan in without.plan.layers.values()} == {"dense"} and not compiled.prepared
    with torch.no_grad():
        assert torch.allclose(without(x), fast(x), atol=1e-5)


def test_a_compile_budget_is_a_number_of_seconds() -> None:
    with pytest.raises(ValueError, match="compile_budget_s is a number of seconds, .* got -1"):
        escort.convert(three_convolutions(), torch.randn(1, 4, 8, 8), compile_budget_s=-1)


def test_a_precision_is_that_of_the_weights_or_tf32() -> None:
    gpu = torch.device("cuda:0")
    for dtype, precision in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        assert _settle_precision(one_conv(dtype=dtype), gpu, precision) == precision
    assert _settle_precision(one_conv(), gpu, "tf32") == "tf32"
    assert _settle_precision(one_conv(dtype=torch.float16), gpu, None) == "fp16"
    for model, asked in ((one_conv(), "fp16"), (one_conv(dtype=torch.float16), "tf32")):
        with pytest.raises(
            ValueError, match=rf"precision '{asked}' is for weights of .* first call model.to\(torch.float"
        ):
            _settle_precision(model, gpu, asked)


def test_strict_float32_where_torch_would_use_tf32_is_said(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.warns(UserWarning, match="strict float32: pass precision='tf32'"):
        assert _settle_precision(one_conv(), gpu, None) == "fp32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert _settle_precision(one_conv(), gpu, None) == "fp32"
    assert _settle_precision(one_conv(), torch.device("cpu"), None) == "fp32"
    assert not recwarn.list


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_switched_for_as_long_as_it_is_needed(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", before)
    for precision, allowed in (("tf32", True), ("fp32", False)):
        with pytest.raises(KeyboardInterrupt), _dense_in(precision, torch.device("cuda:0")):
            assert _tf32_is_allowed() == allowed
            raise KeyboardInterrupt
        assert cudnn.allow_tf32 == before
        with _dense_in(precision, torch.device("cpu")):
            assert cudnn.allow_tf32 == before


def test_whole_networks_are_all_timed_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def race(runs: Any, device: Any, *, capture: bool = True, **_: Any) -> list[Timing]:
        asked.append(capture)
        return [Timing(3.0 if capture else 5.0, "graph" if capture and run is able else "events") for run in runs]

    monkeypatch.setattr(bench, "race_on_gpu", race)
    able, unable = lambda: None, lambda: None
    gpu = torch.device("cuda:0")
    assert _race([able, able], gpu) == ([3.0, 3.0], "graph") and asked == [True]
    assert _race([able, unable], gpu) == ([5.0, 5.0], "events") and asked == [True, True, False]
    monkeypatch.setattr(bench, "race_on_gpu", lambda *_, **__: [Timing(None, reason="out of device memory: 2 GiB")])
    with pytest.raises(RuntimeError, match="cannot be timed: out of device memory: 2 GiB; pass .*smaller batch"):
        _race([able], gpu)


def one_conv(kernel: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, kernel, dtype=dtype)).eval()


class Overflow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("inf")


def with_nan(model: nn.Module) -> nn.Module:
    model.second.weight.data[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
    return model


@pytest.mark.parametrize(
    ("model", "example", "error", "says"),
    [
        (lambda: Small().train(), torch.randn(1, 3, 8, 8), ValueError, r"training mode; call model.eval\(\)"),
        (lambda: pruned(Small()), [1, 2], TypeError, "tensor or a tuple of tensors"),
        (lambda: pruned(Small()), (), TypeError, "tensor or a tuple of tensors"),
        (lambda: pruned(Small()), torch.randn(1, 3, 8, 8, device="meta"), ValueError, "is on cpu, the example on meta"),
        (lambda: with_nan(pruned(Small())), torch.randn(1, 3, 8, 8), ValueError, "second.weight holds NaN"),
        (lambda: nn.Linear(3, 4).eval(), torch.randn(1, 3), ValueError, "no 2-d convolution"),
        (lambda: "resnet50", torch.randn(1, 3), TypeError, "takes an nn.Module, got str"),
        (lambda: pruned(Small()), torch.randn(1, 4, 8, 8), ValueError, "example .*does not run.*channels"),
        (lambda: pruned(Small()), torch.randint(5, (1, 3, 8, 8)), ValueError, "example .*does not run"),
        (lambda: one_conv(kernel=5), torch.randn(1, 3, 4, 4), ValueError, "example .*does not run"),
        (lambda: pruned(Small()).double(), torch.randn(1, 3, 8, 8).double(), ValueError, "first: .*float64.*float32"),
        (
            lambda: one_conv(dtype=torch.complex64),
            torch.randn(1, 3, 8, 8) + 0j,
            ValueError,
            "layer 0: .*complex64.*float32",
        ),
        (
            lambda: one_conv(dtype=torch.float16),
            torch.randn(1, 3, 8, 8).half(),
            ValueError,
            r"layer 0: weights of torch.float16, and the CPU computes in float32; .*\.float\(\), or move it to a GPU",
        ),
        (
            lambda: nn.Sequential(one_conv(), one_conv(dtype=torch.bfloat16)).eval(),
            torch.randn(1, 3, 8, 8),
            ValueError,
            "layer 1.0: weights of torch.bfloat16 among others of torch.float32",
        ),
        (
            lambda: pruned(Small()),
            (torch.randn(1, 3, 8, 8), torch.randn(1, device="meta")),
            ValueError,
            "the example is on cpu and on meta",
        ),
        (
            lambda: nn.Sequential(one_conv(), Overflow()).eval(),
            torch.randn(1, 3, 8, 8),
            ValueError,
            "output .*NaN or infinity",
        ),
    ],
)
def test_bad_input_is_named(model: Callable[[], Any], example: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        escort.convert(model(), example)


@pytest.mark.parametrize(
    ("precision", "says"),
    [
        ("fp16", "precision 'fp16' is for weights of torch.float16"),
        ("tf32", "for NVIDIA GPUs, the model is on the CPU; leave it out"),
        ("float32", "precision is one of .*'tf32'.* got 'float32'"),
    ],
)
def test_bad_precisions_are_named(precision: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8), precision=precision)


def test_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast is on.* outside of it"):
        escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8))
