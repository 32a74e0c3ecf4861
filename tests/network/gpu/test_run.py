"""Converted models on a GPU, wherever and however they are called: streams, captures, compilers, other GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import escort
from escort.layers.operator import sparse_conv2d
from escort.problem import Precision
from tests.network.gpu.networks import (
    BOTH,
    TWO_GPUS,
    Mixed,
    assert_same,
    converted,
    each,
    in_formats,
    pruned,
    samples,
)

pytestmark = pytest.mark.gpu


def test_another_stream() -> None:
    fast, stream = converted("fp32"), torch.cuda.Stream()
    x = samples("fp32", 4, 3, 40, 40)  # a size that is laid out on the stream
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
    fast, x = converted(precision), samples(precision)
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
            x.copy_(samples(precision))
            graph.replay()
            assert_same(y, fast(x.clone()))


def test_what_was_not_laid_out_before_a_capture_says_so() -> None:
    fast = converted("fp32")
    layer = fast.network.get_submodule("grouped")
    x = samples("fp32", 1, 16, 21, 23)
    with torch.inference_mode():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
            with pytest.raises(RuntimeError, match="grouped: a CUDA graph cannot be captured from the first"):
                layer(x, x)
        layer(x, x)


@BOTH
def test_compiled_and_exported(tmp_path: Path) -> None:
    fast, x = converted("fp16"), samples("fp16")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fast(x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x), expected)
        torch.export.save(torch.export.export(fast, (x,)), tmp_path / "network.pt2")
        program = torch.export.load(tmp_path / "network.pt2").module()
        assert_same(program(x), expected)


def test_compiled_with_graphs_of_its_own() -> None:
    layer, x = converted("fp32").network.get_submodule("pointwise"), samples("fp32", 2, 16, 19, 17)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # run, record, replay
            x.normal_()
            assert_same(compiled(x), layer(x))


@each("fp32", "bf16")
def test_the_operator_passes_torchs_own_checks(precision: Precision) -> None:
    layer = converted(precision).network.get_submodule("grouped")
    x = samples(precision, 2, 16, 8, 8)
    arrays = layer.values, layer.columns, layer.indptr, layer.bias, layer._spec
    torch.library.opcheck(sparse_conv2d, (x, x, *arrays))
    with pytest.raises(ValueError, match="on the filter's device, cpu, got .* on cuda:0"):
        sparse_conv2d(x, x, *(array.cpu() for array in arrays[:3]), *arrays[3:])


def test_calls_that_do_not_fit_are_named(only: Callable[[str], None]) -> None:
    only("direct")
    layer = converted("fp16").network.get_submodule("grouped")
    x = samples("fp16", 1, 16, 8, 8)
    with torch.inference_mode():
        layer(x, x)
        with pytest.raises(TypeError, match="layer grouped computes in torch.float16, its input is torch.float32"):
            layer(x.float(), x)
        with pytest.raises(ValueError, match="grouped is on cuda:0, its input on cpu"):
            layer(x.cpu(), x)
        for residual in (x.cpu(), x.float(), x[:, :, 1:]):
            with pytest.raises(ValueError, match="grouped: "):
                layer(x, residual)
        assert_same(layer(x, x), layer(x.clone(), x))


@TWO_GPUS
def test_the_other_gpu_as_the_current_one() -> None:
    fast, x = converted("fp32"), samples("fp32")
    with torch.inference_mode():
        expected = fast(x)
        other = samples("fp32", 3, 3, 50, 50)
        with torch.cuda.device(1):
            assert_same(fast(x), expected)
            laid_out_here = fast(other)
            assert laid_out_here.device == torch.device("cuda:0") and torch.cuda.current_device() == 1
            model = pruned(Mixed()).to("cuda:0")
            assert escort.convert(model, x, precision="fp32", effort="best").plan.device == "cuda:0"
        assert_same(fast(other), laid_out_here)
