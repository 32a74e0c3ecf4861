"""Files that are changed and sealed again, as an attacker can do it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import safetensors.torch


def sealed(header: bytes, data: bytes) -> bytes:
    """The file of a header, padded as needed, with the checksum in the place of its 64 zeros."""
    header += b" " * (-len(header) % 8)
    whole = len(header).to_bytes(8, "little") + header + data
    return whole[:35] + hashlib.sha256(whole).hexdigest().encode() + whole[99:]


class Forgery:
    """The parts of a file, to be changed and sealed again: what an attacker can do."""

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:8], "little")
        self.header = json.loads(data[8 : 8 + size])
        self.texts = self.header["__metadata__"]
        self.architecture, self.plan, self.encodings = (
            json.loads(self.texts[key]) for key in ("architecture", "plan", "tensors")
        )
        self.tensors = safetensors.torch.load(data)

    @property
    def program(self) -> dict[str, Any]:
        return self.architecture["programs"][""]

    def step(self, target: str) -> dict[str, Any]:
        """The step that calls or reads something of that name."""
        return next(step for step in self.program["steps"] if target in step.values())

    def problem(self, layer: str = "stem.0") -> dict[str, Any]:
        return self.plan["layers"][layer]["problem"]

    def seal(self, *, replacing: bool = True) -> bytes:
        """The bytes of the file, with the plan as it is or as its text says."""
        plan = json.dumps(self.plan) if replacing else self.texts["plan"]
        texts = self.texts | {"architecture": json.dumps(self.architecture), "plan": plan}
        texts |= {"tensors": json.dumps(self.encodings)} | {"sha256": "0" * 64}
        body = safetensors.torch.save(self.tensors)
        size = int.from_bytes(body[:8], "little")
        return sealed(
            json.dumps({"__metadata__": texts, **json.loads(body[8 : 8 + size])}, separators=(",", ":")).encode(),
            body[8 + size :],
        )


def setting(*keys: Any, to: Any) -> Callable[[Forgery], None]:
    """A forgery that sets an attribute, or an item somewhere within it."""

    def forge(forgery: Forgery) -> None:
        inner: Any = vars(forgery)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return forge


def asking(to: Any, *keys: str) -> Callable[[Forgery], None]:
    return setting("plan", "layers", "stem.0", "problem", *keys, to=to)


def problems(forgery: Forgery) -> list[dict[str, Any]]:
    return [layer["problem"] for layer in forgery.plan["layers"].values()]


def in_precision(problem: dict[str, Any], precision: str) -> None:
    problem["precision"] = precision


def on_gpu(layer: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    """A layer's plan as if it had been measured on a GPU."""
    config = {"memory_format": "contiguous", "output": "contiguous"}
    candidate = {"method": "cudnn", "config": config, "time_us": 1.0, "rel_error": 0.0, "reason": None}
    problem = layer["problem"] | {"device": "cuda:0", "precision": precision}
    return layer | {"problem": problem, "method": "cudnn", "config": config, "candidates": [candidate]}


def removing(name: str) -> Callable[[Forgery], None]:
    return lambda forgery: forgery.tensors.pop(name)


def filling(name: str, value: float) -> Callable[[Forgery], None]:
    return lambda forgery: forgery.tensors[name].fill_(value)
