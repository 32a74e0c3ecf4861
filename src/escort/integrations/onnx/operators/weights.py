"""What each new position of a resized axis takes of the old ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escort.integrations.onnx.errors import NotSupportedError
from escort.integrations.onnx.limits import MAX_CONSTANT
from escort.integrations.onnx.node import Node


@dataclass(frozen=True)
class Rule:
    """How a node resizes.

    Attributes:
        mode: nearest, linear or cubic.
        coordinates: where a new position lies among the old ones, in ONNX's words.
        nearest: which of two neighbours is the nearest one.
        cubic: the coefficient of cubic interpolation.
        antialias: whether a map that becomes smaller is averaged over all that it leaves out.
        exclude_outside: whether what lies beyond the map weighs nothing; else the border is repeated.
    """

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    antialias: bool
    exclude_outside: bool

    @classmethod
    def of(cls, node: Node) -> Rule:
        mode = node.text("mode", "nearest", "nearest linear cubic bilinear")
        mode = "linear" if mode == "bilinear" else mode
        if node.op == "Upsample" or node.arity == 2:  # which know no other rule than this one
            return cls(mode, "asymmetric", "floor", -0.75, False, False)
        coordinates = node.text(
            "coordinate_transformation_mode",
            "half_pixel",
            "half_pixel pytorch_half_pixel align_corners asymmetric half_pixel_symmetric tf_half_pixel_for_nn",
        )
        nearest = node.text("nearest_mode", "round_prefer_floor", "round_prefer_floor round_prefer_ceil floor ceil")
        antialias = bool(node.get("antialias", 0)) and mode != "nearest"
        # What lies outside is the border again, to which linear interpolation gives its weight either way.
        exclude = bool(node.get("exclude_outside", 0)) and (mode == "cubic" or antialias)
        return cls(mode, coordinates, nearest, node.get("cubic_coeff_a", -0.75), antialias, exclude)


def weights(rule: Rule, size: int, target: int, factor: float) -> NDArray[Any]:
    """The weights (target, size) of old positions in new ones."""
    if size * target > MAX_CONSTANT or size < 1:
        raise NotSupportedError(f"it makes {target} positions of {size}, and no network does so")
    positions = _positions(rule, size, target, factor)
    if rule.mode == "nearest":
        matrix = np.zeros((target, size))
        matrix[np.arange(target), np.clip(_nearest(rule, positions), 0, size - 1)] = 1.0
        return matrix
    shrinking = min(factor, 1.0) if rule.antialias else 1.0
    support = int(np.ceil((1 if rule.mode == "linear" else 2) / shrinking)) + 1
    reached = np.floor(positions).astype(np.int64)[:, None] + np.arange(-support, support + 1)
    taken = _kernel(rule, (reached - positions[:, None]) * shrinking)
    if rule.exclude_outside:
        taken = np.where((reached >= 0) & (reached < size), taken, 0.0)
    taken /= taken.sum(1, keepdims=True)
    matrix = np.zeros((target, size))
    np.add.at(matrix, (np.arange(target)[:, None], np.clip(reached, 0, size - 1)), taken)
    return matrix


def _positions(rule: Rule, size: int, target: int, factor: float) -> NDArray[Any]:
    """Where new positions lie among the old ones."""
    new = np.arange(target, dtype=np.float64)
    match rule.coordinates:
        case "asymmetric":
            return new / factor
        case "align_corners":
            return new * (size - 1) / (target - 1) if target > 1 else new
        case "tf_half_pixel_for_nn":
            return (new + 0.5) / factor
        case "pytorch_half_pixel" if target == 1:
            return new
        case "half_pixel_symmetric":
            return size / 2 * (1 - target / (factor * size)) + (new + 0.5) / factor - 0.5
    return (new + 0.5) / factor - 0.5


def _nearest(rule: Rule, positions: NDArray[Any]) -> NDArray[np.int64]:
    match rule.nearest:
        case "floor":
            rounded = np.floor(positions)
        case "ceil":
            rounded = np.ceil(positions)
        case "round_prefer_ceil":
            rounded = np.floor(positions + 0.5)
        case _:
            rounded = np.ceil(positions - 0.5)
    return rounded.astype(np.int64)


def _kernel(rule: Rule, distance: NDArray[Any]) -> NDArray[Any]:
    """The weight of a number at a distance from a position."""
    x = np.abs(distance)
    if rule.mode == "linear":
        return np.maximum(0.0, 1.0 - x)
    a = rule.cubic
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
