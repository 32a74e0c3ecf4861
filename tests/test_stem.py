"""The kernel for a network's first convolution: its source compiled for the CPU, and on a GPU."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from escort import reference
from escort.cuda.compiler import KERNELS, compile_source
from escort.cuda.gpu import H200
from escort.cuda.params import pack
from escort.filter import SparseFilter
from escort.layers import Images
from escort.methods import activation, by_name
from escort.methods.cuda.stem import StemConfig, in_steps
from escort.methods.cuda.stem.layout import Channels, Layout
from escort.methods.cuda.stem.params import Params
from escort.problem import TORCH_DTYPE, TORCH_MEMORY_FORMAT, Activation, Epilogue, MemoryFormat, Precision, Problem
from tests.cases import FULL, Case
from tests.emulated import launch
from tests.host import struct_fields

METHOD = by_name("stem", "cuda:0")
FORMATS: tuple[MemoryFormat, ...] = get_args(MemoryFormat)
PRECISIONS: tuple[Precision, ...] = ("tf32", "fp16", "bf16")

#: Windows of an odd and an even number of elements, with pixels of whole words and of others.
STEMS = tuple(
    Case(name, problem, density)
    for name, problem, density in (
        ("7x7, stride 2", Problem(1, 3, 9, 35, 64, (7, 7), (2, 2), (3, 3, 3, 3), epilogue=Epilogue(True)), 1.0),
        ("3x3 of 3 channels", Problem(2, 3, 7, 19, 32, (3, 3), padding=(1, 1, 1, 1), epilogue=FULL), 0.6),
        ("padded as TensorFlow does", Problem(2, 3, 10, 20, 16, (3, 3), (2, 2), (0, 1, 0, 1), epilogue=FULL), 1.0),
        ("11x11, stride 4", Problem(1, 3, 15, 43, 96, (11, 11), (4, 4), epilogue=Epilogue(True, False, "relu6")), 1.0),
        ("5x5 of one channel", Problem(3, 1, 9, 18, 8, (5, 5), padding=(2, 2, 2, 2), epilogue=Epilogue(True)), 0.5),
        ("one channel, stride 2", Problem(1, 1, 12, 9, 24, (3, 3), (2, 2), (1, 1, 1, 1)), 1.0),
        ("2 channels, dilation", Problem(1, 2, 14, 15, 24, (3, 3), padding=(2, 2, 3, 3), dilation=(2, 3)), 1.0),
        ("dilation and stride", Problem(1, 3, 17, 20, 40, (3, 2), (2, 3), (2, 2, 3, 3), (3, 2), epilogue=FULL), 1.0),
        ("one pixel of 4 channels", Problem(2, 4, 5, 9, 80, (1, 1)), 1.0),
        ("patches", Problem(1, 3, 16, 24, 48, (4, 4), (4, 4), epilogue=Epilogue(True)), 1.0),
        ("padding beyond the kernel", Problem(1, 3, 4, 5, 8, (3, 3), padding=(5, 4, 6, 7)), 1.0),
        ("stride beyond the kernel", Problem(1, 3, 17, 17, 8, (2, 2), (5, 4)), 1.0),
        ("silu", Problem(1, 3, 9, 9, 16, (3, 3), (2, 2), (1, 1, 1, 1), epilogue=Epilogue(True, False, "silu")), 1.0),
        ("prelu", Problem(1, 3, 6, 9, 16, (3, 3), epilogue=Epilogue(True, True, "prelu")), 1.0),
        ("no weights at all", Problem(2, 3, 8, 8, 8, (3, 3), epilogue=FULL), 0.0),
    )
)
every_stem = pytest.mark.parametrize("case", STEMS, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of an H200, where there is none."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("escort.methods.cuda.stem.unavailable", lambda device: None)
        monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)


def on_gpu(case: Case, memory_format: MemoryFormat, precision: Precision) -> Problem:
    return replace(case.problem, device="cuda:0", memory_format=memory_format, precision=precision)


def run_on_cpu(
    problem: Problem,
    config: StemConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    folder: Path,
) -> torch.Tensor:
    """What the kernel's source makes of x, as `prepare` launches it; with factors of images of bytes."""
    layout = Layout.of(problem, config)
    (variant,), params = METHOD.kernels(problem, config), Params.of(layout, config)
    shape, dtype = (len(x), *problem.output_shape[1:]), problem.storage
    y = torch.full(shape, torch.nan, dtype=dtype).contiguous(memory_format=problem.torch_memory_format)
    tables = layout.arrange(weight), torch.from_numpy(layout.table.view("int32"))
    per_channel = activation.per_channel(replace(problem, device="cpu", memory_format="contiguous"), bias, slope)
    in_x = in_steps(problem)[not x.is_contiguous()]
    if factors is not None:
        variant = variant._replace(defines={**variant.defines, "IMAGES": 1})
    args = x, y, residual, *tables, per_channel, factors, pack(params), *in_x
    launch(variant, (len(x) * params.blocks, 1, 1), layout.threads, args, folder, layout.shared_bytes)
    return y


