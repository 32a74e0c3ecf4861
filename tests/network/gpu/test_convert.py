"""Whole models on a GPU: converted equals original in every precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import escort
from benchmarks.networks import NETWORKS
from escort import reference
from escort.layers import SparseConv2d
from escort.planner import timing
from escort.planner.machine import Machine
from escort.problem import Precision
from tests.network.gpu.networks import (
    BOTH,
    PRECISIONS,
    Branching,
    Mixed,
    assert_close,
    converted,
    in_formats,
    on_gpu,
    pruned,
    samples,
)

pytestmark = pytest.mark.gpu


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
        assert_close(fast, model, samples(precision, *shape), precision)
    base = samples(precision, 4, 33, 34, 3)
    for x in (
        base.permute(0, 3, 1, 2),
        samples(precision, 4, 3, 32, 32)[::2],
        samples(precision, 2, 3, 32, 64)[..., ::2],
    ):
        assert_close(fast, model, x, precision)
    assert_close(fast, model, samples(precision).contiguous(memory_format=torch.channels_last), precision)
    with torch.inference_mode():
        assert fast(samples(precision)[:0]).shape == (0, 10)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["direct", "cudnn"])
def test_activations_are_fused_and_right(precision: Precision, method: str, only: Callable[[str], None]) -> None:
    only(method)
    activations = (nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.LeakyReLU(0.1), nn.PReLU(16), nn.Tanh())
    convs = (nn.Conv2d(16 if i else 3, 16, 3, padding=1) for i in range(len(activations)))
    layers = (nn.Sequential(conv, activation) for conv, activation in zip(convs, activations, strict=True))
    model = on_gpu(pruned(nn.Sequential(*layers)), precision)
    fast = converted(precision, model)
    fused = [plan.problem.epilogue.activation for plan in fast.plan.layers.values()]
    assert fused == ["silu", "hardswish", "gelu", "leaky_relu", "prelu", "tanh"]
    for shape in ((2, 3, 32, 32), (3, 3, 9, 70)):
        assert_close(fast, model, samples(precision, *shape), precision)


@in_formats(("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resnet_18_is_the_same_network(precision: Precision) -> None:
    torch.manual_seed(0)
    model = on_gpu(pruned(NETWORKS["resnet18"].factory(num_classes=10), 0.9), precision)
    fast = escort.convert(model, samples(precision, 2, 3, 64, 64), precision=precision, effort=0.0)
    assert len(fast.plan.layers) == 20 and not fast.plan.skipped and not fast.plan.kept_dense
    assert fast.plan.timer == "graph" and fast.plan.machine == Machine.here("cuda:0") and fast.plan.samples is None
    for plan in fast.plan.layers.values():
        assert {candidate.method for candidate in plan.candidates} >= {"direct", "cudnn"}
        assert plan.time_us is not None and plan.dense_time_us is not None
    for shape in ((2, 3, 64, 64), (3, 3, 96, 64)):
        assert_close(fast, model, samples(precision, *shape), precision)


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
        x = samples(precision, *shape)
        assert_close(fast, model, x, precision)
        assert_close(fast, model, x.contiguous(memory_format=torch.channels_last), precision)
    lying = []
    for layer in fast.network.modules():
        if isinstance(layer, SparseConv2d):
            layer.register_forward_hook(
                lambda *called: lying.append(called[2].is_contiguous(memory_format=torch.channels_last))
            )
    with torch.inference_mode():
        fast(samples(precision))
        assert fast(samples(precision)[:0]).shape == (0, 10)
    assert lying and all(lying)


@BOTH
def test_a_model_in_channels_last_stays_right() -> None:
    model = on_gpu(pruned(Mixed()), "fp16").to(memory_format=torch.channels_last)
    x = samples("fp16").contiguous(memory_format=torch.channels_last)
    fast = escort.convert(model, x, effort="best")
    assert_close(fast, model, x, "fp16")


def test_what_cannot_be_captured_is_timed_by_events_and_converted_layer_by_layer() -> None:
    model = pruned(Branching()).cuda()
    fast = escort.convert(model, samples("fp32"), precision="fp32", effort="best")
    assert not fast.traced and fast.plan.timer == "events" and set(fast.plan.layers) == {"conv"}
    for x in (samples("fp32").abs(), -samples("fp32").abs()):
        assert_close(fast, model, x, "fp32")


def test_a_dense_network_is_kept_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        timing, "race_on_gpu", lambda runs, *_, **__: [timing.Timing(1.0 + i) for i, _ in enumerate(runs)]
    )
    fast = escort.convert(pruned(Mixed()).cuda(), samples("fp32"), precision="fp32", effort="best")
    assert fast.plan.kept_dense and not any(isinstance(module, SparseConv2d) for module in fast.modules())


def test_strict_float32_is_strict_whatever_torch_allows(
    monkeypatch: pytest.MonkeyPatch, only: Callable[[str], None]
) -> None:
    only("cudnn")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    conv = pruned(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), 0.5).cuda()
    x = samples("fp32", 4, 64, 28, 28)
    with pytest.warns(UserWarning, match="pass precision='tf32' to allow TF32"):
        strict = escort.convert(conv, x, effort="best")
    assert strict.plan.precision == "fp32"
    assert torch.backends.cudnn.allow_tf32
    loose = escort.convert(conv, x, precision="tf32", effort="best")
    with torch.inference_mode():
        expected = copy.deepcopy(conv).double()(x.double())
        assert reference.compare(strict(x), expected) < reference.ERROR_BOUND["fp32"]
        assert reference.compare(loose(x), expected) < reference.ERROR_BOUND["tf32"]


def test_model_and_example_on_different_devices() -> None:
    with pytest.raises(ValueError, match="stem.0.weight is on cuda:0, the example on cpu; move one to the other"):
        escort.convert(pruned(Mixed()).cuda(), torch.randn(2, 3, 32, 32), effort="best")
    with pytest.raises(ValueError, match="tensor stem.0.weight is on cpu, the example on cuda:0"):
        escort.convert(pruned(Mixed()), samples("fp32"), effort="best")


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
    x = samples("fp32", 64, 3, 256, 256)  # 48 MiB, and 64 MiB behind the first layer
    x = torch.cat([x, x])
    with pytest.raises(torch.OutOfMemoryError, match="out of memory.*; pass an example of a smaller batch"):
        escort.convert(model, x, precision="fp32", effort="best")
    del x
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert_close(converted("fp32", model), model, samples("fp32"), "fp32")
