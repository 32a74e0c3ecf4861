"""Binaries that came beside a saved network, in memory: no compiler is needed for them, and no cache keeps them."""

from __future__ import annotations

from collections.abc import Iterable

from escort.cuda.binary import Binary

_binaries: dict[str, Binary] = {}


def carry(binaries: Iterable[Binary]) -> None:
    """Takes in binaries, from now on and for the whole process. They are code: whoever calls this trusts them."""
    _binaries.update((binary.key, binary) for binary in binaries)


def find(key: str) -> Binary | None:
    """The binary that is carried under a key (:attr:`Binary.key`)."""
    return _binaries.get(key)


def has_any(arch: str) -> bool:
    """Whether a binary for an architecture is carried."""
    return any(binary.arch == arch for binary in _binaries.values())
