"""Convolutions with a forward of their own: recognised by what they compute, whatever they are called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from escort.layers import SamePad
from escort.network.check import Request
from tests.network.rewritten import ON_CPU, Rewritten, converted, settled


class Same(nn.Conv2d):
    """As image models in PyTorch write TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        geometry = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        rows, columns = (max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in geometry)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class SameRow(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        reach = (self.kernel_size[0] - 1) * self.dilation[0]
        total = max(reach - (len(x[0, 0]) - 1) % self.stride[0], 0)
        return super().forward(F.pad(x, (total // 2, total - total // 2)))


class Checked(nn.Conv2d):
    """Computes what its parent does, behind control flow that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1000:
            raise ValueError("too many")
        return super().forward(x)


class Standardised(Same):
    def forward(self, x: Tensor) -> Tensor:
        assert len(x.shape) == 4 and (x.shape[0] > 0 or x.shape[0] == 0)
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.var((1, 2, 3), keepdim=True) + 1e-6).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Clamped(nn.Conv2d):
    """Computes what its parent does on small inputs and weights only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-50, 50)) if len(x) else super().forward(x)


class Extra(Same):
    """Pads at the top and left."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (
            (k - 1) - (n - 1) % s for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        )
        x = F.pad(x, (max(columns, 0), 0, max(rows, 0), 0))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@st.composite
def sames(draw: st.DrawFn) -> tuple[Any, list[int]]:
    axes, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    sizes, strides, dilations = ([draw(st.integers(1, most)) for _ in range(axes)] for most in (5, 3, 2))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    conv: Any = (SameRow, Same)[axes - 1](*channels, sizes, strides, 0, dilations, groups, bias=draw(st.booleans()))
    return conv, [draw(st.integers(1, 9)) for _ in range(axes)]


@given(sames(), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_same_padding_of_any_geometry(problem: tuple[Any, list[int]], batch: int) -> None:
    conv, size = problem
    model = settled(nn.Sequential(conv, nn.ReLU()), density=0.5)
    shapes = [(n, [side + added for side in size]) for n, added in ((batch, 0), (3, 1), (1, 2), (2, 3))]
    x, *others = (torch.randn(n, conv.in_channels, *sizes) for n, sizes in shapes)
    result = Rewritten(model, x, *others)
    assert set(result.convs) == {"0"} and result.convs["0"].activation == "relu" and not result.skipped


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation", "padding", "pads"),
    [(3, 1, 1, (1, 1), False), (2, 1, 1, "same", False), (1, 2, 1, (0, 0), False), (3, 2, 1, (0, 0), True)],
)
def test_zeros_are_added_by_the_convolution_where_their_number_is_fixed(
    kernel_size: int, stride: int, dilation: int, padding: Any, pads: bool
) -> None:
    model = settled(nn.Sequential(Same(3, 4, kernel_size, stride, dilation=dilation)))
    result = Rewritten(model, torch.randn(2, 3, 9, 8))
    assert result.convs["0"].conv.padding == padding
    assert any(isinstance(module, SamePad) for module in result.network.modules()) is pads


def test_a_network_of_them() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = Same(3, 3, 3, 2), Checked(3, 4, 3, padding=1, padding_mode="reflect")
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.other(self.conv(x=x) + self.norm(self.conv(x))))

    result = Rewritten(settled(Branches(), 0.7), torch.randn(2, 3, 9, 8), torch.randn(1, 3, 6, 6))
    assert set(result.convs) == {"conv", "conv_1", "other"} and not result.skipped


@pytest.mark.parametrize("conv", [Checked(3, 4, 3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")])
def test_an_input_without_samples_is_left_to_torch(conv: nn.Module) -> None:
    result = Rewritten(settled(nn.Sequential(conv, nn.ReLU())), torch.randn(3, 9, 8), torch.randn(3, 6, 6))
    assert not result.convs and "add a batch dimension" in result.skipped["0"]


def test_one_as_the_whole_model() -> None:
    result = Rewritten(settled(Same(3, 4, 3, 2)), torch.randn(2, 3, 9, 8), torch.randn(1, 3, 6, 6))
    assert set(result.convs) == {"conv"}


def test_what_a_model_asserts_about_dimensions_keeps_no_norm_from_fusing() -> None:
    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = Same(3, 4, 3, 2), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            torch._assert(x.ndim == 4, "four dimensions")
            torch._assert(x.dim() > 3, "four dimensions")
            return F.relu(self.norm(x))

    result = Rewritten(settled(Asserting()), torch.randn(2, 3, 9, 8), torch.randn(1, 3, 6, 6))
    assert result.convs["conv"].activation == "relu" and result.rest == ["SamePad"]


def a_mask(conv: Any) -> Any:
    conv.mask = nn.Parameter(torch.ones(4, 3, 3, 3))
    return conv


class Masked(nn.Conv2d):
    """Computes what its parent does as long as its mask is as it was made."""

    mask: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) < 1000
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (Standardised(3, 4, 3), "Standardised normalises its weight in every call.*then prune that"),
        (Clamped(3, 4, 3), "Clamped computes something else than nn.Conv2d; replace it"),
        (Extra(3, 4, 3, 2), "Extra computes something else than nn.Conv2d"),
    ],
)
def test_what_computes_something_else_is_left_alone(conv: nn.Module, reason: str) -> None:
    result = Rewritten(settled(nn.Sequential(conv, nn.ReLU()), 0.5), torch.randn(2, 3, 9, 8), torch.randn(1, 3, 6, 5))
    assert not result.convs
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(result.skipped["0"])


def test_a_mask_within_is_part_of_the_weight() -> None:
    model = settled(nn.Sequential(a_mask(Masked(3, 4, 3))), 0.5)
    assert "Masked computes something else" in Rewritten(model, torch.randn(2, 3, 9, 8)).skipped["0"]


def test_the_user_and_hooks_come_first() -> None:
    model = settled(nn.Sequential(Same(3, 3, 3, 2), Same(3, 3, 3, 2)))
    model[1].register_forward_hook(lambda module, args, out: out * 2)
    request = Request(ON_CPU.device, "fp32", skip=lambda name, module: type(module) is Same and name == "0")
    skipped = Rewritten(model, torch.randn(2, 3, 9, 8), request=request).skipped
    assert skipped["0"] == "you asked to skip it" and "hooks" in skipped["1"]


@pytest.mark.usefixtures("always_faster", "direct_wins")
def test_a_whole_conversion(tmp_path: Path) -> None:
    model = nn.Sequential(
        *(Same(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), Same(8, 8, 5, 2, groups=8), nn.SiLU()),
        *(Checked(8, 8, 1), nn.ReLU(), nn.Flatten(2), SameRow(8, 4, 4, 2)),
    )
    inputs = [torch.randn(n, 3, h, w) for n, h, w in ((2, 16, 18), (1, 17, 9), (3, 8, 8))]
    fast = converted(settled(model), inputs[0], tmp_path, *inputs[1:])
    assert set(fast.plan.layers) == {"0", "3", "5", "8"} and not fast.plan.skipped
    dynamic = {name: torch.export.Dim.DYNAMIC for name in (2, 3)}
    program = torch.export.export(
        nn.Sequential(SamePad((3, 3), (2, 4), (1, 1))), (inputs[0],), dynamic_shapes=(dynamic,)
    )
    pad = SamePad((3, 3), (2, 4), (1, 1))
    assert all(torch.equal(program.module()(torch.ones(2, 3, h, 9)), pad(torch.ones(2, 3, h, 9))) for h in (7, 12))
