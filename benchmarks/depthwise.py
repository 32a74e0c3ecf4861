"""Depthwise and grouped convolutions on the CPU, layer by layer: every method in a loop of its own.

    python -m benchmarks.depthwise [--threads 1] [--groups]

prints a table in Markdown. A method's time is the least median of its configs. GB/s count the input and the output
once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from escort.filter import SparseFilter
from escort.methods import Method, by_name
from escort.problem import Problem

_ROUNDS, _SECONDS = 15, 0.02

#: Channels, size of the square map, size of the kernel, stride.
MOBILENET_V2 = (
    *((32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 3, 2), (192, 28, 3, 1), (192, 28, 3, 2)),
    *((384, 14, 3, 1), (576, 14, 3, 1), (576, 14, 3, 2), (960, 7, 3, 1)),
)
EFFICIENTNET_B0 = (
    *((144, 56, 5, 2), (240, 28, 5, 1), (240, 28, 3, 2), (480, 14, 3, 1), (480, 14, 5, 1), (672, 14, 5, 1)),
    *((672, 14, 5, 2), (1152, 7, 5, 1), (1152, 7, 3, 1)),
)
#: What the MediaPipe pose detector has besides; it pads strided layers on the right and below, as TensorFlow does.
POSE_DETECTOR = ((24, 112, 3, 1), (64, 112, 3, 2), (40, 28, 3, 1), (112, 14, 3, 1), (192, 7, 3, 1))
#: Channels, size of the map, channels of a group; 3x3.
GROUPED = ((128, 56, 2), (128, 56, 4), (256, 28, 8), (512, 14, 16), (1024, 7, 32), (256, 56, 32))


@dataclass(frozen=True)
class Layer:
    """A convolution with its weights, of which `density` are kept."""

    name: str
    problem: Problem
    density: float = 1.0

    def sparse_filter(self) -> SparseFilter:
        torch.manual_seed(0)
        weight = torch.randn(self.problem.weight_shape)
        return SparseFilter.from_dense(weight * (torch.rand(weight.shape) < self.density), self.problem.groups)

    @property
    def megabytes(self) -> float:
        p = self.problem
        return 4e-6 * (torch.Size(p.input_shape).numel() + torch.Size(p.output_shape).numel())

    @property
    def gigaflops(self) -> float:
        """Of the weights that are kept."""
        p = self.problem
        weights = torch.Size(p.weight_shape).numel() * self.density
        return 2e-9 * weights * p.batch * p.out_height * p.out_width


def depthwise_layers() -> list[Layer]:
    layers = []
    for network, shapes in (
        ("MobileNetV2", MOBILENET_V2),
        ("EfficientNet-B0", EFFICIENTNET_B0),
        ("pose detector", POSE_DETECTOR),
    ):
        for channels, size, kernel, stride in shapes:
            pad = kernel // 2
            padding = (pad,) * 4 if network == "MobileNetV2" or stride == 1 else (pad - 1, pad, pad - 1, pad)
            problem = Problem(1, channels, size, size, channels, (kernel, kernel), (stride, stride), padding)
            name = f"{network} {channels} of {size}x{size}, {kernel}x{kernel}{' /2' if stride == 2 else ''}"
            layers.append(Layer(name, replace(problem, groups=channels)))
    return layers


def grouped_layers() -> list[Layer]:
    return [
        Layer(
            f"{channels} of {size}x{size} in groups of {of}, {density:.0%} kept",
            Problem(1, channels, size, size, channels, (3, 3), padding=(1, 1, 1, 1), groups=channels // of),
            density,
        )
        for channels, size, of in GROUPED
        for density in (1.0, 0.1)
    ]


def time_us(call: Callable[[], object]) -> float:
    """The median over rounds of calls back to back, in microseconds."""
    begin = time.perf_counter()
    call()
    calls = max(int(_SECONDS / _ROUNDS / max(time.perf_counter() - begin, 1e-6)), 1)
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls)
    return median(times) * 1e6


def method_us(layer: Layer, method: Method) -> list[float]:
    """The time of each config, the method's first six at most."""
    sparse_filter, x = layer.sparse_filter(), torch.randn(layer.problem.input_shape)
    times = []
    for config in method.configs(layer.problem, sparse_filter)[:6]:
        run = method.prepare(layer.problem, sparse_filter, None, config).run
        times.append(time_us(lambda run=run: run(x)))  # type: ignore[misc]
    return times


def bounds() -> str:
    """What arithmetic and memory give on this machine, with this number of threads."""
    a = torch.randn(1024, 1024)
    product = 2 * 1024**3 / time_us(lambda: torch.mm(a, a)) / 1e3
    copies = []
    for megabytes in (0.4, 1.6, 6.4):
        x = torch.randn(int(megabytes * 1e6 / 8))
        y = torch.empty_like(x)
        copies.append(f"{megabytes * 1e3 / time_us(lambda x=x, y=y: y.copy_(x)):.0f}")  # type: ignore[misc]
    return f"torch.mm {product:.0f} GFLOP/s; copies of 0.4, 1.6 and 6.4 MB in all: {', '.join(copies)} GB/s"


def table(layers: Sequence[Layer], ours: Sequence[str]) -> str:
    names = [f"{name} us" for name in ours]
    lines = [
        "| layer | MB | " + " | ".join([*names, "GFLOP/s", "GB/s", "torch NCHW us", "torch NHWC us", "gain"]) + " |"
    ]
    lines.append("|---|" + "---:|" * (lines[0].count("|") - 2))
    for layer in layers:
        times = [min(method_us(layer, by_name(name))) for name in ours]
        dense = method_us(layer, by_name("dense"))
        best = min(times)
        cells = [f"{layer.megabytes:.2f}", *(f"{us:.0f}" for us in times), f"{layer.gigaflops / best * 1e6:.0f}"]
        cells += [f"{layer.megabytes / best * 1e3:.0f}", *(f"{us:.0f}" for us in dense), f"{min(dense) / best:.2f}x"]
        lines.append(f"| {layer.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--groups", action="store_true", help="grouped convolutions instead of depthwise ones")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        print(f"{options.threads} threads, {bounds()}\n")
        print(
            table(grouped_layers(), ["direct"])
            if options.groups
            else table(depthwise_layers(), ["depthwise", "direct"])
        )


if __name__ == "__main__":
    main()