def test_the_struct_is_the_dataclass() -> None:
    in_c = struct_fields((KERNELS / "stem.cu").read_text(), "Params")
    assert in_c == [(field.type, field.name) for field in fields(Params)]


#: Each stem in one precision and memory format, the first in three.
EMULATED = [(case, PRECISIONS[i % 3], FORMATS[(i + i // 3) % 2]) for i, case in enumerate((STEMS[0], STEMS[0], *STEMS))]


@pytest.mark.parametrize(
    ("case", "precision", "memory_format"), EMULATED, ids=lambda value: getattr(value, "name", value)
)
def test_the_source_computes_every_stem(
    case: Case, precision: Precision, memory_format: MemoryFormat, tmp_path_factory: pytest.TempPathFactory
) -> None:
    problem, dtype = on_gpu(case, memory_format, precision), TORCH_DTYPE[precision]
    x, weight, bias, residual = case.tensors()
    x, weight = x.to(dtype), weight.to(dtype)
    residual = None if residual is None else residual.to(dtype).contiguous(memory_format=problem.torch_memory_format)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    assert METHOD.unsupported(problem) is None
    configs = METHOD.configs(problem, case.filter())
    rest = {"bias": bias, "residual": residual, "slope": case.slope(), "folder": tmp_path_factory.getbasetemp()}
    assert len({*configs}) == len(configs) > 1
    assert any(config.together for config in configs) is (memory_format == "channels_last")
    by_way = {config.together: config for config in configs}
    tried = (*by_way.values(), configs[-1])[:2]
    for config, its_format in zip(tried, TORCH_MEMORY_FORMAT.values(), strict=True):
        assert METHOD.offers(problem, case.filter(), config)
        y = run_on_cpu(problem, config, x.contiguous(memory_format=its_format), weight.float(), **rest)
        assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config


@pytest.mark.parametrize("tiles", [2, 4, 6, 8])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_warps_that_multiply_together_keep_to_their_registers(precision: Precision, tiles: int) -> None:
    problem = replace(on_gpu(STEMS[0], "channels_last", precision), out_channels=8 * tiles)
    (variant,) = METHOD.kernels(problem, StemConfig(8, 2, together=True))
    assert variant.native and variant.defines["TILES"] == tiles
    binary = compile_source(variant.source, variant.defines, "sm_90a")
    assert binary.registers <= 128 and binary.spill_bytes == 0


def test_infinities_and_nan_reach_the_outputs_that_read_them(tmp_path: Path) -> None:
    """And no others, though words of two elements reach beyond a window."""
    problem = on_gpu(STEMS[0], "channels_last", "fp16")
    problem = replace(problem, height=9, width=25, out_channels=8, epilogue=Epilogue(False, False, "relu"))
    x = torch.randn(problem.input_shape).half()
    x[0, 0, 0, 3], x[0, 1, 4, 12], x[0, 2, 8, 24] = torch.nan, torch.inf, -torch.inf
    weight = torch.randn(problem.weight_shape).half()
    expected = reference.conv2d(problem, x, weight).half()
    assert 0 < int(expected.isnan().sum()) < expected.numel() // 2
    y = run_on_cpu(problem, StemConfig(2, 2), x, weight.float(), folder=tmp_path)
    torch.testing.assert_close(y, expected.contiguous(), equal_nan=True, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_images_are_normalised_on_the_way(precision: Precision, memory_format: MemoryFormat, tmp_path: Path) -> None:
    """Zeros around them are those of normalised images."""
    problem = replace(on_gpu(STEMS[1], "channels_last", precision), epilogue=Epilogue(True))
    _, weight, bias, _ = STEMS[1].tensors()
    weight, layer = weight.to(problem.storage), Images((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)).to(problem.storage)
    x = torch.randint(256, problem.input_shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = reference.conv2d(problem, layer(x.permute(0, 2, 3, 1)), weight, bias)
    x = x.contiguous(memory_format=TORCH_MEMORY_FORMAT[memory_format])
    rest = {"bias": bias, "factors": layer.factors, "folder": tmp_path}
    y = run_on_cpu(problem, StemConfig(2, 2), x, weight.float(), **rest)  # type: ignore[arg-type]
    assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision]


def test_what_is_refused() -> None:
    problem = Problem(1, 3, 32, 32, 16, (3, 3), precision="fp16", device="cuda:0")
    assert METHOD.unsupported(problem) is None
    for other, says in (
        (replace(problem, precision="fp32"), "ask for TF32"),
        (replace(problem, in_channels=5), "4 input channels at most"),
        (replace(problem, in_channels=2, groups=2), "without groups"),
        (replace(problem, out_channels=12), "8 channels at a time, and there are 12"),
        (replace(problem, height=2**15, width=2**15), "32 bits"),
        (replace(problem, out_channels=4096, kernel_size=(11, 11)), "shared memory has no room"),
    ):
        assert says in str(METHOD.unsupported(other)), other


def test_weights_that_the_precision_has_not_are_refused() -> None:
    problem = Problem(1, 3, 32, 32, 16, (3, 3), precision="fp16", device="cuda:0")
    weight = torch.full(problem.weight_shape, 1e5)
    with pytest.raises(ValueError, match="a weight of 100000 is too large for fp16"):
        Layout.of(problem, StemConfig(1, 1)).arrange(weight)


def test_a_config_of_another_problem_is_not_offered() -> None:
    problem = Problem(1, 3, 32, 32, 16, (3, 3), precision="fp16", device="cuda:0")
    for config in (StemConfig(1, 5), StemConfig(3, 1), StemConfig(0, 1), StemConfig(1, 0), StemConfig(1, -1)):
        assert not METHOD.offers(problem, None, config), config  # type: ignore[arg-type]
    assert METHOD.offers(problem, None, StemConfig(1, 4))  # type: ignore[arg-type]
    together = StemConfig(1, 4, together=True)
    assert not METHOD.offers(problem, None, together)  # type: ignore[arg-type]
    assert METHOD.offers(replace(problem, memory_format="channels_last"), None, together)  # type: ignore[arg-type]


@pytest.mark.parametrize("out_channels", range(8, 200, 8))
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_channels_are_dealt_once(precision: Precision, memory_format: MemoryFormat, out_channels: int) -> None:
    problem = Problem(1, 3, 32, 33, out_channels, (3, 3), precision=precision, device="cuda:0")
    deal = Channels.of(replace(problem, memory_format=memory_format))
    columns = deal.columns(memory_format == "channels_last").flatten().tolist()
    assert sorted(columns) == list(range(len(columns))) and out_channels <= len(columns) < out_channels * 1.5 + 8
    assert deal.tiles % 2 == 0 and deal.tiles <= 8
    if memory_format == "channels_last":
        assert deal.tiles % (deal.vector // 2) == 0


def test_stems_of_networks_are_predicted_to_take_about_twice_what_memory_does() -> None:
    resnet = Problem(32, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3, 3, 3), epilogue=Epilogue(True, False, "relu"))
    for problem in (resnet, replace(resnet, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1))):
        problem = replace(problem, precision="fp16", device="cuda:0", memory_format="channels_last")
        elements = torch.Size(problem.input_shape).numel() + torch.Size(problem.output_shape).numel()
        predicted = METHOD.predict_us(problem, None, H200)  # type: ignore[arg-type]
        assert predicted is not None and 1.0 < predicted / (2 * elements / 4e6) < 2.5


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
@every_stem
def test_every_stem_on_the_gpu(case: Case, precision: Precision, memory_format: MemoryFormat) -> None:
    problem, x, weight, bias, residual = case.on("cuda:0", precision)
    problem = replace(problem, memory_format=memory_format)
    expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
    assert METHOD.unsupported(problem) is None
    for config in METHOD.configs(problem, case.filter()):
        run = METHOD.prepare(problem, case.filter(), bias, config, case.slope())
        for its_format in TORCH_MEMORY_FORMAT.values():
            y = run(x.contiguous(memory_format=its_format), residual)
            assert y.is_contiguous(memory_format=problem.torch_memory_format)
            assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision], config
            assert torch.equal(run(x, residual), y), "not the same twice: a race"


@pytest.mark.gpu
@pytest.mark.parametrize("name", get_args(Activation))
def test_every_activation_on_the_gpu(name: Activation) -> None:
    epilogue = Epilogue(True, True, name, 0.2 if name == "leaky_relu" else 0.0)
    case = Case(name, Problem(2, 3, 20, 30, 24, (3, 3), (2, 2), (1, 1, 1, 1), epilogue=epilogue), 1.0)
    for precision in PRECISIONS:
        problem, x, weight, bias, residual = case.on("cuda:0", precision)
        config = METHOD.configs(problem, case.filter())[0]
        run = METHOD.prepare(problem, case.filter(), bias, config, case.slope())
        expected = reference.conv2d(problem, x, weight, bias, residual, case.slope())
        assert reference.compare(run(x, residual), expected) <= reference.ERROR_BOUND[precision]


@pytest.mark.gpu
def test_any_batch_and_views_on_the_gpu() -> None:
    problem = Problem(2, 3, 41, 50, 32, (3, 3), (2, 2), (1, 1, 1, 1), precision="fp16", device="cuda:0")
    problem = replace(problem, memory_format="channels_last")
    weight = torch.randn(problem.weight_shape)
    sparse_filter = SparseFilter.from_dense(weight)
    run = METHOD.prepare(problem, sparse_filter, None, METHOD.configs(problem, sparse_filter)[0])
    for samples in (0, 1, 5, 300):
        memory = torch.randn(samples, 4, 43, 51, device="cuda:0").half()
        for x in (memory[:, 1:, 2:, :50], memory[:, 1:, 2:, :50].contiguous()):
            expected = reference.conv2d(problem, x, weight)
            assert reference.compare(run(x), expected) <= reference.ERROR_BOUND["fp16"]
    odd = torch.randn(3 * 41 * 50 + 1, device="cuda:0").half()[1:].view(1, 3, 41, 50)
    assert reference.compare(run(odd), reference.conv2d(problem, odd, weight)) <= reference.ERROR_BOUND["fp16"]


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@every_stem
def test_images_on_the_gpu(case: Case, precision: Precision, channels_last: bool) -> None:
    problem, _, weight, bias, _ = case.on("cuda:0", precision)
    epilogue = replace(problem.epilogue, residual=False)
    problem, channels = replace(problem, memory_format="channels_last", epilogue=epilogue), problem.in_channels
    layer = Images([0.5] * channels, [0.1 * (1 + c) for c in range(channels)], channels_last=channels_last)
    layer = layer.to("cuda:0", problem.storage)
    images = torch.randint(256, problem.input_shape, dtype=torch.uint8, device="cuda:0")
    images = images.permute(0, 2, 3, 1).contiguous() if channels_last else images
    expected = reference.conv2d(problem, layer(images), weight, bias, slope=case.slope())
    config = METHOD.configs(problem, case.filter())[0]
    run = METHOD.prepare(problem, case.filter(), bias, config, case.slope()).of_images(channels_last)
    assert run is not None
    y = run(images, layer.factors)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert reference.compare(y, expected) <= reference.ERROR_BOUND[precision]
    assert torch.equal(run(images, layer.factors), y), "not the same twice: a race"
