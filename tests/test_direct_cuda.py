"""The direct kernel for GPUs: its tables through an interpreter of the kernel, and on a GPU the kernel itself."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from escort import reference
from escort.cuda.compiler import KERNELS
from escort.cuda.gpu import H200
from escort.cuda.params import Divisor, pack
from escort.filter import SparseFilter
from escort.methods import activation
from escort.methods.cuda.direct import DirectCuda
from escort.methods.cuda.direct.layout import LANES, STORAGE, DirectConfig, Layout, most_samples
from escort.methods.cuda.direct.params import Params, defines
from escort.methods.cuda.direct.search import candidates, has_room, neighbours, search
from escort.methods.cuda.direct.tables import lay_out
from escort.problem import Epilogue, Precision, Problem
from tests.cases import CASES, Case, check_kernels
from tests.host import struct_fields

Floats = NDArray[np.float64]


def small_ring(problem: Problem) -> DirectConfig:
    """Two stages of two input channels: from the fifth channel on they are used again."""
    return DirectConfig(1, 1, 2, 2, 2, 4, channel_block=2, stages=2, packed=STORAGE[problem.precision] != 0)


class Interpreter:
    """What kernels/cuda/direct.cu does, step by step, in numpy and float64."""

    def __init__(self, problem: Problem, sparse_filter: SparseFilter, config: DirectConfig) -> None:
        self.layout = Layout.of(problem, config.tile)
        self.tables = lay_out(problem, sparse_filter, config)
        self.config, self.half = config, self.layout.samples_per_word == 2
        self.p = Params.of(problem, self.layout, self.tables, config)
        self.precision = problem.precision

    def quotient(self, n: NDArray[np.int64], by: Divisor) -> NDArray[np.int64]:
        high = np.array([int(2 * int(v) * by.magic) >> 32 for v in n.ravel()]).reshape(n.shape)
        return high >> by.shift

    def run(self, x: Floats, tiles: int) -> Floats:
        p, tables = self.p, self.tables
        samples = len(x)
        y = np.full((samples, p.out_channels, p.out_height, p.out_width), np.nan)
        for group in range(len(tables.channel_of)):
            first_channel = int(tables.first_channels[group])
            for tile in range(tiles):
                first_word = tile * self.config.tile
                sums = np.zeros((p.out_channel_warps * self.config.out_channels, self.config.tile, 2))
                for chunk in range(p.chunks):
                    (begin, first), (end, last) = tables.segments[group, chunk : chunk + 2].tolist()
                    stage = np.zeros((p.channel_block, p.channel_words, 2))
                    assert last - first <= p.channel_block
                    for c in range(last - first):
                        fill = self.fill_pairs if self.layout.paired else self.fill_words
                        fill(stage[c], x, first_channel + first + c, first_word)
                    self.multiply(sums, stage.reshape(-1, 2), tables.records[begin:end])
                self.store(y, sums, group, first_word)
        return y

    def fill_words(self, stage: Floats, x: Floats, channel: int, first_word: int) -> None:
        p = self.p
        word = np.arange(p.slots * 32)
        inside = word < p.phases * p.phase_words
        phase, within = np.divmod(word, p.phase_words)
        phase_row, phase_column = np.divmod(phase, p.column_stride)
        position = first_word + within
        line = self.quotient(position, p.by_pitch)
        unit = self.quotient(line, p.by_sample_rows)
        row = (line - unit * p.sample_rows) * p.row_stride + phase_row - p.row_padding
        column = (position - line * p.pitch) * p.column_stride + phase_column - p.column_padding
        sample = unit * (1 + self.half)
        inside &= (row >= 0) & (row < p.height) & (column >= 0) & (column < p.width) & (sample < len(x))
        at = word[inside]
        sample, row, column = sample[inside], row[inside], column[inside]
        stage[at, 0] = x[sample, channel, row, column]
        if self.half:
            stage[at, 1] = x[np.where(sample + 1 < len(x), sample + 1, sample), channel, row, column]

    def fill_pairs(self, stage: Floats, x: Floats, channel: int, first_word: int) -> None:
        p = self.p
        plane = p.height * p.width
        plane_pairs = (plane + 1) // 2
        line = first_word // p.pitch
        unit = line // p.sample_rows
        row, column = line - unit * p.sample_rows - p.row_padding, first_word % p.pitch - p.column_padding
        begin = 0 if row < 0 else plane if row >= p.height else row * p.width + min(max(column, 0), p.width)
        flat = x.reshape(len(x), -1)
        for pair in range(unit * plane_pairs + begin // 2, unit * plane_pairs + begin // 2 + p.slots * 32):
            unit, element = pair // plane_pairs, 2 * (pair % plane_pairs)
            if 2 * unit >= len(x):
                continue
            row, column = divmod(element, p.width)
            at = (unit * p.sample_rows + row + p.row_padding) * p.pitch + column + p.column_padding
            to = [
                (element - 1, at - 1 if column > 0 else at - p.pitch + p.width - 1),
                (element, at),
                (element + 1, at + 1 if column + 1 < p.width else at + p.pitch - p.width + 1),
            ]
            start = channel * plane + element
            odd = channel * plane % 2
            loads = to[0:2] if odd else to[1:3]
            assert (start - odd) % 2 == 0
            for k, (e, word) in enumerate(loads):
                if 0 <= e < plane and 0 <= word - first_word < p.phase_words:
                    source = start - odd + k
                    stage[word - first_word, 0] = flat[2 * unit, source]
                    stage[word - first_word, 1] = flat[min(2 * unit + 1, len(x) - 1), source]

    def multiply(self, sums: Floats, stage: Floats, segment: NDArray[np.int32]) -> None:
        p = self.p
        words = segment.view(np.uint32).ravel()
        assert words.nbytes + 32 <= p.record_bytes
        for slot in range(p.in_channel_warps * len(sums)):
            start, count = int(words[slot] >> 16) * 4, int(words[slot] & 0xFFFF)
            if self.half:
                nonzeros = words[start : start + count]
                offsets = (nonzeros >> 16) // 4
                kind = torch.float16 if self.precision == "fp16" else torch.bfloat16
                bits = torch.from_numpy(nonzeros.astype(np.uint16).view(np.int16))
                values = bits.view(kind).double().numpy()
            else:
                offsets, values = words[start : start + 2 * count : 2] // 4, words[start + 1 : start + 2 * count : 2]
                values = values.view(np.float32)
            for offset, value in zip(offsets.tolist(), values.tolist(), strict=True):
                sums[slot % len(sums)] += value * stage[offset : offset + self.config.tile]

    def store(self, y: Floats, sums: Floats, group: int, first_word: int) -> None:
        p = self.p
        position = first_word + np.arange(self.config.tile)
        line = self.quotient(position, p.by_pitch)
        unit = self.quotient(line, p.by_sample_rows)
        row, column = line - unit * p.sample_rows, position - line * p.pitch
        for k, channel in enumerate(self.tables.channel_of[group].ravel().tolist()):
            for neighbour in range(1 + self.half):
                sample = unit * (1 + self.half) + neighbour
                inside = (row < p.out_height) & (column < p.out_width) & (sample < len(y))
                if channel >= 0:
                    at = sample[inside], channel, row[inside], column[inside]
                    assert np.isnan(y[at]).all(), "an output is written twice"
                    y[at] = sums[k, inside, neighbour]


def interpret(problem: Problem, case: Case, config: DirectConfig) -> float:
    """The relative error of what the kernel would compute, without the epilogue."""
    x, weight, _, _ = case.tensors()
    plain = replace(problem, epilogue=Epilogue())
    machine = Interpreter(plain, case.filter(), config)
    positions = -(-len(x) // machine.layout.samples_per_word) * machine.p.sample_rows * machine.p.pitch
    y = machine.run(x.double().numpy(), -(-positions // config.tile))
    if problem.precision != "fp32":
        weight = weight.to(problem.storage).float()
    return reference.compare(torch.from_numpy(y), reference.conv2d(plain, x, weight))


def test_the_struct_is_the_dataclass() -> None:
    """Host and device name the kernel's parameters alike, in the same order."""
    types = {"int": "int", "u32": "int", "unsigned": "int", "Divisor": "Divisor"}
    for source, dataclass in (("direct.cu", Params), ("divisor.cuh", Divisor)):
        text = (KERNELS / source).read_text()
        in_c = [(types[kind], name) for kind, name in struct_fields(text, dataclass.__name__)]
        assert in_c == [(field.type, field.name) for field in fields(dataclass)]
    problem = replace(CASES[0].problem, device="cuda:0", precision="fp32")
    config = search(problem, CASES[0].filter(), H200)[0]
    tables = lay_out(problem, CASES[0].filter(), config)
    packed = pack(Params.of(problem, Layout.of(problem, config.tile), tables, config))
    words = np.frombuffer(packed, np.uint32)
    assert len(words) == len(fields(Params)) + 4, "a divisor has two"
    assert words[0] == problem.in_channels and words[-1] == activation.bound(problem.epilogue)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", [c for c in CASES if c.problem.batch], ids=lambda case: case.name)
