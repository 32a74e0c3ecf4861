"""What convert refuses says why, and which precision and effort it settles on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import escort
from escort.network.check import EFFORT_S, settle_effort, settle_methods, settle_precision
from escort.network.context import dense_in, tf32_is_allowed
from tests.network.models import Small, one_conv, pruned, three_convolutions


def test_a_precision_is_that_of_the_weights_or_tf32() -> None:
    gpu = torch.device("cuda:0")
    for dtype, precision in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        assert settle_precision(one_conv(dtype=dtype), gpu, precision) == (precision, None)
    assert settle_precision(one_conv(), gpu, "tf32") == ("tf32", None)
    assert settle_precision(one_conv(dtype=torch.float16), gpu, None) == ("fp16", None)
    for model, precision in ((one_conv(), "fp16"), (one_conv(dtype=torch.float16), "tf32")):
        with pytest.raises(
            ValueError, match=rf"precision '{precision}' is for weights of .* first call model.to\(torch.float"
        ):
            settle_precision(model, gpu, precision)


def test_strict_float32_where_torch_would_use_tf32_is_said(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.warns(UserWarning, match="strict float32: pass precision='tf32'"):
        assert settle_precision(one_conv(), gpu, None) == ("fp32", None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert settle_precision(one_conv(), gpu, None) == ("fp32", None)
    assert settle_precision(one_conv(), torch.device("cpu"), None) == ("fp32", None)
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cpu_computes_in_float32_what_is_of_16_bits(dtype: torch.dtype) -> None:
    cpu, names = torch.device("cpu"), ("fp16", "bf16", "tf32")
    assert settle_precision(one_conv(dtype=dtype), cpu, None) == ("fp32", dtype)
    assert settle_precision(one_conv(dtype=dtype), cpu, "fp32") == ("fp32", dtype)
    for precision in names:
        with pytest.raises(
            ValueError, match=f"precision '{precision}' is for NVIDIA GPUs, .* in float32; leave it out"
        ):
            settle_precision(one_conv(dtype=dtype), cpu, precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_switched_for_as_long_as_it_is_needed(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", before)
    for precision, allowed in (("tf32", True), ("fp32", False)):
        with pytest.raises(KeyboardInterrupt), dense_in(precision, torch.device("cuda:0")):
            assert tf32_is_allowed() == allowed
            raise KeyboardInterrupt
        assert cudnn.allow_tf32 == before
        with dense_in(precision, torch.device("cpu")):
            assert cudnn.allow_tf32 == before


class Logarithm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()


def with_sparse_tensor(model: nn.Module) -> nn.Module:
    model.register_buffer("held", torch.eye(2).to_sparse())
    return model


def with_nan(model: nn.Module) -> nn.Module:
    model.second.weight.data[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
    return model


@pytest.mark.parametrize(
    ("model", "example", "error", "says"),
    [
        (lambda: Small().train(), torch.randn(1, 3, 8, 8), ValueError, r"training mode; call model.eval\(\)"),
        (
            lambda: pruned(Small()),
            [1, 2],
            TypeError,
            r"a tensor or a tuple of its arguments; there is no tensor in \[1, 2\]; pass torch.randn\(1, 2\)",
        ),
        (lambda: pruned(Small()), (), TypeError, "a tensor or a tuple of its arguments"),
        (lambda: pruned(Small()), (1, 3, 8, 8), TypeError, r"in \(1, 3, 8, 8\); pass torch.randn\(1, 3, 8, 8\)"),
        (
            lambda: pruned(Small()),
            np.zeros((1, 3, 8, 8)),
            TypeError,
            "no tensor in array.*; pass torch.as_tensor of it",
        ),
        (lambda: pruned(Small()), None, TypeError, r"in None; pass such inputs .* torch.randn\(1, 3, 224, 224\)"),
        (lambda: Small, torch.randn(1, 3, 8, 8), TypeError, "an nn.Module, got type; pass what it returns"),
        (lambda: Small().state_dict(), torch.randn(1, 3, 8, 8), TypeError, "got OrderedDict; .* by load_state_dict"),
        (lambda: "model.escort", torch.randn(1, 3, 8, 8), TypeError, "got str; .* comes from escort.load"),
        (
            lambda: pruned(Small()).to("meta"),
            torch.randn(1, 3, 8, 8, device="meta"),
            ValueError,
            r"on the CPU and on NVIDIA GPUs; move the model from meta with .cpu\(\)",
        ),
        (
            lambda: pruned(Small()),
            [torch.randn(1, 3, 8, 8)],
            ValueError,
            r"example \[\(1, 3, 8, 8\)\] does not run",
        ),
        (
            lambda: pruned(Small()),
            torch.randn(1, 3, 8, 8, device="meta"),
            ValueError,
            "tensor .* is on cpu, the example on meta",
        ),
        (
            lambda: with_sparse_tensor(pruned(Small())),
            torch.randn(1, 3, 8, 8),
            ValueError,
            "tensor held has the layout",
        ),
        (lambda: with_nan(pruned(Small())), torch.randn(1, 3, 8, 8), ValueError, "layer second: its weight holds NaN"),
        (
            lambda: pruned(Small()),
            torch.randn(0, 3, 8, 8),
            ValueError,
            r"example of shape \(0, 3, 8, 8\) holds nothing",
        ),
        (
            lambda: pruned(Small()),
            torch.randn(1, 3, 8, 8).masked_fill(torch.arange(8) == 5, torch.inf),
            ValueError,
            r"example of shape \(1, 3, 8, 8\) holds NaN or infinity, .* pass finite numbers",
        ),
        (
            lambda: nn.Sequential(one_conv(), nn.Hardtanh(-1.0, -0.5), Logarithm()).eval(),
            torch.randn(1, 3, 8, 8),
            ValueError,
            r"no finite number, in outputs of shape \(1, 4, 6, 6\)",
        ),
        (lambda: nn.Linear(3, 4).eval(), torch.randn(1, 3), ValueError, "no 2-d convolution"),
        (lambda: "resnet50", torch.randn(1, 3), TypeError, "takes an nn.Module, got str"),
        (lambda: pruned(Small()), torch.randn(1, 4, 8, 8), ValueError, "example .*does not run.*channels"),
        (lambda: pruned(Small()), torch.randint(5, (1, 3, 8, 8)), ValueError, "example .*does not run"),
        (lambda: one_conv(kernel_size=5), torch.randn(1, 3, 4, 4), ValueError, "example .*does not run"),
        (lambda: pruned(Small()).double(), torch.randn(1, 3, 8, 8).double(), ValueError, "first: .*float64.*float32"),
        (
            lambda: one_conv(dtype=torch.complex64),
            torch.randn(1, 3, 8, 8) + 0j,
            ValueError,
            "layer 0: .*complex64.*float32",
        ),
        (
            lambda: nn.Conv2d(3, 4, 3, dtype=torch.float64).eval(),
            torch.randn(1, 3, 8, 8).double(),
            ValueError,
            r"^the model: weights of torch.float64; convert the model to float32 with .float\(\)",
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


@pytest.mark.parametrize("effort", [-1, float("nan"), "slow", True, None])
def test_an_effort_has_a_name_or_is_a_number_of_seconds(effort: Any) -> None:
    with pytest.raises(ValueError, match=f"effort is 'fast', .* 'best', .* or a number of seconds, got {effort!r}"):
        escort.convert(three_convolutions(), torch.randn(1, 4, 8, 8), effort=effort)


def test_what_efforts_mean() -> None:
    assert [settle_effort(effort) for effort in ("fast", 0, 12.5, "best")] == [0.0, 0.0, 12.5, EFFORT_S["best"]]


def test_the_dense_method_can_always_be_chosen() -> None:
    def names(*methods: str, device: str = "cpu") -> list[str]:
        return [method.name for method in settle_methods(methods, torch.device(device)) or ()]

    assert settle_methods(None, torch.device("cpu")) is None
    assert names() == ["dense"] and names("direct") == ["dense", "direct"] and names("dense") == ["dense"]
    assert names("sparse_tc", device="cuda:0") == ["cudnn", "sparse_tc"]


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (
            ["direct", "cudnn"],
            ValueError,
            "no method 'cudnn' on cpu; there are direct, depthwise, linear, dense, lowered",
        ),
        ("direct", TypeError, r"methods is a list of names, got 'direct'; write \['direct'\]"),
    ],
)
def test_unknown_methods_are_named(names: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8), methods=names)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ([torch.ones(1)], "example_kwargs holds arguments by name, got list"),
        ({1: torch.ones(1)}, "example_kwargs holds arguments by name"),
    ],
)
def test_bad_examples_by_name_are_named(kwargs: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8), kwargs)


def test_an_argument_that_the_model_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="example .*does not run.*'mask'"):
        escort.convert(pruned(Small()), torch.randn(1, 3, 8, 8), {"mask": torch.ones(1)})
