"""Changed files: whatever a file is made of, changed at random and sealed again.

What is changed is bytes, a table of tensors and JSON; nothing here knows what they mean.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.artifact.forgery import sealed

#: What stands in the place of a value: other types, limits of number types, names of other things.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 255, 256, 65535, 10**6, 2**26, 2**30, 2**31 - 1, 2**31, 2**32),
    *(2**53, 2**63 - 1, 2**63, 2**64, 10**40, -(2**31), -(2**63), 0.5, -0.0, 1e300, float("nan"), float("inf")),
    *("", "a", "x", "0", "cpu", "cuda", "cuda:0", "meta", "fp16", "float32", "contiguous", "torch.load", "os.system"),
    *("__class__", "a.b", "..", "../../etc", "a\nb", "\x00", "\u202e", "é" * 50, "a" * 10_000, "import os"),
    *([], {}, [[]], [None], [1, 2], [1, 2, 3, 4], [0, 0, 0, 0], [2**31] * 4, {"node": "x"}, {"float": "nan"}),
)
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3")
_DEEP = 3000  # lists within lists: beyond what recursion allows

Place = tuple[Any, Any]  # a container, and a key or an index of it


def mutate(data: bytes, seed: int) -> bytes:
    """A changed file, the same for the same seed."""
    rng = Random(seed)
    if rng.random() < 0.1:
        return _damaged(data, rng)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    documents = {key: json.loads(text) for key, text in header["__metadata__"].items() if text[:1] in ("{", "[")}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.random()
        if kind < 0.7 and documents:
            _change(documents, rng)
        elif kind < 0.9:
            _change_tensors(header, rng)
        elif body:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] |= {key: _text(document) for key, document in documents.items()}
        header["__metadata__"]["sha256"] = "0" * 64
    return sealed(_text(header).encode("utf-8", "surrogatepass"), bytes(body))


def _text(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"))
    return text.replace('"deep"', "[" * _DEEP + "]" * _DEEP)


def _damaged(data: bytes, rng: Random) -> bytes:
    """Not sealed again: cut short, longer, or with other bytes."""
    match rng.randrange(4):
        case 0:
            return data[: rng.randrange(len(data))]
        case 1:
            return data + rng.randbytes(rng.randint(1, 100))
        case 2:
            return rng.randbytes(rng.choice((0, 8, 100, 10_000)))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 10))):
        changed[rng.choice((rng.randrange(200), rng.randrange(len(data)))) % len(data)] ^= rng.randint(1, 255)
    return bytes(changed)


def _places(value: Any) -> Iterator[Place]:
    """Every place in a JSON document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change(documents: dict[str, Any], rng: Random) -> None:
    places = list(_places(documents[rng.choice(sorted(documents))]))
    if not places:
        return
    inner, key = rng.choice(places)
    other, other_key = rng.choice(places)
    match rng.randrange(7):
        case 0 | 1:
            inner[key] = copy.deepcopy(rng.choice((*VALUES, "deep")))
        case 2:
            if type(inner[key]) in (int, float):
                inner[key] = rng.choice((inner[key] + 1, inner[key] - 1, -inner[key], inner[key] * 2, 0, 2**20))
            else:
                inner[key] = copy.deepcopy(other[other_key])
        case 3:
            del inner[key]
        case 4:
            if isinstance(inner, list):
                inner[key:key] = [copy.deepcopy(inner[key])] * rng.choice((1, 1, 1000))
            else:
                inner[rng.choice(("a", f"{key}.a", str(rng.choice(VALUES))[:50]))] = copy.deepcopy(inner[key])
        case 5:
            inner[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(inner[key])
        case 6:
            if isinstance(inner, dict):
                names = [str(place[1]) for place in places if isinstance(place[0], dict)]
                inner[rng.choice(names)] = inner.pop(key)


def _change_tensors(header: dict[str, Any], rng: Random) -> None:
    """The table of tensors: types, shapes, offsets, names; or one of the texts beside it."""
    # What an earlier change made of an entry is left as it is.
    names = sorted(name for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict))
    if not names or rng.random() < 0.1:
        texts = header.get("__metadata__")
        if isinstance(texts, dict) and len(texts) > 1:
            texts[rng.choice(sorted(texts.keys() - {"sha256"}))] = rng.choice(
                ("", "{}", "[", "null", "1", "3", "x" * 99)
            )
        return
    name, other = rng.choice(names), rng.choice(names)
    match rng.randrange(8):
        case 0:
            header[name]["dtype"] = rng.choice(_DTYPES)
        case 1:
            header[name]["shape"] = rng.choice(([], [0], [2**31, 2**31], [-1], header[other].get("shape"), ["a"], 3))
        case 2:
            header[name]["data_offsets"] = rng.choice(
                ([0, 0], [0, 2**40], [8, 4], header[other].get("data_offsets"), [])
            )
        case 3:
            header[name], header[other] = header[other], header[name]
        case 4:
            header[rng.choice((f"{name}.a", "", "a", "network", "é"))] = header.pop(name)
        case 5:
            del header[name]
        case 6:
            header[name] = copy.deepcopy(rng.choice((None, [], {}, header[other])))
        case 7:
            shape = header[name].get("shape")
            if isinstance(shape, list) and shape:  # the same numbers in another shape
                header[name]["shape"] = rng.choice(([*shape, 1], [1, *shape], shape[::-1]))