def test_tables_compute_the_convolution(case: Case, precision: str) -> None:
    problem = replace(case.problem, device="cuda:0", precision=precision)  # type: ignore[arg-type]
    sparse_filter = case.filter()
    configs = search(problem, sparse_filter, H200)
    assert configs
    for config in configs[:1] + configs[-1:]:
        assert interpret(problem, case, config) < 1e-12, config


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_tables_of_any_shape(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    kernel_size, stride, dilation = ((draw(1, high), draw(1, high)) for high in (4, 3, 3))
    padding = (draw(0, 4), draw(0, 4), draw(0, 4), draw(0, 4))
    sizes = (draw(1, 5), groups * draw(1, 8), draw(1, 14), draw(1, 14), groups * draw(1, 8))
    precision = data.draw(st.sampled_from(("fp32", "fp16", "bf16")))
    try:
        problem = Problem(*sizes, kernel_size, stride, padding, dilation, groups, precision=precision, device="cuda:0")
    except ValueError:
        assume(False)
        return
    case = Case(f"{draw(0, 1000)}", problem, data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))))
    in_channel_warps = data.draw(st.sampled_from((1, 2, 4)))
    config = DirectConfig(
        words=draw(1, 4),
        out_channels=data.draw(st.sampled_from((1, 2, 4))),
        position_warps=draw(1, 2),
        out_channel_warps=draw(1, 5),
        in_channel_warps=in_channel_warps,
        producers=4,
        channel_block=in_channel_warps * draw(1, 4),
        stages=2,
        balanced=data.draw(st.booleans()),
    )
    try:
        error = interpret(problem, case, config)
    except ValueError as refusal:
        assert "64 KiB" in str(refusal) and precision != "fp32"
        return
    assert error < 1e-12


