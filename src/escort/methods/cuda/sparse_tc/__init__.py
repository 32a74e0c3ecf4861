"""Method `sparse_tc`: sparse tensor cores, which skip two of each four weights (kernels/cuda/sparse_tc.cuh).

An unstructured filter is the exact sum of one that keeps at most two of four neighbouring input channels (in TF32 one
of two) and of the remainder, which is a second one and mostly empty (split.py, packing.py). Tensor cores read
channels_last: x in NCHW is arranged so by a kernel of its own (arrange.py), which puts the channels in an order with a
small remainder (orders.py), and y is written in NCHW. Tensors in channels_last are read and written as they are.

`config` has the knobs, `tiling` what they mean for a convolution, and `search` lists those worth timing by `model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from escort.cuda import tensor_map
from escort.cuda.compiler import Variant
from escort.cuda.gpu import Gpu
from escort.cuda.kernel import Kernel, Launch, arch, kernel, unavailable
from escort.cuda.launch import Grid
from escort.cuda.params import pack as pack_params
from escort.cuda.tensor_map import TensorMap
from escort.filter import FloatArray, IntArray, SparseFilter
from escort.methods import activation
from escort.methods.base import Method, Prepared
from escort.methods.cuda.sparse_tc.arrange import arranger, arranging_kernel
from escort.methods.cuda.sparse_tc.config import ELEMENTS, SparseTcConfig
from escort.methods.cuda.sparse_tc.model import Remainder, predict_us
from escort.methods.cuda.sparse_tc.orders import OrderedFilter, common_order, order_filter
from escort.methods.cuda.sparse_tc.packing import Packed, pack, tiles_key
from escort.methods.cuda.sparse_tc.params import Params
from escort.methods.cuda.sparse_tc.search import candidates, is_offered, search
from escort.methods.cuda.sparse_tc.tiling import Tiling, im2col_corners
from escort.methods.runner import runner
from escort.methods.sharing import shared
from escort.problem import MemoryFormat, Precision, Problem

__all__ = ["SparseTc", "SparseTcConfig"]

_MOST_CONFIGS, _MOST_BENCHMARKS = 8, 3
_THREADS = 384  # of a block of sparse_tc.cuh
_MOST_ELEMENTS = 2**31 - 1  # that 32 bits number
_TILE_ELEMENTS = 1024  # that the last tile may number beyond y
#: A filter of fewer zeros has a remainder in every weight tile, so that both take as many products as a dense library,
#: which multiplies at this rate at most; of shorter layers the time is that of something else.
_LEAST_SPARSITY, _PRODUCTS_PER_US, _LEAST_PRODUCTS_US = 0.4, {"fp16": 330e6, "bf16": 330e6, "tf32": 165e6}, 4.0
_LEAST_GROUP = 64  # output channels of a group, which are a block of a tile
_PIXELS = 1  # the dimension of a tensor map along which pixels of all samples lie, where they are one row


class SparseTc(Method):
    """Sparse tensor cores of NVIDIA GPUs of compute capability 9.0: TF32, fp16 and bf16, summed in fp32."""

    name = "sparse_tc"
    device_type = "cuda"
    config_type = SparseTcConfig

    def unsupported(self, problem: Problem) -> str | None:
        if problem.precision not in ELEMENTS:
            return "sparse tensor cores multiply no fp32; ask for TF32, fp16 or bf16"
        if problem.groups > 1 and (reason := _ungroupable(problem)):
            return reason
        if math.prod(problem.output_shape[1:]) + _TILE_ELEMENTS > _MOST_ELEMENTS:
            return "a sample has more outputs than 32 bits number; use a smaller input"
        device = torch.device(problem.device)
        if reason := unavailable(device, native=True):
            return reason
        if (native := arch(device, native=True)) != "sm_90a":
            return f"the kernel is made of instructions that compute capability 9.0 alone has, and this is {native}"
        if next(candidates(_of_one_group(problem), Gpu.of(problem.device), problem.memory_format), None) is None:
            return "no tiling fits its kernel, stride, padding and dilation"
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[SparseTcConfig]:
        first, gpu = _groups_of(sparse_filter)[0], Gpu.of(problem.device)
        return search(_of_one_group(problem), first, gpu, _MOST_CONFIGS, problem.memory_format)

    def kernels(self, problem: Problem, config: SparseTcConfig) -> Sequence[Variant]:
        tiling = Tiling.of(_of_one_group(problem), config, Gpu.of(problem.device).shared_bytes)
        arranging = () if config.takes_channels_last else (arranging_kernel(problem, tiling.element),)
        return (Variant(tiling.source, tiling.defines, native=True), *arranging)

    def offers(self, problem: Problem, sparse_filter: SparseFilter, config: SparseTcConfig) -> bool:
        return is_offered(_of_one_group(problem), Gpu.of(problem.device), config)

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: SparseTcConfig | None = None
    ) -> float:
        if config is None:
            if self.outdone(problem, sparse_filter):
                return _products_us(problem)
            (config,) = search(_of_one_group(problem), _groups_of(sparse_filter)[0], gpu, 1, problem.memory_format)
        tiling = Tiling.of(_of_one_group(problem), config, gpu.shared_bytes)
        ordered = (order_filter(each, config.memory_format, tiling.element) for each in _groups_of(sparse_filter))
        return sum(predict_us(tiling, Remainder.of(each), gpu) for each in ordered)

    def outdone(self, problem: Problem, sparse_filter: SparseFilter) -> str | None:
        if sparse_filter.sparsity >= _LEAST_SPARSITY or _products_us(problem) < _LEAST_PRODUCTS_US:
            return None
        return f"of {sparse_filter.sparsity:.0%} zeros it skips none: dense methods do as many products"

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[SparseTcConfig]:
        """What it would run if x and y were in channels_last, and nothing converted."""
        if problem.memory_format == "channels_last":
            return ()
        return search(problem, sparse_filter, Gpu.of(problem.device), _MOST_BENCHMARKS, "channels_last")

    def input_format(self, config: SparseTcConfig) -> MemoryFormat:
        return config.memory_format

    def channel_order(self, weights: Sequence[torch.Tensor], precision: Precision) -> torch.Tensor | None:
        if precision not in ELEMENTS:
            return None
        return common_order(weights, ELEMENTS[precision].kept, ELEMENTS[precision].of)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: torch.Tensor | None,
        config: SparseTcConfig,
        slope: torch.Tensor | None = None,
    ) -> Prepared:
        device, gpu = torch.device(problem.device), Gpu.of(problem.device)
        tiling = Tiling.of(_of_one_group(problem), config, gpu.shared_bytes)
        filters = _groups_of(sparse_filter)
        groups = [order_filter(each, config.memory_format, tiling.element) for each in filters]
        ordered = groups[0]
        compiled = kernel(tiling.source, tiling.defines, device, native=True)
        per_channel = [
            [None] * len(groups) if each is None else each.chunk(len(groups))
            for each in (bias, activation.slopes(problem, slope))
        ]
        launches = [
            _bind(compiled, tiling, _Slice(number, len(groups)), *_packed_on(device, group, tiling), *its_own)
            for number, (group, *its_own) in enumerate(zip(groups, *per_channel, strict=True))
        ]
        arrange, binaries, alignment = None, [compiled.binary], 16
        if not config.takes_channels_last:
            alignment = tiling.element.bytes * tiling.vector
            arrange, arranging = arranger(problem, tiling.element, ordered.in_order, device)
            binaries.append(arranging)
        clusters, most = gpu.clusters(config.thread_blocks), math.prod(problem.output_shape[1:]) + _TILE_ELEMENTS

        def cut(samples: int) -> tuple[Grid, int, int]:
            tile_groups = tiling.tile_groups(samples)
            blocks = min(tile_groups * tiling.channel_tiles, clusters) * config.thread_blocks
            return (blocks, 1, 1), samples, tile_groups

        run = runner(
            *(problem, launches[0] if len(launches) == 1 else _one_by_one(launches), cut),
            most_samples=_MOST_ELEMENTS // most,
            alignment=alignment,
            memory_format=config.memory_format,
            arrange=arrange,
        )
        share = sum(group.split.share for group in groups) / len(groups)
        return Prepared(run, compiled.binary, {"remainder_share": share}, tuple(binaries))


def _one_by_one(launches: Sequence[Launch]) -> Callable[..., None]:
    def launch(*args: Any) -> None:
        for each in launches:
            each(*args)

    return launch


@dataclass(frozen=True)
class _Slice:
    """The channels of one of a problem's groups, which has a launch of its own."""

    number: int
    groups: int

    def mapped(self, whole: TensorMap) -> TensorMap:
        """The map of its channels of a tensor, as of `whole` where that had no others."""
        channels = whole.sizes[0]
        return replace(whole, pitch=self.groups * channels, begin=self.number * channels)


