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
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from escort.cuda.binary import Binary

#: Where a wheel has them.
FILE = Path(__file__).parents[1] / "kernels" / "cuda" / "shipped.kernels"
_log = logging.getLogger(__name__)


def find(key: str) -> Binary | None:
    """The binary that is shipped under a key (:attr:`Binary.key`). A damaged one counts as absent."""
    if (record := _records(FILE).get(key)) is None:
        return None
    try:
        with safe_open(FILE, "pt") as file:
            cubin = zlib.decompress(file.get_tensor(key).numpy())
        if hashlib.sha256(cubin).hexdigest() != record["sha256"]:
            raise ValueError(f"the code of {key} has another SHA-256")
        return Binary.of(record["kernel"], cubin)
    except (OSError, SafetensorError, zlib.error, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is damaged, reinstall escort-sparse: %s", FILE, error)
        return None


def archs() -> dict[str, int]:
    """How many binaries are shipped for each architecture."""
    listed = [record["kernel"]["arch"] for record in _records(FILE).values()]
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
def _records(path: Path) -> dict[str, Any]:
    """What the file says of each binary, by key; it is read once in a process."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["kernels"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is damaged, reinstall escort-sparse: %s", path, error)
        return {}