def test_a_stage_beyond_16_bit_offsets_is_refused() -> None:
    """Of a config that was chosen for smaller inputs, for which it was right."""
    problem = Problem(1, 12, 3, 2, 2, (3, 2), (3, 3), groups=2, precision="fp16", device="cuda:0")
    case = Case("strided", problem, 1.0)
    config = DirectConfig(1, 1, 2, 2, 2, 4, channel_block=12, stages=2)
    assert interpret(problem, case, config) < 1e-12
    with pytest.raises(ValueError, match="use a smaller channel_block"):
        lay_out(problem, case.filter(), replace(config, words=3))
    assert interpret(replace(problem, precision="fp32"), case, replace(config, words=3)) < 1e-12


def test_every_candidate_is_different_and_fits() -> None:
    case = next(case for case in CASES if case.name == "ResNet-50 res4")
    for precision in ("fp32", "fp16", "bf16"):
        problem = replace(case.problem, batch=32, device="cuda:0", precision=precision)  # type: ignore[arg-type]
        configs = search(problem, case.filter(), H200)
        assert len(set(configs)) == len(configs) == 12
        for config in configs:
            layout, tables = Layout.of(problem, config.tile), lay_out(problem, case.filter(), config)
            stage = config.channel_block * layout.channel_words * 4 + tables.record_bytes + 16
            assert config.stages * stage * config.occupancy <= H200.shared_bytes
            assert config.threads <= 1024


