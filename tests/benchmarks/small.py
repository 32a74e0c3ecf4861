"""A study of two small layers, and methods and networks that take no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from benchmarks.result_files import Item
from benchmarks.study import Study
from benchmarks.suite import Row, prune_all_but_first
from escort import methods, reference
from escort.filter import SparseFilter
from escort.problem import Problem

SMALL = "inception_5?/5x5"  # two layers on 7x7 maps, of the same group of shapes but for the channels


QUICK = Study(
    device="cpu", networks=("googlenet",), batch=1, layers=SMALL, sparsities=(0.5, 0.95), search=3, budget_s=0.0
)


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 5)
    )


def tiny_of_the_paper(network: str, seed: int) -> tuple[nn.Module, list[str]]:
    """Stands in for :func:`benchmarks.paper_networks.paper_network`: the second convolution is pruned."""
    model = tiny().eval()
    prune_all_but_first(model, 0.9)
    return model, ["2"]


TINY = {"googlenet": SimpleNamespace(factory=tiny, input_size=(3, 8, 8))}


def measured(items: Sequence[Item]) -> list[Row]:
    return [row for item in items for row in item.measure()]


def a_row(label: str = "a", time_us: float = 1.0) -> Row:
    return Row("googlenet", "paper", label, 1, "fp32", "direct", {}, time_us, 0.0)


def write_patterns(folder: Path, name: str = "net_l1", layers: str = "conv") -> Path:
    """Two layers of 8 filters for 4 channels, 3x3 on 6x6 maps."""
    layer = {"shape": [6, 6, 4, 8, 3, 1, 1, 1], "indptr": range(0, 17, 2), "indices": [3, 21] * 8}
    np.savez(
        folder / f"{name}.npz", **{f"{layers}{i}.{key}": np.array(part) for i in (1, 2) for key, part in layer.items()}
    )
    return folder / f"{name}.npz"


@dataclass(frozen=True)
class Knobs:
    size: int = 2
    balanced: bool = True
    depth: int = 1


class Fake(methods.Method):
    """A method with knobs."""

    name, device_type, config_type = "direct", "cpu", Knobs

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def configs(self, problem: Problem, sparse_filter: SparseFilter) -> Sequence[Knobs]:
        return Knobs(), Knobs(size=4), Knobs(depth=3)

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: Any,
        config: Knobs,
        slope: Any = None,
    ) -> methods.Prepared:
        weight = sparse_filter.to_dense()
        return methods.Prepared(lambda x, residual=None: reference.conv2d(problem, x, weight).float())


class Compiled(Fake):
    """Compiles a kernel for each filter, as it were."""

    compiles_per_filter = True

    def __init__(self) -> None:
        self.prepared: list[tuple[int, Knobs]] = []

    def compile_s(self, problem: Problem, sparse_filter: SparseFilter, config: Knobs) -> float:
        return 1.0

    def prepare(
        self,
        problem: Problem,
        sparse_filter: SparseFilter,
        bias: Any,
        config: Knobs,
        slope: Any = None,
    ) -> methods.Prepared:
        self.prepared.append((problem.in_channels, config))
        return super().prepare(problem, sparse_filter, bias, config)


class Knowing(Fake):
    """Says itself which configurations are next to one."""

    def neighbours(self, config: Knobs, problem: Problem, sparse_filter: SparseFilter) -> dict[str, list[Knobs]]:
        return {
            "size": [replace(config, size=size) for size in (1, 8)],
            "balanced": [replace(config, balanced=not config.balanced)],
        }
