"""A search space: many configs of a method side by side, one column of numbers per knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Space:
    """Columns of one length: row i of all of them is one config, column j is one knob of all configs.

    A model predicts the times of all configs at once from the columns; only the best few rows become configs.

    Attributes:
        columns: by name, each of shape (configs,).

    Raises:
        ValueError: unless the columns are vectors of one length.
    """

    columns: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        shapes = {name: column.shape for name, column in self.columns.items()}
        if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise ValueError(f"columns are vectors of one length, got {shapes}")

    @classmethod
    def product(cls, axes: Mapping[str, Sequence[Any] | NDArray[Any]]) -> Space:
        """Every combination of the axes' values; the last axis varies fastest."""
        grids = np.meshgrid(*(np.asarray(values) for values in axes.values()), indexing="ij")
        return cls({name: grid.ravel() for name, grid in zip(axes, grids, strict=True)})

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, mask: NDArray[np.bool_]) -> Space:
        """The configs for which the mask, of shape (configs,), is true."""
        return Space({name: column[mask] for name, column in self.columns.items()})

    def with_columns(self, **columns: ArrayLike) -> Space:
        """The same configs with these columns added or replaced; a scalar becomes a column."""
        added = {name: np.broadcast_to(np.asarray(column), len(self)) for name, column in columns.items()}
        return Space({**self.columns, **added})

    def row(self, i: int) -> dict[str, Any]:
        """Config i as Python scalars by name, as a config's dataclass takes them."""
        return {name: column[i].item() for name, column in self.columns.items()}

    def rank(self, key_column: NDArray[Any]) -> NDArray[np.intp]:
        """The numbers of the rows by ascending key, of shape (configs,); rows of equal keys keep their order."""
        if len(key_column) != len(self):
            raise ValueError(f"a key for each of {len(self)} configs, got {len(key_column)}")
        return np.argsort(key_column, kind="stable")
