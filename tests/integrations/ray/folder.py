"""A folder of images as people have them: in folders, under any names, some of them damaged, some none at all.

python -m tests.integrations.ray.folder FOLDER [COUNT]
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FOLDERS = ("", "cats", "cats/old", "Hütte", "写真", "c d")
_FIRST = ("", "ü", "u\N{COMBINING DIAERESIS}", "名前", "\N{CAT FACE}", "=1+1", "-o", "a b", "#;,'\"", "%s{}")
_FORMATS = (("JPEG", ".jpg"), ("PNG", ".png"), ("JPEG", ".JPEG"), ("JPEG", ".jpg"))
_ONE_IN = 97  # is damaged


@dataclass
class Made:
    """What lies in a folder.

    Attributes:
        good, bad: the names of images, from the folder on; those of `nameless` are no UTF-8.
    """

    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)


def make(folder: Path, count: int) -> Made:
    """Writes so many images of 64 to 300 pixels a side, each another one."""
    rng, made = np.random.default_rng(0), Made()
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    waves = [_waves(rng) for _ in range(16)]
    for index in range(count):
        # Every name stands in all folders, one after the other.
        number, where = divmod(index, len(_FOLDERS))
        kind, suffix = _FORMATS[number % len(_FORMATS)]
        name = str(Path(_FOLDERS[where]) / f"{_FIRST[number % len(_FIRST)]}{number:05}{suffix}")
        content = _encoded(waves[index % len(waves)], index, rng, kind)
        is_bad = index % _ONE_IN == _ONE_IN - 1
        (folder / name).write_bytes(_DAMAGES[index % len(_DAMAGES)](content) if is_bad else content)
        (made.bad if is_bad else made.good).append(name)
    latin = os.fsdecode(b"caf\xe9.png")
    (folder / latin).write_bytes(_encoded(waves[0], 0, rng, "PNG"))
    made.nameless.append(latin)
    (folder / "notes.txt").write_text("no image")
    (folder / "album.jpg").mkdir(exist_ok=True)
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "cats" / "loop").symlink_to("..")
    return made


def _waves(rng: np.random.Generator) -> Image.Image:
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((300, 300), Image.Resampling.BICUBIC)


def _encoded(waves: Image.Image, index: int, rng: np.random.Generator, kind: str) -> bytes:
    height, width = rng.integers(64, 301, 2)
    left, upper = rng.integers(0, 301 - width), rng.integers(0, 301 - height)
    image = waves.crop((left, upper, left + width, upper + height))
    if index % 11 == 3:
        image = image.convert("L")
    if index % 13 == 5 and kind == "PNG":
        image = image.convert("RGBA")
    out = io.BytesIO()
    image.save(out, kind, **({"compress_level": 1} if kind == "PNG" else {"quality": 85}))
    return out.getvalue()


def _deep(_: bytes) -> bytes:
    """A PNG of 16 bits a channel."""
    deep: NDArray[np.uint16] = np.full((64, 64), 40_000, np.uint16)
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "PNG")
    return out.getvalue()


#: What becomes of a damaged image's content.
_DAMAGES: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: content[: len(content) // 2],
    lambda content: b"",
    lambda content: b"<html>404</html>",
    lambda content: content[:20],
    _deep,
)


if __name__ == "__main__":
    made = make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
    print(f"{len(made.good)} images, {len(made.bad)} damaged")
