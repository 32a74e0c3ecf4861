"""The layers of pattern files, which were really pruned."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper_layers import PAPER_BATCH
from benchmarks.suite.layers import Layer, filter_of
from escort.filter import IntArray
from escort.problem import Precision, Problem


def pattern_layers(
    path: Path, batch: int | None, seed: int = 0, *, precision: Precision = "fp32", device: str = "cpu"
) -> list[Layer]:
    """The layers of a pattern file, in its order.

    The file is an .npz. Per layer it has ``<layer>.shape`` (height, width, in_channels, out_channels, kernel_size,
    padding, stride, groups), and ``<layer>.indptr`` and ``<layer>.indices``, the CSR matrix of the nonzeros with column
    ``(c * R + r) * S + s``. It may have ``<layer>.values``, which else are random. The network's name is the file's up
    to the first underscore.

    Args:
        batch: samples; None for as many as the paper took for a network of that name.

    Raises:
        ValueError, FileNotFoundError: naming the file, the layer and what is wrong.
    """
    rng = np.random.default_rng(seed)
    arrays = _read_arrays(path)
    network = path.stem.split("_")[0]
    if batch is None:
        if network not in PAPER_BATCH:
            raise ValueError(
                f"{path}: the paper knows no {network}, only {', '.join(PAPER_BATCH)}; choose a batch size"
            )
        batch = PAPER_BATCH[network]
    names = [key.removesuffix(".shape") for key in arrays if key.endswith(".shape")]
    if not names:
        raise ValueError(f"{path} holds no layer: each needs <layer>.shape, <layer>.indptr and <layer>.indices")
    layers = []
    for name in names:
        try:
            problem = _problem(_integers(arrays, f"{name}.shape"), batch, precision, device)
            indptr, columns = (_integers(arrays, f"{name}.{part}") for part in ("indptr", "indices"))
            values = arrays.get(f"{name}.values")
            if values is None:
                values = rng.standard_normal(len(columns))
            sparse_filter = filter_of(problem, indptr, columns, values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, layer {name}: {error}") from error
        layers.append(Layer(network, path.stem, name, problem, sparse_filter))
    return layers


def _problem(shape: IntArray, batch: int, precision: Precision, device: str) -> Problem:
    if len(shape) != 8:
        raise ValueError(f"shape holds 8 numbers (H, W, in, out, kernel, pad, stride, groups), got {len(shape)}")
    height, width, in_channels, out_channels, kernel_size, padding, stride, groups = map(int, shape)
    return Problem(
        batch,
        in_channels,
        height,
        width,
        out_channels,
        (kernel_size, kernel_size),
        (stride, stride),
        (padding,) * 4,
        groups=groups,
        precision=precision,
        device=device,
    )


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; name an .npz of sparsity patterns")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz of plain arrays, or damaged: {error}") from error


def _integers(arrays: Mapping[str, NDArray[Any]], key: str) -> IntArray:
    if key not in arrays:
        raise ValueError(f"{key} is missing")
    array = arrays[key]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{key} is a vector of integers, got {array.dtype} of shape {array.shape}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{key} holds {array.min()}..{array.max()}; 0..{np.iinfo(np.int32).max} is possible")
    return array.astype(np.int32)
