"""methods/space.py: search spaces as columns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from escort.methods.space import Space

AXES = {"words": (1, 2, 4), "packed": (False, True), "share": (0.25, 0.5)}


@dataclass(frozen=True)
class Config:
    words: int
    packed: bool
    share: float


def rows(space: Space) -> list[tuple[object, ...]]:
    return [tuple(space.row(i).values()) for i in range(len(space))]


def test_a_product_holds_every_combination_in_order() -> None:
    assert rows(Space.product(AXES)) == list(itertools.product(*AXES.values()))


def test_a_row_makes_a_config_of_python_scalars() -> None:
    config = Config(**Space.product(AXES).row(5))
    assert config == Config(2, False, 0.5)
    assert (type(config.words), type(config.packed), type(config.share)) == (int, bool, float)


def test_where_keeps_what_the_mask_says() -> None:
    space = Space.product(AXES)
    limited = space.where((space["words"] > 1) & space["packed"])
    assert rows(limited) == [row for row in rows(space) if row[0] > 1 and row[1]]  # type: ignore[operator]
    assert len(space.where(np.zeros(len(space), bool))) == 0


def test_columns_are_added_and_replaced() -> None:
    space = Space.product(AXES)
    more = space.with_columns(stages=space["words"] + 1, packed=True)
    assert more.row(0) == {"words": 1, "packed": True, "share": 0.25, "stages": 2}
    assert "stages" not in space.columns and len(more) == len(space)


def test_rank_is_stable() -> None:
    space = Space({"words": np.array([3, 1, 3, 1])})
    assert space.rank(space["words"]).tolist() == [1, 3, 0, 2]
    with pytest.raises(ValueError, match="a key for each of 4 configs"):
        space.rank(np.zeros(3))


@pytest.mark.parametrize("columns", [{"a": np.zeros(2), "b": np.zeros(3)}, {"a": np.zeros((2, 2))}])
def test_other_columns_are_refused(columns: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="vectors of one length"):
        Space(columns)


def test_a_space_without_axes_is_empty() -> None:
    assert len(Space({})) == 0
