"""python -m shipping FILE: compiles what many networks need first, and writes it to a file for a wheel."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from escort.cuda import shipped
from escort.cuda.binary import Binary
from escort.cuda.compiler import Text, Variant, compile_source
from escort.cuda.gpu import H200, Gpu
from escort.layers.images import images_kernel
from escort.layers.planes.average import average_kernel, mean_kernel
from escort.layers.planes.concat import concat_kernel
from escort.layers.planes.gate import gate_kernel
from escort.layers.planes.linear import linear_kernel
from escort.layers.planes.norm import local_response_kernel
from escort.layers.planes.resize import resize_kernel
from escort.layers.planes.squeeze import squeeze_kernel
from escort.layers.pool import POOLED_ON_GPU, pooling_kernel
from escort.methods import by_name, for_device
from escort.planner.cores import on_all_cores
from escort.planner.plan import Layer
from escort.planner.search import Search
from escort.problem import Activation
from shipping.layers import common_layers, pixel_problems

#: What is shipped for which GPU: compute capability 8.0 has no kernels of its successors' instructions.
GPUS = (H200, Gpu(multiprocessors=108, shared_bytes=166912, capability=(8, 0)))
_POOLED, _PYRAMID = ((2, 2), (3, 3)), (5, 5)  # windows, and that of pooling pyramids
_NORMALIZED = 5  # channels
_CLASSIFIERS: tuple[Activation, ...] = "none", "relu"  # the activations behind linear layers
_AT_A_TIME = 64  # kernels that are compiled before it is seen whether more find room
_log = logging.getLogger("shipping")

#: A variant's source by name and digest, its macros, and the architecture that it is compiled for.
Key = tuple[str, str, tuple[tuple[str, str], ...], str]


@contextmanager
def in_place_of_a_gpu(gpu: Gpu) -> Iterator[None]:
    """Lets methods search for a GPU that need not be there. Nothing can be run on it."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: f"a GPU of compute capability {gpu.capability}",
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
        stack.enter_context(patch.object(Gpu, "of", lambda device: gpu))
        yield


def variants_of(layers: Iterable[Layer]) -> Iterator[Variant]:
    """The kernels that a conversion of these layers prepares, those of each layer one after the other."""
    for layer in layers:
        for method, configs in Search.of(layer, for_device(layer.problem.device), None).tried:
            for config in configs:
                yield from method.kernels(layer.problem, config)


def plane_variants() -> Iterator[Variant]:
    """The kernels between convolutions, for whole vectors of channels or pixels, and element by element."""
    for dtype in POOLED_ON_GPU:
        whole = 16 // dtype.itemsize
        for vector in (1, whole):
            yield from (pooling_kernel(dtype, vector, window) for window in (*_POOLED, _PYRAMID))
            yield from (average_kernel(dtype, vector, window) for window in ((0, 0), *_POOLED))
            yield resize_kernel(dtype, vector)
            yield from (gate_kernel(dtype, vector, is_last) for is_last in (False, True))
        yield mean_kernel(dtype, whole)
        yield from (images_kernel(dtype, pixels) for pixels in (1, 4))
        yield squeeze_kernel(dtype)
        yield from (linear_kernel(dtype, whole, 1, activation) for activation in _CLASSIFIERS)
        yield from (concat_kernel(dtype, whole, norm=norm) for norm in (False, True))
        yield from (local_response_kernel(dtype, vector, False, _NORMALIZED) for vector in (1, 8 // dtype.itemsize))
        yield local_response_kernel(dtype, whole, True, _NORMALIZED)


def pixel_variants() -> Iterator[Variant]:
    """The kernels of convolutions of one pixel, as linear layers and squeezes are."""
    method = by_name("gemv", "cuda:0")
    for problem, sparse_filter in pixel_problems():
        for config in method.configs(problem, sparse_filter):
            yield from method.kernels(problem, config)


def key_of(variant: Variant, arch: str) -> Key:
    source = variant.source
    digest = source.digest if isinstance(source, Text) else ""
    return str(source), digest, tuple(sorted((name, str(value)) for name, value in variant.defines.items())), arch


def arch_of(variant: Variant, gpu: Gpu) -> str:
    """The architecture that a variant is compiled for where a GPU asks for it."""
    major, minor = gpu.capability
    return f"sm_{major}{minor}" + ("a" if variant.native else "")


def wanted(layers: Iterable[Layer]) -> dict[Key, Variant]:
    """What is worth shipping: first what stands between convolutions or is of one pixel, then what most layers try."""
    variants: dict[Key, Variant] = {}
    counts = Counter[Key]()
    layers = list(layers)
    for gpu in GPUS:
        with in_place_of_a_gpu(gpu):
            between = [*plane_variants(), *pixel_variants()]
            for variant in (*between, *variants_of(layers)):
                key = key_of(variant, arch_of(variant, gpu))
                variants[key] = variant
                counts[key] += 1 if variant not in between else len(layers) * len(GPUS)
    return {key: variants[key] for key, _ in counts.most_common()}


def compile_all(variants: dict[Key, Variant], most_bytes: int) -> list[Binary]:
    """The binaries of as many of the first variants as fit a file of so many bytes."""
    compiled: dict[Key, Binary] = {}

    def make(key: Key) -> None:
        compiled[key] = compile_source(variants[key].source, variants[key].defines, key[-1])

    kept: list[Binary] = []
    size, keys = 0, list(variants)
    for begin in range(0, len(keys), _AT_A_TIME):
        some = keys[begin : begin + _AT_A_TIME]
        on_all_cores([partial(make, key) for key in some])
        for binary in (compiled[key] for key in some):
            size += len(shipped.pack([binary]))
            if size > most_bytes:
                return kept
            kept.append(binary)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shipping", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=float, default=40.0, help="how large the file may be (default: 40)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    variants = wanted(common_layers())
    binaries = compile_all(variants, int(options.megabytes * 1e6))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_bytes(shipped.pack(binaries))
    counts = Counter((binary.source, binary.arch) for binary in binaries)
    _log.info(
        "%s: %.1f MB, %d of %d kernels", options.file, options.file.stat().st_size / 1e6, len(binaries), len(variants)
    )
    for (source, arch), count in sorted(counts.items()):
        _log.info("  %-22s %-7s %d", source, arch, count)


if __name__ == "__main__":
    main()
