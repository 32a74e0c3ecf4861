"""Real pruned patterns, where a folder of them lies beside the repository: their rows are uneven and some are empty."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from benchmarks import suite
from benchmarks.findings.aims import PatternAim, read_aims
from escort import reference
from escort.methods import by_name

FILES = sorted((Path(__file__).parents[3] / "shared" / "data" / "patterns").glob("*.npz"))


@pytest.mark.skipif(not FILES, reason="no patterns beside the repository")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_direct_on_real_patterns(file: Path) -> None:
    layers = suite.pattern_layers(file, batch=1)
    direct = by_name("direct")
    for layer in layers[:: max(len(layers) // 8, 1)]:
        problem = layer.problem
        x = torch.randn(problem.input_shape)
        expected = reference.conv2d(problem, x, layer.sparse_filter.to_dense())
        for config in list(direct.configs(problem, layer.sparse_filter))[::3]:
            y = direct.prepare(problem, layer.sparse_filter, None, config)(x)
            assert reference.compare(y, expected) <= reference.ERROR_BOUND["fp32"], layer.name


@pytest.mark.skipif(not FILES, reason="no patterns beside the repository")
@pytest.mark.parametrize("aim", read_aims().patterns, ids=lambda aim: aim.weights)
def test_the_layers_of_aims_are_those_of_the_files(aim: PatternAim) -> None:
    (file,) = (file for file in FILES if file.stem == aim.weights)
    layers = suite.pattern_layers(file, aim.batch)
    meant = [layer for layer in layers if any(fnmatch(layer.name, pattern) for pattern in aim.layers)]
    kernel_sizes = {size for size in (1, 3) if f"{size}x{size}" in aim.kind}
    assert len(meant) == aim.count and {layer.problem.kernel_size[0] for layer in meant} == kernel_sizes
    assert not kernel_sizes & {layer.problem.kernel_size[0] for layer in layers if layer not in meant}