def test_the_search_takes_the_best_of_all() -> None:
    """At most two of those that differ in staging alone, though only some of all configs are sorted."""
    problem = Problem(32, 64, 28, 28, 96, (3, 3), padding=(1, 1, 1, 1), precision="fp32", device="cuda:0")
    sparse_filter = SparseFilter.from_dense(torch.randn(96, 64, 3, 3) * (torch.rand(96, 64, 3, 3) < 0.1))
    space = candidates(problem, sparse_filter, H200, packed=False)
    for most in (1, 12, 100):
        expected: list[DirectConfig] = []
        kinds: list[DirectConfig] = []
        for i in np.argsort(space["clocks"], kind="stable"):
            knobs = space.row(i)
            del knobs["clocks"]
            config = DirectConfig(**knobs)
            kind = replace(config, producers=1, channel_block=1, stages=1)
            if kinds.count(kind) < 2:
                kinds.append(kind)
                expected.append(config)
            if len(expected) == most:
                break
        assert search(problem, sparse_filter, H200, most) == expected


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_there_is_room_where_a_config_fits(precision: str) -> None:
    rooms = []
    for width in (8, 60, 250, 1000, 4000):
        problem = Problem(1, 4, 32, width, 8, (9, 9), padding=(4,) * 4, precision=precision, device="cuda:0")  # type: ignore[arg-type]
        sparse_filter = SparseFilter.from_dense(torch.zeros(problem.weight_shape))
        rooms.append(has_room(problem, H200))
        assert rooms[-1] == (len(candidates(problem, sparse_filter, H200, packed=False)["clocks"]) > 0)
    assert rooms[0] and not rooms[-1]


def test_neighbours_differ_in_one_knob() -> None:
    case = next(case for case in CASES if case.name == "ResNet-50 res4")
    problem = replace(case.problem, batch=32, device="cuda:0", precision="fp16")
    config = search(problem, case.filter(), H200)[0]
    for name, configs in neighbours(config, problem, case.filter(), H200).items():
        assert configs
        for other in configs:
            assert getattr(other, name) != getattr(config, name)
            assert replace(other, **{name: getattr(config, name)}) == config


def test_uneven_rows_are_dealt_evenly() -> None:
    case = next(case for case in CASES if case.name == "uneven rows")
    problem = replace(case.problem, device="cuda:0")
    config = DirectConfig(1, 4, 1, 2, 1, 4, 8, 2)
    nnz = np.diff(case.filter().indptr)

    def heaviest(balanced: bool) -> int:
        channels = lay_out(problem, case.filter(), replace(config, balanced=balanced)).channel_of
        assert sorted(channels[channels >= 0].tolist()) == list(range(problem.out_channels))
        return max(int(nnz[warp[warp >= 0]].sum()) for warp in channels.reshape(-1, config.out_channels))

    assert heaviest(balanced=True) < heaviest(balanced=False)


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("fp16", 2)])
def test_batches_end_where_32_bits_do(precision: str, itemsize: int) -> None:
    problem = Problem(1, 64, 112, 112, 8, (3, 3), precision=precision, device="cuda:0")  # type: ignore[arg-type]
    sample_bytes = 64 * 112 * 112 * itemsize
    most = most_samples(problem)
    assert most * sample_bytes < 2**32 <= (most + 1) * sample_bytes
    reason = DirectCuda().unsupported(replace(problem, batch=most + 1))
    assert reason is not None and f"{most} samples" in reason
    wide = replace(problem, in_channels=1, out_channels=128)
    assert most_samples(wide) * 128 * 110 * 110 < 2**31


