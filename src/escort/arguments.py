"""What callers pass: numbers, which truth values are none of, and the names of files."""

from __future__ import annotations

import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, of whatever library, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, of whatever library, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def path_of(given: str | os.PathLike[str], like: str, name: str = "path") -> Path:
    """A path as a caller gives it.

    Args:
        like: an example of one, for messages.
        name: what the argument is called.

    Raises:
        TypeError, ValueError: for what is none, or has no name.
    """
    if not isinstance(given, str | os.PathLike) or not isinstance(text := os.fspath(given), str):
        raise TypeError(f"{name} is a path, got {type(given).__name__}; pass one such as {like!r}")
    if not text or "\0" in text:
        raise ValueError(f"{name} is a path, got {text!r:.100}; pass one such as {like!r}")
    return Path(text)
