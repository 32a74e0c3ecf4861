"""Images of bytes: the layer that normalises them, its kernel, and networks that begin with it."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import escort
from escort.cuda.compiler import KERNELS
from escort.cuda.params import pack
from escort.layers import Images, SparseConv2d
from escort.layers import images as layer_module
from escort.layers.images import Params
from escort.runtime.images import of_images
from escort.runtime.program import Program
from escort.runtime.saved.builders import build_layer, describe_layer
from tests.emulated import launch
from tests.host import struct_fields

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Images of bytes, the same each time."""
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W, 3) as torchvision's transforms normalise them, in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64, device=x.device) for values in (MEAN, STD))
    return ((x.double() / 255.0 - mean) / std).permute(0, 3, 1, 2)


class Net(nn.Module):
    """Pruned, with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)
        for conv in (self.stem, self.body):
            conv.weight.data *= torch.rand_like(conv.weight) < 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))
        return y


def network(**options: Any) -> nn.Module:
    return nn.Sequential(escort.Images(MEAN, STD, **options), Net()).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_normalised(channels_last: bool, dtype: torch.dtype) -> None:
    x = pixels(2, 9, 7, 3)
    layer = Images(MEAN, STD, channels_last=channels_last).to(dtype)
    y = layer(x if channels_last else x.permute(0, 3, 1, 2))
    assert y.dtype is dtype and y.shape == (2, 3, 9, 7)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), normalised(x), rtol=rounding, atol=1e-6)


def test_the_factors_keep_their_digits_in_16_bits() -> None:
    layer = Images(MEAN, STD)
    moved = copy.deepcopy(layer).half()
    assert torch.equal(moved.factors, layer.factors) and moved.frozen.dtype is torch.float16
    assert torch.equal(moved.float().factors, layer.factors)


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ((0.5,), (0.5, 0.5), "for each channel"),
        ((), (), "for each"),
        ((0.5,), (0.0,), "positive"),
        ((1.0,), (-1,), "positive"),
    ],
)
def test_what_makes_no_layer(mean: Any, std: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Images(mean, std)


def test_what_are_no_images() -> None:
    for mean in (0.5, "0.5", ["0.5"], torch.tensor(0.5), torch.ones(1, 1)):
        with pytest.raises(TypeError, match="mean is a list with a number for each channel, got .*; write it as"):
            Images(mean, [0.2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scale is a number that bytes are multiplied by, got '1'"):
        Images([0.5], [0.2], "1")  # type: ignore[arg-type]
    for scale in (0, -1.0):
        with pytest.raises(ValueError, match="deviations and the scale are positive"):
            Images([0.5], [0.2], scale)
    for row in (torch.tensor, np.array):
        torch.testing.assert_close(Images(row(MEAN), row(STD)).factors, Images(MEAN, STD).factors)
    layer = Images(MEAN, STD)
    with pytest.raises(TypeError, match="takes a tensor of images, got ndarray; use torch.from_numpy"):
        layer(torch.zeros(1, 4, 4, 3, dtype=torch.uint8).numpy())
    with pytest.raises(TypeError, match=r"takes images of torch.uint8, and normalises them; got torch.float32"):
        layer(torch.zeros(1, 4, 4, 3))
    for shape in ((1, 3, 4, 4), (4, 4, 3)):
        with pytest.raises(ValueError, match=r"takes images \(N, H, W, 3\), got shape"):
            layer(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"takes images \(N, 3, H, W\), got shape"):
        Images(MEAN, STD, channels_last=False)(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_network_of_bytes_converts_and_is_saved(channels_last: bool, tmp_path: Path) -> None:
    model, x = network(channels_last=channels_last), pixels(2, 16, 20, 3)
    given = x if channels_last else x.permute(0, 3, 1, 2).contiguous()
    fast = escort.convert(model, given, methods=["direct"])
    with torch.no_grad():
        torch.testing.assert_close(fast(given), model[1](normalised(x).float()), rtol=1e-4, atol=1e-5)
        assert fast.traced and fast.plan.not_saved is None
        escort.save(fast, tmp_path / "bytes.escort")
        loaded = escort.load(tmp_path / "bytes.escort")
        assert torch.equal(loaded(given), fast(given)) and loaded.plan.input_types == (torch.uint8,)
        with pytest.raises(TypeError, match=r"uint8"):
            loaded(given.float())


def test_in_16_bits_on_a_cpu() -> None:
    model, x = network().half(), pixels(2, 16, 20, 3)
    y = escort.convert(model, x, methods=["direct"])(x)
    assert y.dtype is torch.float16
    torch.testing.assert_close(y.float(), network()[1](normalised(x).float()), rtol=1e-2, atol=1e-2)


def test_the_layer_in_a_file() -> None:
    layer = Images(MEAN, STD, 1 / 128, False).eval()
    record = describe_layer(layer)
    twin = build_layer(record)
    assert (twin.mean, twin.std, twin.scale, twin.channels_last) == (MEAN, STD, 1 / 128, False)
    for name, value in (("mean", "x"), ("std", float("inf")), ("scale", float("nan")), ("channels_last", 1)):
        with pytest.raises((ValueError, TypeError)):
            build_layer({**record, "arguments": {**record["arguments"], name: value}})


# Where the first convolution normalises them


def converted_for_a_gpu() -> tuple[Program, SparseConv2d]:
    """A program of which the plan says that it runs on a GPU, and its first convolution."""
    fast = escort.convert(network(), pixels(2, 16, 20, 3), methods=["direct"])
    program, conv = fast.network, fast.network.get_submodule("1.stem")
    assert isinstance(program, Program) and isinstance(conv, SparseConv2d)
    conv.plan = replace(conv.plan, problem=replace(conv.plan.problem, device="cuda:0"))
    program._bound, program.native.enabled = None, False
    return program, conv


def test_the_first_convolution_takes_images_on_a_gpu_alone() -> None:
    program, conv = converted_for_a_gpu()
    ((number, given),) = of_images(program.listing, program).items()
    first = len(program.listing.inputs)
    targets = [program.listing.steps[i - first].target for i in (given, number)]
    assert targets == ["0", "1.stem"]
    conv.plan = replace(conv.plan, problem=replace(conv.plan.problem, device="cpu"))
    assert not of_images(program.listing, program)


def test_images_that_others_read_are_normalised_once() -> None:
    program, _ = converted_for_a_gpu()
    ((_, given),) = of_images(program.listing, program).items()
    listing, slot = program.listing, next(iter(program.listing.steps[1].args))
    assert slot.number == given
    assert not of_images(replace(listing, output=(listing.output, slot)), program)


def test_both_layers_run_where_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    program, conv = converted_for_a_gpu()
    x = pixels(2, 16, 20, 3)
    with torch.no_grad():
        expected = program(x)
        torch.testing.assert_close(expected, network()[1](normalised(x).float()), rtol=1e-4, atol=1e-5)
        # In the place of the kernel: what it is given, and how often.
        calls: list[torch.Size] = []

        def run(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
            calls.append(images.shape)
            assert factors is program.get_submodule("0").factors
            y: torch.Tensor = conv(program.get_submodule("0")(images))
            return y

        prepared = replace(
            conv.prepared((2, 3, 16, 20)), of_images=lambda channels_last: run if channels_last else None
        )
        monkeypatch.setattr(SparseConv2d, "prepared", lambda self, shape: prepared)
        assert torch.equal(program(x), expected) and not calls  # x is on the CPU
        monkeypatch.setattr(layer_module.Images, "is_taken", lambda self, x: x.dtype is torch.uint8 and not calls)
        assert torch.equal(program(x), expected) and calls == [x.shape]
        calls.clear()
        hook = conv.register_forward_hook(lambda *args: None)
        monkeypatch.setattr(layer_module.Images, "is_taken", lambda self, x: False)
        assert torch.equal(program(x), expected) and not calls
        hook.remove()


# The kernel


def test_the_struct_is_the_dataclass() -> None:
    in_c = struct_fields((KERNELS / "images.cu").read_text(), "Params")
    assert in_c == [(field.type, field.name) for field in fields(Params)]


@pytest.mark.parametrize(("height", "width"), [(7, 9), (8, 6), (1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_source_normalises(
    dtype: torch.dtype, channels_last: bool, height: int, width: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    x = pixels(3, height, width, 3)
    layer = Images(MEAN, STD, channels_last=channels_last).to(dtype)
    given = x if channels_last else x.permute(0, 3, 1, 2).contiguous()
    variant, grid, params = layer_module._launched(channels_last, given.shape, dtype)
    y = torch.full((3, 3, height, width), torch.nan, dtype=dtype)
    launch(variant, grid, 256, (given, y, layer.factors, pack(params)), tmp_path_factory.getbasetemp())
    torch.testing.assert_close(y.double(), normalised(x), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_without_a_compiler_torch_normalises(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **named: Any) -> Any:
        raise ImportError("no compiler")

    monkeypatch.setattr(layer_module.Images, "is_taken", lambda self, images: True)
    monkeypatch.setattr(layer_module, "check_not_capturing", lambda device: None)
    monkeypatch.setattr(layer_module.kernel, "kernel", absent)
    x = pixels(2, 11, 13, 3)
    try:
        torch.testing.assert_close(Images(MEAN, STD)(x).double(), normalised(x), rtol=1e-5, atol=1e-6)
    finally:
        layer_module._runner.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_on_the_gpu(dtype: torch.dtype, channels_last: bool) -> None:
    layer = Images(MEAN, STD, channels_last=channels_last).to("cuda:0", dtype)
    for shape in ((2, 33, 47, 3), (1, 224, 224, 3), (5, 1, 2, 3)):
        x = pixels(*shape, device="cuda:0")
        y = layer(x if channels_last else x.permute(0, 3, 1, 2).contiguous())
        assert y.is_contiguous() and y.dtype is dtype
        torch.testing.assert_close(y.double(), normalised(x), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_of_bytes_on_the_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    """By all methods and by the stem's, whose first convolution takes the bytes; replayed and step by step."""
    model, x = network().to("cuda:0", dtype), pixels(8, 64, 64, 3, device="cuda:0")
    precision: Any = {torch.float32: "tf32", torch.float16: "fp16"}[dtype]
    with torch.inference_mode():
        expected = copy.deepcopy(model[1]).double()(normalised(x))
        for methods in (None, ["stem", "sparse_tc"]):
            fast = escort.convert(model, x, precision=precision, methods=methods)
            for _ in range(4):
                torch.testing.assert_close(fast(x).double(), expected, rtol=2e-2, atol=2e-2)
            assert fast.plan.not_captured is None
        escort.save(fast, tmp_path / "bytes.escort")
        loaded = escort.load(tmp_path / "bytes.escort")
        torch.testing.assert_close(loaded(x[:3]).double(), expected[:3], rtol=2e-2, atol=2e-2)