def test_a_weight_beyond_half_precision_is_refused() -> None:
    problem = Problem(1, 1, 4, 4, 1, (1, 1), precision="fp16", device="cuda:0")
    sparse_filter = SparseFilter.from_dense(torch.full(problem.weight_shape, 1e5))
    with pytest.raises(ValueError, match="does not fit fp16; use bf16"):
        lay_out(problem, sparse_filter, DirectConfig(1, 1, 1, 4, 1, 4, 4, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_on_the_gpu(case: Case, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("ESCORT_EVERY_LANE"):  # for racecheck, as kernels/cuda/direct.cu says of SIGNALS
        monkeypatch.setattr("escort.methods.cuda.direct.defines", lambda *of: defines(*of) | {"SIGNALS": LANES})
    method, sparse_filter = DirectCuda(), case.filter()
    problem = replace(case.problem, device="cuda:0", precision=precision)
    assert method.unsupported(problem) is None
    configs = method.configs(problem, sparse_filter)
    chosen = (configs[0], configs[len(configs) // 2], configs[-1], small_ring(problem))
    check_kernels(method, case, "cuda:0", precision, chosen)


class Launches:
    """Stands in for a compiled kernel and records its launches."""

    def __init__(self) -> None:
        self.binary, self.bound = None, tuple[Any, ...]()
        self.calls: list[tuple[Any, ...]] = []

    def bind_spread(self, block: int, shared_bytes: int, args: tuple[Any, ...], *, blocks: int) -> Any:
        self.bound = (block, shared_bytes, args, blocks)
        return lambda grid, *args: self.calls.append((grid, *args))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    kernel = Launches()
    monkeypatch.setattr("escort.methods.cuda.direct.kernel", lambda source, defines, device: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return kernel


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_runner_launches_a_tile_per_block(launches: Launches, precision: str) -> None:
    problem = Problem(4, 8, 14, 14, 16, (3, 3), padding=(1, 1, 1, 1), precision=precision)  # type: ignore[arg-type]
    config = DirectConfig(2, 2, 1, 4, 1, 4, 4, 2)
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    run = DirectCuda().prepare(problem, sparse_filter, torch.zeros(16), config)
    for samples in (0, 1, 4, 7):
        x = torch.zeros(samples, 8, 14, 14, dtype=problem.storage)
        y = run(x)
        assert y.shape == (samples, 16, 14, 14) and y.dtype is problem.storage
    words = (1, 4, 7) if precision == "fp32" else (1, 2, 4)
    # 15 x 15 positions per sample, up to the last output; 2 groups of 8 output channels.
    assert [grid for grid, *_ in launches.calls] == [(2, -(-(n * 225 - 16) // config.tile), 1) for n in words]
    for samples, (grid, *passed) in zip((1, 4, 7), launches.calls, strict=True):
        assert passed[3:] == [samples, grid[1]]
    block, shared_bytes, args, overlap = launches.bound
    assert block == config.threads and overlap and args.count(int) == 2
    assert not any(isinstance(arg, np.generic) for arg in args)  # a launch takes no numbers of numpy
    assert shared_bytes > config.stages * config.channel_block * Layout.of(problem, config.tile).channel_words * 4


@pytest.mark.parametrize(
    ("x", "residual", "says"),
    [
        (torch.zeros(1, 8, 14, 14), None, "prepared for float16 .* got torch.float32"),
        (torch.zeros(1, 8, 14, 13, dtype=torch.float16), None, "14, 13"),
        (torch.zeros(1, 8, 14, 14, dtype=torch.float16), None, "prepared for a residual"),
        (torch.zeros(1, 8, 14, 14, dtype=torch.float16), torch.zeros(1, 16, 14, 14), "residual is float16"),
        (torch.zeros(2, 8, 14, 14, dtype=torch.float16), torch.zeros(1, 16, 14, 14, dtype=torch.float16), "residual"),
    ],
)
def test_a_runner_refuses_other_tensors(
    launches: Launches, x: torch.Tensor, residual: torch.Tensor | None, says: str
) -> None:
    problem = Problem(1, 8, 14, 14, 16, (3, 3), padding=(1,) * 4, precision="fp16", epilogue=Epilogue(residual=True))
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    run = DirectCuda().prepare(problem, sparse_filter, None, DirectConfig(2, 2, 1, 4, 1, 4, 4, 2))
    with pytest.raises(ValueError, match=says):
        run(x, residual)
    assert not launches.calls


def test_columns_that_are_read_in_pairs_are_aligned(launches: Launches) -> None:
    problem = Problem(1, 8, 14, 14, 16, (3, 3), padding=(1, 1, 1, 1), precision="fp16")
    sparse_filter = SparseFilter.from_dense(torch.ones(problem.weight_shape))
    run = DirectCuda().prepare(problem, sparse_filter, None, DirectConfig(2, 2, 1, 4, 1, 4, 4, 2))
    odd = torch.zeros(8 * 14 * 14 + 1, dtype=torch.float16)[1:].view(1, 8, 14, 14)
    assert odd.data_ptr() % 4 == 2
    run(odd)
    assert launches.calls[0][1].data_ptr() % 4 == 0
