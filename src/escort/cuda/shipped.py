"""Binaries that this package brings, of kernels that many networks need: no compiler is needed for them, and no cache.

A wheel may hold them in one file (`make wheel SHIP=1`); an install from source does without. They are found by what
this version would compile (:attr:`Binary.key`), so that a file of another version's would serve nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from escort.cuda.binary import Binary, cuda_of

#: Where a wheel has them.
FILE = Path(__file__).parents[1] / "kernels" / "cuda" / "shipped.kernels"
_log = logging.getLogger(__name__)
_DAMAGED = "%s is damaged, reinstall escort-sparse: %s"
_DAMAGES = OSError, SafetensorError, ValueError, KeyError, TypeError


class _Shipped(NamedTuple):
    """A file that is open: what it says of each binary, and the packed code, both by key."""

    records: dict[str, Any]
    codes: Any


def find(key: str) -> Binary | None:
    """The binary that is shipped under a key (:attr:`Binary.key`). A damaged one counts as absent."""
    records, codes = _opened(FILE)
    if (record := records.get(key)) is None:
        return None
    try:
        cubin = zlib.decompress(codes.get_tensor(key).numpy())
        if hashlib.sha256(cubin).hexdigest() != record["sha256"]:
            raise ValueError(f"the code of {key} has another SHA-256")
        return Binary.of(record["kernel"], cubin)
    except (*_DAMAGES, zlib.error) as error:
        _log.warning(_DAMAGED, FILE, error)
        return None


def has_any(arch: str, newest: tuple[int, int]) -> bool:
    """Whether a binary for an architecture is shipped that a driver loads which supports a CUDA."""
    try:
        described = [record["kernel"] for record in _opened(FILE).records.values()]
        return any(each["arch"] == arch and cuda_of(each["compiler"])[0] <= newest[0] for each in described)
    except _DAMAGES as error:
        _log.warning(_DAMAGED, FILE, error)
        return False


def archs() -> dict[str, int]:
    """How many binaries are shipped for each architecture."""
    listed = [record["kernel"]["arch"] for record in _opened(FILE).records.values()]
    return {arch: listed.count(arch) for arch in sorted(set(listed))}


def pack(binaries: Iterable[Binary]) -> bytes:
    """The bytes of a file that ships these binaries. The same ones give the same bytes."""
    by_key = {binary.key: binary for binary in sorted(binaries, key=lambda binary: binary.key)}
    records = {
        key: {"kernel": binary.describe(), "sha256": hashlib.sha256(binary.cubin).hexdigest()}
        for key, binary in by_key.items()
    }
    packed = {key: bytearray(zlib.compress(binary.cubin, 9)) for key, binary in by_key.items()}
    codes = {key: torch.frombuffer(code, dtype=torch.uint8) for key, code in packed.items()}
    return save(codes, {"kernels": json.dumps(records, separators=(",", ":"), allow_nan=False)})


@lru_cache
def _opened(path: Path) -> _Shipped:
    """The file, which stays open; without one nothing is shipped."""
    if not path.exists():
        return _Shipped({}, None)
    try:
        codes = safe_open(path, "pt")
        return _Shipped(dict(json.loads(codes.metadata()["kernels"])), codes)
    except _DAMAGES as error:
        _log.warning(_DAMAGED, path, error)
        return _Shipped({}, None)