def _ungroupable(problem: Problem) -> str | None:
    """Why a problem's groups are not run one after the other, None where they are."""
    if problem.memory_format != "channels_last" or problem.precision == "tf32":
        return "groups are slices of tensors, of which it takes those of 16 bits in channels_last"
    if (
        problem.out_channels // problem.groups < _LEAST_GROUP
        or problem.in_channels // problem.groups < _LEAST_GROUP // 2
    ):
        return "each group would fill blocks of channels of its own, mostly with zeros; make groups wider"
    return None


def _of_one_group(problem: Problem) -> Problem:
    channels = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    return replace(problem, in_channels=channels[0], out_channels=channels[1], groups=1)


def _groups_of(sparse_filter: SparseFilter) -> tuple[SparseFilter, ...]:
    """A filter's groups, each as a filter."""
    if sparse_filter.groups == 1:
        return (sparse_filter,)
    if (known := _grouped.get(sparse_filter)) is None:
        channels = sparse_filter.shape[0] // sparse_filter.groups
        parts = []
        for number in range(sparse_filter.groups):
            indptr = sparse_filter.indptr[number * channels : (number + 1) * channels + 1]
            nonzeros = slice(indptr[0], indptr[-1])
            columns, values = sparse_filter.columns[nonzeros], sparse_filter.values[nonzeros]
            parts.append(SparseFilter((channels, *sparse_filter.shape[1:]), 1, indptr - indptr[0], columns, values))
        known = _grouped[sparse_filter] = tuple(parts)
    return known


