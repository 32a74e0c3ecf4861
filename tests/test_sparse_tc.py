"""Method `sparse_tc`: what it refuses, its search, its kernels' machine code, and on a GPU their results."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from escort import reference
from escort.cuda import compiler
from escort.cuda.gpu import H200
from escort.cuda.params import pack
from escort.filter import SparseFilter
from escort.layers import runners
from escort.methods.cuda import sparse_tc
from escort.methods.cuda.sparse_tc import SparseTc, SparseTcConfig
from escort.methods.cuda.sparse_tc.model import Remainder, predict_us
from escort.methods.cuda.sparse_tc.orders import OrderedFilter, order_filter
from escort.methods.cuda.sparse_tc.packing import Packed
from escort.methods.cuda.sparse_tc.packing import pack as pack_filter
from escort.methods.cuda.sparse_tc.params import Params
from escort.methods.cuda.sparse_tc.search import candidates, is_offered, search
from escort.methods.cuda.sparse_tc.tiling import Tiling
from escort.problem import Activation, Epilogue, MemoryFormat, Precision, Problem
from tests.cases import CASES, FULL, Case, check_kernels
from tests.sparse_tc_model import emulate
from tests.test_sparse_tc_layout import structured, uneven

SAME = (1, 1, 1, 1)
RES4 = Problem(128, 256, 14, 14, 256, (3, 3), padding=SAME, precision="fp16", device="cuda:0")
POINTWISE = replace(RES4, out_channels=1024, kernel_size=(1, 1), padding=(0, 0, 0, 0))
STRIDED = replace(RES4, stride=(2, 1), padding=(1, 1, 0, 2))
LAST: MemoryFormat = "channels_last"
NONE, ALL = (Remainder(dict.fromkeys((64, 128, 256), share), dict.fromkeys((64, 128), share)) for share in (0.0, 1.0))


def filter_of(problem: Problem) -> SparseFilter:
    return SparseFilter.from_dense(uneven(problem.weight_shape))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "fp32"}, "ask for TF32, fp16 or bf16"),
        ({"groups": 2}, "groups are slices of tensors"),
        ({"groups": 2, "memory_format": "channels_last", "precision": "tf32"}, "those of 16 bits in channels_last"),
        ({"groups": 8, "memory_format": "channels_last"}, "make groups wider"),
        ({"height": 4096, "width": 4096}, "use a smaller input"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    refused = SparseTc().unsupported(replace(RES4, **change))  # type: ignore[arg-type]
    assert refused is not None and reason in refused


def test_a_device_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(arch: str) -> None:
        for module in ("escort.cuda.kernel", "escort.methods.cuda.sparse_tc"):
            monkeypatch.setattr(f"{module}.arch", lambda device, *, native: arch if native else arch.removesuffix("a"))

    on("sm_100a")
    assert "this is sm_100a" in str(SparseTc().unsupported(RES4))
    on("sm_90a")
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)
    assert SparseTc().unsupported(RES4) is SparseTc().unsupported(replace(RES4, precision="tf32")) is None
    assert "no tiling fits" in str(SparseTc().unsupported(replace(RES4, stride=(9, 9))))


@pytest.mark.parametrize("problem", [RES4, POINTWISE, STRIDED, replace(RES4, precision="tf32")], ids=str)
def test_the_search_ranks_what_fits(problem: Problem) -> None:
    sparse_filter = filter_of(problem)
    for memory_format in ("contiguous", "channels_last"):
        configs = search(problem, sparse_filter, H200, 6, memory_format)  # type: ignore[arg-type]
        assert len(set(configs)) == 6 and {config.memory_format for config in configs} == {memory_format}
        tilings = [Tiling.of(problem, config, H200.shared_bytes) for config in configs]
        assert all(tiling.memory.bytes <= H200.shared_bytes for tiling in tilings)
        times = [predict_us(tiling, NONE, H200) for tiling in candidates(problem, H200, memory_format)]  # type: ignore[arg-type]
        assert min(predict_us(tiling, NONE, H200) for tiling in tilings) < 1.1 * min(times)
        assert len({replace(config, cluster=1) for config in configs}) >= 3, "of some variety"
        assert predict_us(tilings[0], NONE, H200) < 1.1 * min(times), "best guess first"


@pytest.mark.parametrize(("longer", "first"), [(1.1, [False, True]), (1.3, [False, False])])
def test_the_best_of_both_kinds_comes_first_where_they_are_close(
    longer: float, first: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(tiling: Tiling, remainder: Remainder, gpu: Any) -> float:
        return longer if tiling.config.by_turns else 1.0

    monkeypatch.setitem(search.__globals__, "predict_us", predicted)
    configs = search(RES4, filter_of(RES4), H200, 6, "channels_last")
    assert [config.by_turns for config in configs[:2]] == first


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_thread_blocks_share_tiles_where_these_are_few(precision: Precision) -> None:
    few = replace(RES4, batch=1, in_channels=512, height=7, width=7, precision=precision, memory_format=LAST)
    shared = [tiling for tiling in candidates(few, H200, LAST) if tiling.config.split > 1]
    assert {tiling.config.split for tiling in shared} == {2, 4, 8}
    for tiling in shared:
        split, groups = tiling.config.split, len(tiling.tap_groups)
        assert tiling.tiles(1) * tiling.channel_tiles * split <= H200.multiprocessors
        assert is_offered(few, H200, tiling.config) and not is_offered(replace(few, batch=128), H200, tiling.config)
        begins = np.array(tiling.first_groups)
        assert len(begins) == 2 * split and begins[0] == 0, "those of each warpgroup"
        counts = np.diff([*begins, groups])
        assert counts.min() >= 1 and np.ptp(counts[::2] + counts[1::2]) <= 1, "equal shares"
    alone = [tiling for tiling in candidates(few, H200, LAST) if tiling.config.split == 1]
    best, best_alone = (min(predict_us(tiling, NONE, H200) for tiling in tilings) for tilings in (shared, alone))
    assert best < 0.7 * best_alone
    for other in (replace(few, batch=128), replace(few, memory_format="contiguous")):
        assert all(tiling.config.split == 1 for tiling in candidates(other, H200, other.memory_format))


def test_predictions_follow_the_work() -> None:
    tiling = Tiling.of(RES4, SparseTcConfig("halo", 216, rows=14), H200.shared_bytes)
    less = Tiling.of(replace(RES4, batch=32), tiling.config, H200.shared_bytes)
    assert predict_us(less, NONE, H200) < predict_us(tiling, NONE, H200) < predict_us(tiling, ALL, H200)
    twice = Tiling.of(replace(RES4, precision="tf32"), tiling.config, H200.shared_bytes)
    assert 1.5 < predict_us(twice, NONE, H200) / predict_us(tiling, NONE, H200) < 2.5, "half the channels in a step"


# One of each kind of kernel: tap groups, warpgroups, blocks of channels, clusters, memory formats, epilogues, vectors
VARIANTS = {
    "halo": (RES4, SparseTcConfig("halo", 216, rows=14, cluster=2)),
    "halo along": (replace(RES4, epilogue=FULL), SparseTcConfig("halo", 112, across=1, rows=14)),
    "halo, uneven": (replace(RES4, epilogue=FULL, width=13), SparseTcConfig("halo", 120, m_blocks=2, rows=8)),
    "columns": (replace(RES4, epilogue=FULL, precision="bf16"), SparseTcConfig("columns", 224, rows=14, cluster=4)),
    "columns of 16": (replace(RES4, epilogue=FULL, width=16), SparseTcConfig("columns", 224, rows=14)),
    "flat": (POINTWISE, SparseTcConfig("flat", 128, m_blocks=2, cluster=8)),
    "flat, one block": (POINTWISE, SparseTcConfig("flat", 256)),
    "im2col": (replace(STRIDED, epilogue=FULL), SparseTcConfig("im2col", 256)),
    "im2col along": (STRIDED, SparseTcConfig("im2col", 128, across=1, m_blocks=2)),
    "halo, last": (RES4, SparseTcConfig("halo", 216, rows=14, memory_format=LAST)),
    "halo of samples, last": (
        replace(RES4, epilogue=FULL),
        SparseTcConfig("halo", 224, across=1, rows=14, samples=2, memory_format=LAST),
    ),
    "columns, last": (
        replace(RES4, epilogue=FULL, precision="bf16"),
        SparseTcConfig("columns", 120, across=1, rows=14, memory_format=LAST),
    ),
    "flat, last": (
        replace(POINTWISE, epilogue=FULL),
        SparseTcConfig("flat", 128, m_blocks=2, cluster=2, memory_format=LAST),
    ),
    "im2col, last": (
        replace(STRIDED, epilogue=FULL),
        SparseTcConfig("im2col", 128, across=1, m_blocks=2, memory_format=LAST),
    ),
}
IN_TF32 = ("halo", "halo along", "halo, uneven", "columns", "flat", "im2col", "im2col along", *list(VARIANTS)[-5:])
VARIANTS |= {
    "im2col by turns": (STRIDED, SparseTcConfig("im2col", 192, across=1, by_turns=True)),
    "columns by turns, last": (
        replace(RES4, epilogue=FULL),
        SparseTcConfig("columns", 112, across=1, rows=7, memory_format=LAST, by_turns=True),
    ),
    "flat by turns, last": (
        replace(POINTWISE, epilogue=FULL),
        SparseTcConfig("flat", 128, across=1, m_blocks=2, cluster=2, memory_format=LAST, by_turns=True),
    ),
}
IN_TF32 += ("columns by turns, last",)
VARIANTS |= {
    "flat shared, last": (
        replace(POINTWISE, epilogue=FULL),
        SparseTcConfig("flat", 48, across=1, memory_format=LAST, by_turns=True, split=2),
    ),
    "columns shared, last": (
        replace(RES4, epilogue=FULL, precision="bf16"),
        SparseTcConfig("columns", 64, across=1, rows=4, memory_format=LAST, by_turns=True, split=4),
    ),
    "im2col shared, last": (
        STRIDED,
        SparseTcConfig("im2col", 64, across=1, m_blocks=2, memory_format=LAST, by_turns=True, split=8),
    ),
}
IN_TF32 += ("flat shared, last",)
VARIANTS |= {
    f"{name}, tf32": (replace(problem, precision="tf32"), config)
    for name, (problem, config) in VARIANTS.items()
    if name in IN_TF32
}
of_each_kind = pytest.mark.parametrize(("problem", "config"), VARIANTS.values(), ids=VARIANTS)
PLAIN = {name: variant for name, variant in VARIANTS.items() if not variant[1].by_turns}
of_each_plain_kind = pytest.mark.parametrize(("problem", "config"), PLAIN.values(), ids=PLAIN)


def test_layers_share_kernels() -> None:
    """What only the geometry, the epilogue or the cluster tells apart is computed by one kernel."""
    other = replace(POINTWISE, in_channels=192, out_channels=320, height=7, width=28, epilogue=FULL)
    strided = replace(STRIDED, kernel_size=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0))
    pairs = [
        ((POINTWISE, SparseTcConfig("flat", 128, cluster=2)), (other, SparseTcConfig("flat", 128))),
        ((STRIDED, SparseTcConfig("im2col", 256)), (strided, SparseTcConfig("im2col", 256, cluster=2))),
        ((RES4, SparseTcConfig("halo", 216, rows=14)), (replace(RES4, width=7), SparseTcConfig("halo", 216, rows=14))),
    ]
    for pair in pairs:
        one, another = (
            Tiling.of(problem, replace(config, memory_format=LAST), H200.shared_bytes) for problem, config in pair
        )
        assert (one.source.digest, one.defines) == (another.source.digest, another.defines)


@of_each_plain_kind
@pytest.mark.parametrize("activation", ["prelu", "silu", "gelu"])
def test_activations_assemble_with_hardly_a_spill(
    problem: Problem, config: SparseTcConfig, activation: Activation
) -> None:
    binary = compiled(replace(problem, epilogue=replace(problem.epilogue, activation=activation)), config)
    assert binary.defines["ACTIVATION"] == ("leaky_relu" if activation == "prelu" else activation)
    assert binary.spill_bytes <= 32, "a few values, around the stores"


def compiled(problem: Problem, config: SparseTcConfig) -> compiler.Binary:
    tiling = Tiling.of(problem, config, H200.shared_bytes)
    return compiler.compile_source(tiling.source, tiling.defines, "sm_90a")


@of_each_kind
def test_everything_assembles_without_spills(problem: Problem, config: SparseTcConfig) -> None:
    binary = compiled(problem, config)
    assert binary.spill_bytes == binary.stack_bytes == 0


def machine_code(binary: compiler.Binary, folder: Path) -> tuple[list[str], dict[str, int]]:
    """The instructions, and where labels point. Skips where there is no disassembler."""
    beside = Path(np.__file__).parents[1].glob("nvidia/*/bin/nvdisasm")
    disassembler = shutil.which("nvdisasm") or next(map(str, beside), None)
    if disassembler is None:
        pytest.skip("nvdisasm is not installed (nvidia-cuda-nvcc or the CUDA toolkit has it)")
    (folder / "kernel.cubin").write_bytes(binary.cubin)
    command = [disassembler, "-c", str(folder / "kernel.cubin")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?) ;", line):
            code.append(instruction[1].strip())
    return code, labels


def overwritten(code: list[str], labels: dict[str, int], sets: int) -> list[str]:
    """Instructions that write a register of metadata while a sparse product may still read it, on any way through.

    A register is free, or read by the group of products that is being issued, by the last one or by an older one.
    """
    metadata = {at: int(re.findall(r"\bR(\d+)\b", text)[-1]) for at, text in enumerate(code) if "HGMMA.SP" in text}
    registers = sorted(set(metadata.values()))
    assert len(registers) == sets
    writes: dict[int, list[int]] = {}
    for at, text in enumerate(code):
        written = re.match(r"(?:@!?U?P\d+ )?([A-Z0-9_.]+) (?:U?P[0-9T]+, )*R(\d+)\b", text)
        if at in metadata or not written or re.match(r"(ST|SYNCS|UTMA|UBLK|BRA|RED)", written[1]):
            continue
        name, first = written[1], int(written[2])
        wide = 4 if ".128" in name or ".M88.4" in name else 2 if re.search(r"\.64|WIDE|\.2\b", name) else 1
        writes[at] = [register for register in registers if first <= register < first + wide]
    ways = [(0, ("free",) * len(registers))]
    seen: set[tuple[int, tuple[str, ...]]] = set()
    bad: dict[int, str] = {}
    while ways:
        at, state = ways.pop()
        if at >= len(code) or (at, state) in seen:
            continue
        seen.add((at, state))
        text, now = code[at], list(state)
        if at in metadata:
            now[registers.index(metadata[at])] = "open"
            if "gsb0" in text:  # closes the group
                now = [{"last": "older", "open": "last"}.get(readers, readers) for readers in now]
        elif wait := re.search(r"DEPBAR.LE gsb0, 0x([0-9]+)", text):
            done = ("older", "last") if wait[1] == "0" else ("older",)
            now = ["free" if readers in done else readers for readers in now]
        touched = [now[registers.index(register)] for register in writes.get(at, [])]
        if text.startswith("LDS") and "last" in touched:
            continue  # steps take turns with the sets, so there is no such way
        if any(readers != "free" for readers in touched):
            bad[at] = text
        if target := re.search(r"\bBRA[A-Z0-9_.]* .*`\((\.L_x_\d+)\)", text):
            ways.append((labels[target[1]], tuple(now)))
        if not text.startswith(("BRA ", "EXIT", "RET", "BPT.TRAP")):
            ways.append((at + 1, tuple(now)))
    return list(bad.values())


@of_each_kind
def test_metadata_stays_while_products_read_it(problem: Problem, config: SparseTcConfig, tmp_path: Path) -> None:
    check_metadata(problem, config, tmp_path)


@of_each_plain_kind
@pytest.mark.parametrize("activation", ["prelu", "silu", "gelu"])
def test_metadata_stays_before_activations(
    problem: Problem, config: SparseTcConfig, activation: Activation, tmp_path: Path
) -> None:
    check_metadata(replace(problem, epilogue=replace(problem.epilogue, activation=activation)), config, tmp_path)


def check_metadata(problem: Problem, config: SparseTcConfig, tmp_path: Path) -> None:
    code, labels = machine_code(compiled(problem, config), tmp_path)
    assert overwritten(code, labels, 2 * config.m_blocks) == []
    # Three ways to issue a step, for each set; more groups would mean that the compiler waits for each product.
    assert sum("HGMMA.SP" in text and "gsb0" in text for text in code) == 6


def test_the_check_of_metadata_notices(tmp_path: Path) -> None:
    code, labels = machine_code(compiled(*VARIANTS["halo"]), tmp_path)
    first = next(at for at, text in enumerate(code) if "HGMMA.SP" in text and "gsb0" in text)
    register = re.findall(r"\bR(\d+)\b", code[first])[-1]
    code[first + 1] = f"IMAD.MOV.U32 R{register}, RZ, RZ, R1"
    assert overwritten(code, labels, 2) == [code[first + 1]]


class Model:
    """A kernel on the CPU: what its source does, in numpy, with what it is launched with."""

    def __init__(self, source: compiler.Source, defines: compiler.Defines, device: torch.device, native: bool) -> None:
        self.source, self.defines, self.binary = str(source), defines, None

    @classmethod
    def of(cls, source: Any, defines: Any, device: torch.device, *, native: bool = False) -> Model:
        assert native is (str(source) == "sparse_tc.cu")
        return cls(source, defines, device, native)

    def bind(self, block: int, shared_bytes: int, args: Sequence[Any], *, overlap: bool, cluster: int = 1) -> Any:
        assert overlap and block == (384 if self.source == "sparse_tc.cu" else 256)
        if self.source != "sparse_tc.cu":
            return partial(self.lay_out, args[2])
        assert shared_bytes == Model.tiling.memory.bytes and cluster == Model.tiling.config.thread_blocks
        assert args[-3] == pack(Params.of(Model.tiling))
        return partial(self.multiply, args)

    def lay_out(self, order: torch.Tensor, grid: Any, x: torch.Tensor, to: torch.Tensor) -> None:
        padded = torch.nn.functional.pad(x.flatten(2), (0, 0, 0, 1))  # the last channel is none
        to[:] = padded[:, order.long()].transpose(1, 2)

    def multiply(self, bound: Sequence[Any], grid: Any, x: torch.Tensor, *args: Any) -> None:
        samples, tile_groups = args[-2:]
        tiling, last = Model.tiling, Model.tiling.config.takes_channels_last
        assert tile_groups == tiling.tile_groups(samples) and grid[0] % tiling.config.thread_blocks == 0
        a, bias, first, steps = (bound[i].numpy() for i in (1, 2, 3, 4))
        boxes = tiling.stores_boxes
        rows = np.arange(len(bias)) if boxes else bound[5].numpy()
        rows = np.where(rows < tiling.problem.out_channels, rows, -1).astype(np.int32)
        flat = x.permute(0, 2, 3, 1) if last else x
        p, x_begin = tiling.problem, bound[0].begin
        nhwc = flat.double().numpy().reshape(samples, p.height, p.width, -1)
        nhwc = nhwc[..., x_begin : x_begin + bound[0].sizes[0]] if bound[0].pitch else nhwc
        whole = tiling.config.tap_group != "flat"
        sizes = (p.width, p.height, 1, 3) if whole else (p.height * p.width, 1, 1, 1)
        x_map, y_map, residual_map = bound[0], *bound[-5:-3]
        assert (*x_map.sizes, x_map.samples_along) == (nhwc.shape[3], *sizes) and x_map.dtype is p.storage
        if tiling.config.tap_group == "im2col":
            top, bottom, left, right = p.padding
            corners = {"lower": (-left, -top), "upper": (right - p.kernel_size[1] + 1, bottom - p.kernel_size[0] + 1)}
            pixels = {"channels": 128 // p.storage.itemsize, "pixels": tiling.config.pixels}
            assert x_map.copied == {**corners, **pixels, "steps": (1, p.stride[1], p.stride[0], 1)}
        else:
            assert x_map.copied == {"box": tiling.load}
        if boxes:
            rows_apart = tiling.config.whole_rows
            out = (p.out_width, p.out_height, 1, 3) if rows_apart else (p.out_height * p.out_width, 1, 1, 1)
            assert (*y_map.sizes, y_map.samples_along) == (p.out_channels, *out) and y_map == residual_map
            assert y_map.copied == {"box": tiling.store} and y_map.dtype is p.storage
        y = torch.from_numpy(emulate(tiling, Packed(a, first, steps.view(np.uint32), rows, first[:0]), nhwc))
        by_channel = torch.zeros(p.out_channels, dtype=torch.float64)
        by_channel[rows[rows >= 0]] = torch.from_numpy(bias[rows >= 0]).double()
        own = slice(y_map.begin, y_map.begin + p.out_channels) if boxes else slice(None)
        out, residual = args[0][:, own], None if args[1] is None else args[1][:, own]
        y = y + by_channel.view(-1, 1, 1) + (residual.double() if residual is not None else 0.0)
        out[:] = y.clamp_min(0.0) if p.epilogue.activation == "relu" else y


@of_each_kind
def test_a_runner_launches_its_kernels(
    problem: Problem, config: SparseTcConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = 72 if config.split == 1 else 264
    problem = replace(problem, device="cpu", batch=2, in_channels=channels, out_channels=136)
    monkeypatch.setattr("escort.methods.cuda.sparse_tc.kernel", Model.of)
    monkeypatch.setattr("escort.methods.cuda.sparse_tc.arrange.kernel", Model.of)
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)
    monkeypatch.setattr(Model, "tiling", Tiling.of(problem, config, H200.shared_bytes), raising=False)
    weight = torch.from_numpy(uneven(problem.weight_shape))
    bias = torch.randn(136) if problem.epilogue.bias else None
    run = SparseTc().prepare(problem, SparseFilter.from_dense(weight), bias, config)
    assert run.notes["remainder_share"] > 0.0
    for batch in (0, 1, 3):
        x = torch.randn(batch, *problem.input_shape[1:]).to(problem.storage)
        residual = None
        if problem.epilogue.residual:
            residual = torch.randn(batch, *problem.output_shape[1:]).to(problem.storage)
        expected = reference.conv2d(replace(problem, batch=batch), x, weight, bias, residual)
        for variant in (x, x.contiguous(memory_format=torch.channels_last)):
            y = run(variant, residual)
            assert reference.compare(y, expected) <= reference.ERROR_BOUND[problem.precision]
            memory_format = torch.channels_last if config.takes_channels_last else torch.contiguous_format
            assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("kind", ["halo", "flat"])
def test_groups_are_launched_one_after_the_other(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_size, padding = ((1, 1), (0, 0, 0, 0)) if kind == "flat" else ((3, 3), SAME)
    epilogue = Epilogue(bias=True, residual=True, activation="relu")
    problem = Problem(2, 144, 14, 14, 272, kernel_size, padding=padding, groups=2, precision="fp16", epilogue=epilogue)
    config = SparseTcConfig(
        *(kind, 216 if kind == "halo" else 128),
        rows=14 if kind == "halo" else 0,
        memory_format=LAST,  # type: ignore[arg-type]
    )
    monkeypatch.setattr("escort.methods.cuda.sparse_tc.kernel", Model.of)
    monkeypatch.setattr("escort.cuda.gpu.Gpu.of", lambda device: H200)
    one = replace(problem, in_channels=72, out_channels=136, groups=1)
    monkeypatch.setattr(Model, "tiling", Tiling.of(one, config, H200.shared_bytes), raising=False)
    weight, bias = torch.from_numpy(uneven(problem.weight_shape)), torch.randn(272)
    run = SparseTc().prepare(problem, SparseFilter.from_dense(weight, 2), bias, config)
    x, residual = (torch.randn(3, *shape[1:]).half() for shape in (problem.input_shape, problem.output_shape))
    y = run(x, residual)
    expected = reference.conv2d(replace(problem, batch=3), x, weight, bias, residual)
    assert reference.compare(y, expected) <= reference.ERROR_BOUND["fp16"]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_runners_of_a_filter_share_its_weight_tiles_as_long_as_one_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(1, 64, 14, 14, 64, (1, 1), precision="fp16", memory_format="contiguous")
    config = SparseTcConfig("flat", 64, memory_format="channels_last")
    tiling, packings = Tiling.of(problem, config, H200.shared_bytes), []

    def counted(ordered: OrderedFilter, tiling: Tiling) -> Packed:
        packings.append(tiling)
        return pack_filter(ordered, tiling)

    monkeypatch.setattr(sparse_tc, "pack", counted)
    ordered = order_filter(SparseFilter.from_dense(uneven(problem.weight_shape)), config.memory_format, tiling.element)
    other = Tiling.of(replace(problem, height=6, width=6), config, H200.shared_bytes)
    device = torch.device("cpu")
    (first, _), (second, _) = (sparse_tc._packed_on(device, ordered, each) for each in (tiling, other))
    assert first is second and len(packings) == 1
    del first, second
    sparse_tc._packed_on(device, ordered, other)
    assert len(packings) == 2


# On a GPU


def on_the_gpu(case: Case, precision: Precision) -> list[SparseTcConfig]:
    """Some configs of a case there: of every tap group, and in both memory formats."""
    method, problem = SparseTc(), replace(case.problem, device="cuda:0", precision=precision)
    if (reason := method.unsupported(problem)) is not None:
        pytest.skip(reason)
    configs = list(method.configs(problem, case.filter()))
    tap_groups = {tiling.config.tap_group: tiling.config for tiling in candidates(problem, H200, "contiguous")}
    return list(dict.fromkeys([configs[0], configs[-1], *tap_groups.values()]))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, precision: Precision) -> None:
    check_kernels(SparseTc(), case, "cuda:0", precision, on_the_gpu(case, precision), tensor_cores=True)


def check(problem: Problem, weight: np.ndarray, config: SparseTcConfig, batches: tuple[int, ...]) -> None:
    """One runner for any batch, twice the same, for x in both memory formats and in no one's."""
    sparse_filter = SparseFilter.from_dense(weight)
    bias = torch.randn(problem.out_channels) if problem.epilogue.bias else None
    slope = torch.rand(problem.out_channels) if problem.epilogue.activation == "prelu" else None
    run = SparseTc().prepare(problem, sparse_filter, bias, config, slope)
    for batch in batches:
        shape = batch, *problem.input_shape[1:]
        x = torch.randn(shape, device="cuda", dtype=problem.storage)
        odd = torch.randn(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(shape)  # not aligned
        others = (x.contiguous(memory_format=torch.channels_last), x.flip(3), odd) if batch < 8 else ()
        for variant in (x, *others):
            out_shape = batch, *problem.output_shape[1:]
            residual = torch.randn(out_shape, device="cuda", dtype=x.dtype) if problem.epilogue.residual else None
            y = run(variant, residual)
            expected = reference.conv2d(
                replace(problem, batch=batch), variant, sparse_filter.to_dense().cuda(), bias, residual, slope
            )
            last = config.takes_channels_last
            assert y.shape == expected.shape
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            assert reference.compare(y, expected) <= reference.ERROR_BOUND[problem.precision], (config, batch)
            assert torch.equal(run(variant, residual), y), "not the same twice: a race"


@pytest.mark.gpu
@of_each_kind
def test_any_batch_in_any_memory_format_on_the_gpu(problem: Problem, config: SparseTcConfig) -> None:
    check(problem, uneven(problem.weight_shape), config, (0, 1, 3, 70))


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["prelu", "silu"])
@of_each_kind
def test_activations_on_the_gpu(
    problem: Problem, config: SparseTcConfig, activation: Activation, residual: bool
) -> None:
    """In every way in which results are stored."""
    problem = replace(problem, epilogue=Epilogue(bias=True, residual=residual, activation=activation))
    check(problem, uneven(problem.weight_shape), config, (0, 1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize(
    "problem",
    [
        replace(RES4, batch=1, epilogue=FULL, memory_format=LAST),
        replace(RES4, batch=1, in_channels=512, out_channels=72, height=7, width=7, memory_format=LAST),
        replace(RES4, batch=1, in_channels=136, stride=(2, 2), epilogue=FULL, memory_format=LAST),
        replace(POINTWISE, batch=1, in_channels=2056, out_channels=200, height=7, width=7, memory_format=LAST),
    ],
    ids=str,
)
def test_thread_blocks_share_tiles_on_the_gpu(problem: Problem, precision: Precision, split: int) -> None:
    """As few samples as they do it for, and more; patterns that differ from run to run."""
    problem = replace(problem, precision=precision)
    seed = int.from_bytes(os.urandom(4), "little")
    generator = np.random.default_rng(seed)
    rows, channels = (generator.lognormal(size=(size, 1, 1, 1)) for size in problem.weight_shape[:2])
    kept = generator.random(problem.weight_shape) < 0.1 * rows * channels.reshape(1, -1, 1, 1)
    weight = np.where(kept, generator.standard_normal(problem.weight_shape), 0).astype(np.float32)
    tilings = [tiling for tiling in candidates(problem, H200, LAST) if tiling.config.split == split]
    print("seed", seed)
    for tiling in [*tilings[:1], *tilings[len(tilings) // 2 :: len(tilings)], *tilings[-1:]]:
        check(problem, weight, tiling.config, (1, 2, 9))


@pytest.mark.gpu
@of_each_kind
def test_structured_filters_on_the_gpu(problem: Problem, config: SparseTcConfig) -> None:
    weight = structured(problem.weight_shape, problem.precision)
    run = SparseTc().prepare(problem, SparseFilter.from_dense(weight), None, config)
    assert run.notes["remainder_share"] == 0.0
    check(problem, weight, config, (2,))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("size", [(13, 17), (1, 1), (28, 28)])
def test_other_input_sizes_on_the_gpu(size: tuple[int, int], precision: Precision) -> None:
    """Another config where a tile's pixels do not hold its outputs."""
    problem = replace(RES4, batch=2, height=size[0], width=size[1], precision=precision)
    sparse_filter = filter_of(problem)
    x = torch.randn(problem.input_shape, device="cuda", dtype=problem.storage)
    expected = reference.conv2d(problem, x, sparse_filter.to_dense())
    for config in (VARIANTS["halo"][1], VARIANTS["columns"][1], VARIANTS["im2col"][1]):
        y = runners.prepare(problem, sparse_filter, None, runners.Choice(problem, "sparse_tc", asdict(config)))(x)
        assert reference.compare(y, expected) <= reference.ERROR_BOUND[problem.precision], config


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_nan_and_infinity_stay_what_they_are_on_the_gpu(activation: str, precision: Precision) -> None:
    problem = replace(RES4, batch=1, epilogue=Epilogue(activation=activation), precision=precision)  # type: ignore[arg-type]
    sparse_filter = SparseFilter.from_dense(np.ones(problem.weight_shape, dtype=np.float32))
    x = torch.zeros(problem.input_shape, device="cuda", dtype=problem.storage)
    for config in (VARIANTS["halo"][1], VARIANTS["halo, last"][1]):
        run = SparseTc().prepare(problem, sparse_filter, None, config)
        x[0, 5, 7, 7] = float("nan")
        y = run(x)
        assert y[0, :, 6:9, 6:9].isnan().all() and int(y.isnan().sum()) == 9 * problem.out_channels
        x[0, 5, 7, 7] = float("inf")
        assert torch.equal(run(x), reference.conv2d(problem, x, sparse_filter.to_dense()).to(x.dtype))


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Tensor maps of the tensors that were captured, and kernels that overlap."""
    problem = replace(RES4, batch=4)
    run = SparseTc().prepare(problem, filter_of(problem), None, VARIANTS["halo"][1])
    x = torch.randn(problem.input_shape, device="cuda", dtype=torch.float16)
    expected = run(run(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(run(x))
    graph.replay()
    assert torch.equal(y, expected)
    x.zero_()
    graph.replay()
    assert int(y.count_nonzero()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["halo", "halo, last"])
def test_threads_share_a_runner_on_streams_of_their_own(kind: str) -> None:
    """Of any batch, at addresses that change."""
    problem = replace(RES4, batch=4, epilogue=Epilogue(residual=True))
    run = SparseTc().prepare(problem, filter_of(problem), None, VARIANTS[kind][1])
    samples = [1, 2, 3, 5]
    inputs = [torch.randn(n, *problem.input_shape[1:], device="cuda", dtype=torch.float16) for n in samples]
    residuals = [torch.randn(n, *problem.output_shape[1:], device="cuda", dtype=torch.float16) for n in samples]
    expected = [run(x, residual) for x, residual in zip(inputs, residuals, strict=True)]
    torch.cuda.synchronize()

    def work(first: int) -> list[tuple[int, torch.Tensor]]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [(i % 4, run(inputs[i % 4], residuals[i % 4])) for i in range(first, first + 40)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(4)):
            assert all(torch.equal(y, expected[i]) for i, y in results)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "out_channels", "size", "taps", "stride"),
    [(96, 256, 27, 5, 1), (384, 384, 13, 3, 1), (384, 256, 13, 3, 1), (128, 192, 14, 1, 1), (192, 128, 15, 3, 2)],
)
def test_groups_on_the_gpu(channels: int, out_channels: int, size: int, taps: int, stride: int) -> None:
    epilogue = Epilogue(bias=True, residual=stride == 1, activation="relu")
    problem = Problem(
        *(5, channels, size, size, out_channels, (taps, taps), (stride, stride), (taps // 2,) * 4),
        groups=2,
        precision="fp16",
        device="cuda:0",
        memory_format=LAST,
        epilogue=epilogue,
    )
    torch.manual_seed(0)
    weight = torch.randn(problem.weight_shape) * (torch.rand(problem.weight_shape) < 0.15)
    bias, sparse_filter = torch.randn(out_channels), SparseFilter.from_dense(weight, 2)
    x, residual = (
        torch.randn(shape, device="cuda").half().contiguous(memory_format=torch.channels_last)
        for shape in (problem.input_shape, problem.output_shape)
    )
    added = residual if epilogue.residual else None
    expected = reference.conv2d(problem, x, weight.cuda(), bias.cuda(), added)
    assert SparseTc().unsupported(problem) is None
    for config in SparseTc().configs(problem, sparse_filter):
        y = SparseTc().prepare(problem, sparse_filter, bias, config)(x, added)
        assert reference.compare(y, expected) <= reference.ERROR_BOUND["fp16"], config
