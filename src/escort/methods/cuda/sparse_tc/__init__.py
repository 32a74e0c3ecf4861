"""Method `sparse_tc`: sparse tensor cores, which skip two of each four weights (kernels/cuda/sparse_tc.cuh).

An unstructured filter is the exact sum of one that keeps at most two of four neighbouring input channels (in TF32 one
of two) and of what is left over, which is a second one and mostly empty (packing.py). Tensor cores read channels_last:
x in NCHW is laid out so by a kernel of its own, which puts the channels in an order that leaves little over, and y is
written in NCHW. What is in channels_last is taken and given as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from escort.cuda import kernel as jit
from escort.cuda import tensor_map as tensor_maps
from escort.cuda.gpu import Gpu
from escort.filter import IntArray, SparseFilter, spread_channels
from escort.methods.base import Method, Prepared, aligned, input_check
from escort.methods.cuda.sparse_tc.packing import ordered, pack
from escort.methods.cuda.sparse_tc.search import Extra, candidates, predict_us, search
from escort.methods.cuda.sparse_tc.tiling import ELEMENTS, Element, SparseTcConfig, Tiling, at_once, im2col_corners
from escort.problem import TORCH_MEMORY_FORMAT, MemoryFormat, Precision, Problem

__all__ = ["SparseTc", "SparseTcConfig"]

_MOST_CONFIGS, _MOST_BENCHMARKS = 8, 3
_THREADS = 384  # of a block of sparse_tc.cuh
_ARRANGE_THREADS, _ARRANGE_PIXELS = 256, 128  # of a block of sparse_tc_arrange.cu
_MOST_ELEMENTS = 2**31 - 1


class SparseTc(Method):
    """Sparse tensor cores of NVIDIA GPUs of compute capability 9.0: TF32, fp16 and bf16, summed in fp32."""

    name = "sparse_tc"
    device_type = "cuda"
    config_type = SparseTcConfig

    def unsupported(self, problem: Problem) -> str | None:
        if problem.precision not in ELEMENTS:
            return "sparse tensor cores multiply no fp32; ask for TF32, fp16 or bf16"
        if problem.groups > 1:
            return "each group would fill blocks of channels of its own, mostly with zeros; groups must be 1"
        if math.prod(problem.output_shape[1:]) + 1024 > _MOST_ELEMENTS:
            return "an image has more outputs than 32 bits number; use a smaller input"
        device = torch.device(problem.device)
        if reason := jit.unavailable(device, native=True):
            return reason
        if (arch := jit.arch(device, native=True)) != "sm_90a":
            return f"the kernel is made of instructions that compute capability 9.0 alone has, and this is {arch}"
        if next(candidates(problem, Gpu.of(problem.device), problem.memory_format), None) is None:
            return "no tiling fits its kernel, stride, padding and dilation"
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[SparseTcConfig]:
        return search(problem, sparse_filter, Gpu.of(problem.device), _MOST_CONFIGS, problem.memory_format)

    def predict_us(
        self, problem: Problem, sparse_filter: SparseFilter, gpu: Gpu, config: SparseTcConfig | None = None
    ) -> float:
        if config is None:
            (config,) = search(problem, sparse_filter, gpu, 1, problem.memory_format)
        tiling = Tiling.of(problem, config, gpu.shared_bytes)
        return predict_us(tiling, Extra.of(ordered(sparse_filter, config.layout, tiling.element)), gpu)

    def benchmark_configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[SparseTcConfig]:
        """What it would run if x and y were in channels_last, and nothing converted."""
        if problem.memory_format == "channels_last":
            return ()
        return search(problem, sparse_filter, Gpu.of(problem.device), _MOST_BENCHMARKS, "channels_last")

    def input_format(self, config: SparseTcConfig) -> MemoryFormat:
        return config.layout

    def channel_order(self, weights: Sequence[torch.Tensor], precision: Precision) -> torch.Tensor | None:
        if precision not in ELEMENTS:
            return None
        taps = torch.cat([weight.permute(0, 2, 3, 1).flatten(0, 2) for weight in weights])
        filters = SparseFilter.from_dense(taps[:, :, None, None])
        order = spread_channels(filters, ELEMENTS[precision].kept, ELEMENTS[precision].of)
        return torch.from_numpy(order).long().to(taps.device)

    def prepare(
        self, problem: Problem, sparse_filter: SparseFilter, bias: torch.Tensor | None, config: SparseTcConfig
    ) -> Prepared:
        device, gpu = torch.device(problem.device), Gpu.of(problem.device)
        tiling = Tiling.of(problem, config, gpu.shared_bytes)
        places = ordered(sparse_filter, config.layout, tiling.element)
        packed = pack(places, tiling)
        last, boxes = config.takes_channels_last, tiling.stores_boxes
        tables = [packed.images, _by_row(bias, packed.row_channel), packed.first, packed.steps.view(np.int32)]
        if not boxes:
            tables.append(packed.row_channel)
        fixed = [torch.from_numpy(table).to(device) for table in tables]
        given = (jit.TensorMap if boxes else torch.Tensor,) * 2  # y and residual
        defines = tiling.defines | {
            "ACTIVATION": problem.epilogue.activation_number,
            "RESIDUAL": int(problem.epilogue.residual),
        }
        kernel = jit.kernel(tiling.source, defines, device, native=True)
        launch = kernel.bind(_THREADS, tiling.shared_bytes, (jit.TensorMap, *fixed, *given, int, int), overlap=True)
        check = input_check(problem, _MOST_ELEMENTS // (math.prod(problem.output_shape[1:]) + 1024))
        memory_format = TORCH_MEMORY_FORMAT[config.layout]
        alignment = 16 if last else tiling.element.bytes * int(tiling.defines["VECTOR"])
        arrange = None if last else _arrange(problem, tiling.element, places.channels, device)
        clusters, out_shape = gpu.clusters(config.cluster), problem.output_shape[1:]

        def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            check(x, residual)
            images = len(x)
            y = torch.empty((images, *out_shape), dtype=x.dtype, device=device, memory_format=memory_format)
            if not images:
                return y
            x = x.contiguous(memory_format=memory_format)
            x = aligned(x, 16) if arrange is None else arrange(x)
            if residual is not None:
                residual = aligned(residual.contiguous(memory_format=memory_format), alignment)
            groups = tiling.groups(images)
            grid = min(groups * tiling.channel_tiles, clusters) * config.cluster, 1, 1
            x_map = _x_map(tiling, x, images)
            if boxes:
                y_map = _y_map(tiling, y)
                launch(grid, x_map, y_map, y_map if residual is None else _y_map(tiling, residual), images, groups)
            else:
                launch(grid, x_map, y, residual, images, groups)
            return y

        return Prepared(run, kernel.binary, {"remainder_share": places.split.share})


def _by_row(bias: torch.Tensor | None, row_channel: IntArray) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    values = np.zeros(len(row_channel), dtype=np.float32)
    if bias is not None:
        values[row_channel >= 0] = bias.detach().float().cpu().numpy()[row_channel[row_channel >= 0]]
    return values


def _x_map(tiling: Tiling, x: torch.Tensor, images: int) -> jit.TensorMap:
    p, config = tiling.problem, tiling.config
    sizes = tiling.channels, p.width, p.height, images
    if config.fill == "im2col":
        lower, upper = im2col_corners(p)
        return tensor_maps.im2col(x, sizes, lower, upper, tiling.load[0], config.pixels, p.stride[::-1])
    if config.fill == "flat":
        sizes = tiling.channels, images * p.height * p.width, 1, 1
    return tensor_maps.tiled(x, sizes, tiling.load)


def _y_map(tiling: Tiling, y: torch.Tensor) -> jit.TensorMap:
    images, channels, height, width = y.shape
    whole_rows = tiling.config.fill in ("columns", "halo")
    sizes = (channels, width, height, images) if whole_rows else (channels, images * height * width, 1, 1)
    return tensor_maps.tiled(y, sizes, tiling.store)


def _arrange(
    problem: Problem, element: Element, channels: IntArray, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What lays out x as the tensor cores read it, as kernels/cuda/sparse_tc_arrange.cu says."""
    plane = problem.height * problem.width
    vector, pieces, piece = arrange_pieces(plane, element)
    kernel = jit.kernel("sparse_tc_arrange.cu", {"BYTES": element.bytes, "VECTOR": vector}, device)
    order = torch.from_numpy(channels).to(device)
    fixed = order, problem.in_channels, plane, pieces, piece
    launch = kernel.bind(_ARRANGE_THREADS, 0, (torch.Tensor, torch.Tensor, *fixed), overlap=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = aligned(x, element.bytes * vector)
        arranged = torch.empty((len(x), plane, len(channels)), dtype=x.dtype, device=device)
        launch((len(x) * pieces, len(channels) // element.block, 1), x, arranged)
        return arranged

    return run


def arrange_pieces(plane: int, element: Element) -> tuple[int, int, int]:
    """Elements that are read at once, the pieces of a plane, and the elements of each but the last, a multiple of 8."""
    pieces = -(-plane // _ARRANGE_PIXELS)
    piece = -(-plane // (pieces * 8)) * 8
    return at_once(plane, element), -(-plane // piece), piece