#: What :func:`_groups_of` returned, as long as the filter lives.
_grouped: WeakKeyDictionary[SparseFilter, tuple[SparseFilter, ...]] = WeakKeyDictionary()


def _products_us(problem: Problem) -> float:
    """The least time of the products of a dense filter."""
    products = math.prod(problem.output_shape) * math.prod(problem.weight_shape[1:])
    return products / _PRODUCTS_PER_US[problem.precision]


def _packed_on(device: torch.device, ordered: OrderedFilter, tiling: Tiling) -> tuple[torch.Tensor, Packed]:
    """The filter's weight tiles on a device, and how it is packed, without them. Most input sizes are packed alike."""

    def make() -> tuple[torch.Tensor, Packed]:
        packed = pack(ordered, tiling)
        weight_tiles = torch.from_numpy(packed.weight_tiles).to(device)
        return weight_tiles, replace(packed, weight_tiles=np.empty((0, 0), np.uint8))

    weight_tiles, packed = shared(ordered, (device, tiles_key(tiling)), make)
    return weight_tiles, packed.placed(tiling)


def _bind(
    compiled: Kernel,
    tiling: Tiling,
    of: _Slice,
    weight_tiles: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> Launch:
    """A launch for a group that is given x, y, the residual, the samples and the tile groups."""
    per_channel = _in_order(bias, packed.out_order)
    if slopes is not None:
        per_channel = np.concatenate([per_channel, _in_order(slopes, packed.out_order)])
    tables = [per_channel, packed.first, packed.steps.view(np.int32)]
    if not tiling.stores_boxes:
        tables.append(packed.out_order)
    fixed = [weight_tiles, *(torch.from_numpy(table).to(tiling.problem.device) for table in tables)]
    output = of.mapped(_output_map(tiling)) if tiling.stores_boxes else torch.Tensor
    args = of.mapped(_input_map(tiling)), *fixed, output, output, pack_params(Params.of(tiling)), int, int
    return compiled.bind(_THREADS, tiling.memory.bytes, args, overlap=True, cluster=tiling.config.thread_blocks)


def _in_order(of_channels: torch.Tensor | None, out_order: IntArray) -> FloatArray:
    """What the output channel at each place has, 0 where there is none."""
    values = np.zeros(len(out_order), dtype=np.float32)
    if of_channels is not None:
        values[out_order >= 0] = of_channels.detach().float().cpu().numpy()[out_order[out_order >= 0]]
    return values


def _input_map(tiling: Tiling) -> TensorMap:
    """How the copy engine sees x, which lies as the tensor cores read it."""
    p, config = tiling.problem, tiling.config
    sizes = tiling.channels, p.width, p.height, 1
    if config.tap_group == "im2col":
        lower, upper = im2col_corners(p)
        return tensor_map.im2col(p.storage, sizes, lower, upper, tiling.load[0], config.pixels, p.stride[::-1])
    if config.tap_group == "flat":
        return tensor_map.tiled(p.storage, (tiling.channels, p.height * p.width, 1, 1), tiling.load, _PIXELS)
    return tensor_map.tiled(p.storage, sizes, tiling.load)


def _output_map(tiling: Tiling) -> TensorMap:
    """How the copy engine sees y and the residual."""
    p = tiling.problem
    plane, along = (p.out_width, p.out_height, 1), 3
    if not tiling.config.whole_rows:
        plane, along = (p.out_height * p.out_width, 1, 1), _PIXELS
    return tensor_map.tiled(p.storage, (p.out_channels, *plane), tiling.store, along, rounded=False)
