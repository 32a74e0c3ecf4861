"""What stands between convolutions: the kernels' sources compiled for the CPU, and the layers on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from escort.cuda.compiler import KERNELS
from escort.cuda.gpu import H200
from escort.layers import AdaptiveAvgPool2d, AvgPool2d, Concat, Gate, LocalResponseNorm, NormedConcat, Squeeze, Upsample
from escort.layers.planes import average, base, concat, gate, norm, squeeze
from escort.layers.planes.base import OnPlanes, Planes
from escort.layers.pool import POOLED_ON_GPU
from escort.reference import ERROR_BOUND, compare
from tests.emulated import launch
from tests.host import struct_fields

BOUNDS = dict(zip(POOLED_ON_GPU, (ERROR_BOUND[name] for name in ("fp32", "fp16", "bf16")), strict=True))


@dataclass(frozen=True)
class Case:
    """A layer, and the shapes of its inputs."""

    layer: OnPlanes
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
        generator = torch.Generator().manual_seed(len(str(self)))
        tensors = (torch.randn(shape, generator=generator) for shape in self.shapes)
        return [(2.0 * x + 0.5).to(dtype).contiguous(memory_format=memory_format) for x in tensors]

    def expected(self, inputs: Sequence[Tensor]) -> Tensor:
        result: Tensor = self.layer(*(x.double() for x in inputs))  # which no kernel takes
        return result

    def __str__(self) -> str:
        return f"{self.layer} of {', '.join('x'.join(map(str, shape)) for shape in self.shapes)}"


CASES = [
    *(
        Case(LocalResponseNorm(size, alpha, beta, k), (shape,))
        for size, alpha, beta, k, shape in (
            (5, 1e-4, 0.75, 1.0, (2, 96, 9, 9)),
            (5, 2.0, 0.75, 2.0, (2, 40, 6, 10)),
            (3, 0.5, 0.5, 1.5, (1, 8, 16, 16)),
            (4, 1.0, 0.75, 1.0, (3, 20, 4, 4)),  # as many before the channel as there are behind it, and one
            (1, 1.0, 1.0, 1.0, (1, 3, 5, 7)),
            (2, 1.0, 0.75, 1.0, (2, 16, 3, 3)),
            (9, 1.0, 0.75, 1.0, (1, 6, 8, 8)),  # more than there are channels
            (16, 1.0, 0.75, 1.0, (1, 64, 4, 6)),
            (5, 1.0, 0.75, 1.0, (1, 7, 40, 33)),
        )
    ),
    *(
        Case(AvgPool2d(*window), (shape,))
        for window, shape in (
            ((2,), (2, 16, 8, 10)),
            ((3, 1, 1), (2, 24, 7, 9)),
            ((3, 2, 1, True), (1, 12, 8, 7)),
            ((3, 2, 1, True, False), (1, 12, 8, 7)),
            (((3, 2), (1, 2), (1, 0), False, True, 5), (1, 7, 9, 6)),
            ((7,), (2, 64, 7, 7)),
            (((40, 31), 3), (1, 8, 45, 35)),
        )
    ),
    *(
        Case(AdaptiveAvgPool2d(size), (shape,))  # type: ignore[arg-type]
        for size, shape in (
            (1, (2, 40, 7, 7)),
            (1, (1, 32, 60, 50)),
            (1, (3, 5, 13, 1)),
            ((6, 6), (1, 16, 13, 9)),
            ((3, None), (2, 9, 8, 5)),
            (7, (1, 8, 3, 4)),
        )
    ),
    *(
        Case(Upsample(**settings), (shape,))  # type: ignore[arg-type]
        for settings, shape in (
            ({"scale_factor": 2}, (2, 16, 5, 7)),
            ({"scale_factor": (1.5, 3)}, (1, 12, 8, 5)),
            ({"size": (9, 20)}, (1, 5, 6, 8)),
            ({"size": 7, "mode": "nearest-exact"}, (2, 8, 12, 5)),
            ({"scale_factor": 2, "mode": "bilinear"}, (2, 16, 5, 7)),
            ({"scale_factor": 2, "mode": "bilinear", "align_corners": True}, (2, 24, 6, 4)),
            ({"scale_factor": 1.7, "mode": "bilinear"}, (1, 8, 9, 9)),
            ({"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True}, (1, 8, 9, 9)),
            ({"size": (3, 1), "mode": "bilinear", "align_corners": True}, (1, 7, 8, 6)),
            ({"size": (4, 11), "mode": "bilinear"}, (1, 8, 8, 5)),
        )
    ),
    *(
        Case(Gate(), ((samples, channels, *size), (samples, channels, 1, 1)))
        for samples, channels, *size in ((2, 16, 5, 7), (3, 12, 8, 8), (1, 7, 4, 3), (2, 40, 1, 9))
    ),
]
JOINS = [
    Case(Concat(), tuple((2, channels, 5, 3) for channels in widths))
    for widths in ((16, 8), (24, 32, 4), (8,) * 9, (4, 20, 12, 8) * 5)
]


def normed(channels: int, activation: Any) -> NormedConcat:
    generator = torch.Generator().manual_seed(channels)
    layer = NormedConcat(channels, 1e-3, activation=activation).requires_grad_(False).eval()
    for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
        assert tensor is not None
        tensor.uniform_(0.5, 1.5, generator=generator)
    return layer


NORMED = [
    Case(normed(sum(widths), activation), tuple((2, channels, 5, 3) for channels in widths))
    for widths, activation in (((16, 8), "relu"), ((40,), "none"), ((4, 20, 12, 8) * 5, "relu"))
]
SQUEEZES = [
    Case(Squeeze(shape[1], hidden, *activations).requires_grad_(False).eval(), (shape,))  # type: ignore[arg-type]
    for shape, hidden, activations in (
        ((2, 32, 7, 7), 8, ("silu", "sigmoid")),
        ((3, 40, 9, 13), 10, ("relu", "hardsigmoid")),
        ((1, 1152, 3, 5), 6, ("silu", "sigmoid")),
        ((1, 2080, 2, 1), 3, ("relu", "sigmoid")),  # more vectors than threads
    )
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_type = pytest.mark.parametrize("dtype", POOLED_ON_GPU, ids=str)
both_memory_formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)


@pytest.fixture
def an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: Gpu80)


#: As large, without clusters, which nobody emulates.
Gpu80 = type(H200)(H200.multiprocessors, H200.shared_bytes, capability=(8, 0))


def emulated(layer: OnPlanes, inputs: Sequence[Tensor], folder: Path) -> Tensor | None:
    """What the kernel makes of tensors on the CPU, None where torch computes the layer."""
    x, *others = map(Planes.of, inputs)
    work = layer.work(layer.settings(), x, *others)
    if work is None:
        return None
    y = torch.full(work.out_shape, float("nan"), dtype=x.dtype)
    if y.ndim == inputs[0].ndim:
        y = y.contiguous(memory_format=x.torch_memory_format)
    given = [*inputs, *[None] * (work.inputs * len(work.launches) - len(inputs))]
    for i, (grid, args) in enumerate(work.launches):
        pointers = *given[i * work.inputs : (i + 1) * work.inputs], y, *(table.to(x.dtype) for table in layer.tables())
        launch(work.variant, grid, work.threads, (*pointers, *args), folder, work.shared_bytes, work.cluster)
    return y


@pytest.mark.usefixtures("an_h200")
@every_case
@every_type
@both_memory_formats
def test_the_sources_compute_what_torch_does(
    case: Case, dtype: torch.dtype, memory_format: torch.memory_format, tmp_path_factory: pytest.TempPathFactory
) -> None:
    inputs = case.inputs(dtype, memory_format)
    y = emulated(case.layer, inputs, tmp_path_factory.getbasetemp())
    assert y is not None and compare(y, case.expected(inputs)) <= BOUNDS[dtype]


@pytest.mark.parametrize("window", [(2,), (3, 1, 1), (3, 2, 1, True, False), ((1, 2), 1, 0, False, True, 5)], ids=str)
@every_type
@both_memory_formats
def test_the_source_averages_small_windows_that_are_many(
    window: tuple[Any, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: replace(Gpu80, multiprocessors=1))
    case = Case(AvgPool2d(*window), ((4, 64, 17, 18),))
    inputs = case.inputs(dtype, memory_format)
    work = case.layer.work(case.layer.settings(), Planes.of(inputs[0]))
    assert work is not None and work.variant.defines["ROWS"] == case.layer.settings()[0][0]
    y = emulated(case.layer, inputs, tmp_path_factory.getbasetemp())
    assert y is not None and compare(y, case.expected(inputs)) <= BOUNDS[dtype]


@pytest.mark.usefixtures("an_h200")
@pytest.mark.parametrize("case", JOINS, ids=str)
@every_type
def test_the_source_joins_channels(
    case: Case, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    inputs = case.inputs(dtype, torch.channels_last)
    y = emulated(case.layer, inputs, tmp_path_factory.getbasetemp())
    assert y is not None and torch.equal(y, torch.cat(inputs, 1))
    assert emulated(case.layer, [x.contiguous() for x in inputs], tmp_path) is None


def of_type(layer: OnPlanes, dtype: torch.dtype) -> OnPlanes:
    return copy.deepcopy(layer).to(dtype)


@pytest.mark.usefixtures("an_h200")
@pytest.mark.parametrize("case", NORMED, ids=lambda case: f"{len(case.shapes)}")
@every_type
def test_the_source_normalises_what_it_joins(
    case: Case, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    inputs = case.inputs(dtype, torch.channels_last)
    layer = of_type(case.layer, dtype)
    expected = of_type(layer, torch.float64)(*(x.double() for x in inputs))
    y = emulated(layer, inputs, tmp_path_factory.getbasetemp())
    assert y is not None and compare(y, expected) <= BOUNDS[dtype]
    assert emulated(layer, [x.contiguous() for x in inputs], tmp_path) is None
    assert emulated(layer.train(), inputs, tmp_path) is None


@pytest.mark.parametrize(
    ("case", "gpu"),
    [(SQUEEZES[0], Gpu80), *((case, H200) for case in SQUEEZES)],  # a block for each sample, and clusters
    ids=lambda value: f"{value.shapes[0][1]}" if isinstance(value, Case) else f"{value.capability[0]}.0",
)
@every_type
def test_the_source_computes_gates(
    case: Case,
    dtype: torch.dtype,
    gpu: Any,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: gpu)
    inputs, layer = case.inputs(dtype, torch.channels_last), of_type(case.layer, dtype)
    expected = of_type(layer, torch.float64)(*(x.double() for x in inputs))
    y = emulated(layer, inputs, tmp_path_factory.getbasetemp())
    assert y is not None and compare(y, expected) <= BOUNDS[dtype]
    assert emulated(layer, [x.contiguous() for x in inputs], tmp_path) is None


def test_how_blocks_share_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)

    def work(samples: int, channels: int, hidden: int, dtype: torch.dtype = torch.float16) -> base.Work | None:
        x = Planes((samples, channels, 7, 7), dtype, torch.device("cuda:0"), True)
        return Squeeze.work((channels, hidden, "silu", "sigmoid"), x)

    found = work(32, 1152, 48)
    assert found is not None and found.launches[0][0] == (256, 1, 1) and found.cluster == 8
    assert found.shared_bytes == 2 * 48 * 144 * 2 + 4 * (2048 + 1152 + 96)
    assert work(1, 1152, 48, torch.float32) is not None and work(1, 32, 8) is not None
    assert work(1, 1150, 48) is None, "its channels are no vectors"
    assert work(1, 960, 240) is None, "its weights do not fit"
    for names in (("fc1", "fc1"), ("fc1", "a.b"), ("training", "fc2"), ("fc1",), ("fc1", "def"), "ab", (1, 2)):
        with pytest.raises(ValueError, match="two names of their own|sequence"):
            Squeeze(8, 2, names=names)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activations of relu, silu, sigmoid, hardsigmoid, got tanh"):
        Squeeze(8, 2, "tanh")


@pytest.mark.parametrize(
    ("params", "source"),
    [
        (norm.Params, "local_response_norm"),
        (average.Params, "average_pool"),
        (average.MeanParams, "mean"),
        (gate.Params, "gate"),
        (concat.Params, "concat"),
        (squeeze.Params, "squeeze"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_structs_are_the_dataclasses(params: Any, source: str) -> None:
    in_c = struct_fields((KERNELS / f"{source}.cu").read_text(), "Params")
    named = {"bool": "int"}
    assert in_c == [(named.get(str(field.type), field.type), field.name) for field in fields(params)]


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (LocalResponseNorm(17), [(1, 32, 4, 4)]),
        (AvgPool2d(9), [(1, 3, 4, 4)]),
        (AvgPool2d(3, padding=2), [(1, 3, 9, 9)]),
        (Upsample(scale_factor=2, mode="bicubic"), [(1, 3, 4, 4)]),
        (AdaptiveAvgPool2d(0), [(1, 3, 4, 4)]),
        (Gate(), [(2, 8, 4, 4), (1, 8, 1, 1)]),
        (Gate(), [(2, 8, 1, 1), (2, 8, 4, 4)]),
        (Concat(), [(2, 8, 4, 4), (2, 8, 4, 5)]),
        (Concat(), [(2, 8, 4, 4), (2, 3, 4, 4)]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("an_h200")
def test_what_is_left_to_torch(layer: OnPlanes, shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    assert emulated(layer, [torch.randn(shape) for shape in shapes], tmp_path) is None


def test_few_large_windows_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)

    def shares(*shape: int) -> tuple[int, int]:
        x = Planes(shape, torch.float16, torch.device("cuda:0"), True)
        work = AdaptiveAvgPool2d.work((1, 1), x)
        assert work is not None and work.launches[0][0][0] % work.cluster == 0
        return work.launches[0][0][0] // work.cluster, work.cluster

    assert shares(1, 32, 112, 112) == (1, 8)  # a block has four vectors of channels, and eight blocks share them
    assert shares(128, 2048, 7, 7)[1] == 1


def plain(layer: nn.Module) -> Callable[..., Tensor]:
    """The same layer of torch."""
    return next(cls for cls in type(layer).__mro__ if not cls.__module__.startswith("escort.layers.")).forward.__get__(
        layer
    )


def test_on_the_cpu_layers_are_torchs() -> None:
    x = torch.randn(2, 6, 8, 8)
    for layer in (LocalResponseNorm(5), AvgPool2d(3, 2, 1), AdaptiveAvgPool2d(3)):
        assert torch.equal(layer(x), plain(layer)(x)) and layer.binaries(x) == ()
    gates = torch.randn(2, 6, 1, 1)
    assert torch.equal(Gate()(x, gates), x * gates)


def test_what_observes_operators_sees_torchs() -> None:
    x = torch.randn(2, 6, 8, 8)
    for layer in (LocalResponseNorm(5), AvgPool2d(3, 2, 1), AdaptiveAvgPool2d(3), Upsample(scale_factor=2)):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.gpu
@every_case
@every_type
@both_memory_formats
def test_every_case_on_the_gpu(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    inputs = [x.cuda().contiguous(memory_format=memory_format) for x in case.inputs(dtype, memory_format)]
    for _ in range(2):
        y = case.layer(*inputs)
        assert y.is_contiguous(memory_format=memory_format)
        assert compare(y, case.expected(inputs)) <= BOUNDS[dtype]
    assert len(case.layer.binaries(*inputs)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", JOINS, ids=str)
@every_type
@both_memory_formats
def test_channels_are_joined_on_the_gpu(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    inputs = [x.cuda().contiguous(memory_format=memory_format) for x in case.inputs(dtype, memory_format)]
    y = case.layer(*inputs)
    assert torch.equal(y, torch.cat(inputs, 1)) and y.is_contiguous(memory_format=memory_format)


@pytest.mark.gpu
@pytest.mark.parametrize("case", NORMED, ids=lambda case: f"{len(case.shapes)}")
@every_type
@both_memory_formats
def test_what_is_joined_is_normalised_on_the_gpu(
    case: Case, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    inputs = [x.cuda().contiguous(memory_format=memory_format) for x in case.inputs(dtype, memory_format)]
    layer = of_type(case.layer, dtype).cuda()
    assert len(layer.binaries(*inputs)) == (memory_format is torch.channels_last)
    expected = of_type(layer, torch.float64)(*(x.double() for x in inputs))
    y = layer(*inputs)
    assert compare(y, expected) <= BOUNDS[dtype] and y.is_contiguous(memory_format=memory_format)
    layer.weight.mul_(2.0)  # is read in each call
    assert compare(layer(*inputs), of_type(layer, torch.float64)(*(x.double() for x in inputs))) <= BOUNDS[dtype]


@pytest.mark.gpu
def test_what_kernels_do_not_take_is_torchs_on_the_gpu() -> None:
    x, layer = torch.randn(2, 6, 9, 9, device="cuda"), LocalResponseNorm(5)
    for unusual in (x.double(), x[0], x[:, :, ::2], x.flatten()[1:].view(-1)[: 6 * 81].view(1, 6, 9, 9), x[:0]):
        torch.testing.assert_close(layer(unusual), plain(layer)(unusual))
    assert layer(x.clone().requires_grad_()).requires_grad
    with torch.autocast("cuda"):
        assert layer(x.half()).dtype == plain(layer)(x.half()).dtype
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(layer)(x))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 32, 112, 112), (2, 1152, 7, 7), (1, 96, 112, 113), (1, 8, 300, 300)])
@both_memory_formats
def test_blocks_of_a_cluster_share_windows(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.randn(shape, device="cuda", dtype=torch.float16).contiguous(memory_format=memory_format) + 1.0
    for _ in range(3):
        assert compare(AdaptiveAvgPool2d(1)(x), x.double().mean((2, 3), True)) <= 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(2,), (3, 1, 1), (3, 2, 1, True, False)], ids=str)
@both_memory_formats
def test_small_windows_that_are_many_on_the_gpu(window: tuple[Any, ...], memory_format: torch.memory_format) -> None:
    x = torch.randn(32, 96, 57, 58, device="cuda", dtype=torch.float16).contiguous(memory_format=memory_format)
    layer = AvgPool2d(*window)
    assert [binary.defines["ROWS"] for binary in layer.binaries(x)] == [str(layer.settings()[0][0])]
    assert compare(layer(x), layer(x.double())) <= 1e-3


ON_GPU_ONLY = [
    Case(Squeeze(channels, hidden, *activations).requires_grad_(False).eval(), ((samples, channels, *size),))  # type: ignore[arg-type]
    for samples, channels, hidden, size, activations in (
        (1, 1152, 48, (7, 7), ("silu", "sigmoid")),
        (5, 144, 6, (56, 56), ("silu", "sigmoid")),
        (3, 32, 8, (112, 112), ("silu", "sigmoid")),
        (2, 672, 168, (14, 14), ("relu", "hardsigmoid")),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", SQUEEZES + ON_GPU_ONLY, ids=lambda case: "x".join(map(str, case.shapes[0])))
@every_type
def test_gates_on_the_gpu(case: Case, dtype: torch.dtype) -> None:
    inputs, layer = [x.cuda() for x in case.inputs(dtype, torch.channels_last)], of_type(case.layer, dtype).cuda()
    expected = of_type(layer, torch.float64)(*(x.double() for x in inputs))
    is_ours = len(layer.binaries(*inputs)) == 1
    assert is_ours or (dtype is torch.float32 and case.shapes[0][1] in (672, 2080))
    for _ in range(2):
        assert not is_ours or compare(layer(*inputs), expected) <= BOUNDS[dtype]
