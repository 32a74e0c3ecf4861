"""What `escort run` feeds a model: an image, the images of a folder, or a batch from a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from escort.cli.console import first_sentence, note
from escort.cli.options import numbers
from escort.layers import Images
from escort.prune import listing

_ARRAYS = (".npy", ".npz")
#: Formats that are left out: for EPS Pillow starts Ghostscript on the file, of the others it reads no pixels by itself.
_LEFT_OUT = frozenset(("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"))
#: Modes of more than 8 bits per channel, of which Pillow would keep what fits 8.
_DEEP_MODES = ("I", "F")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preparation:
    """How an image becomes a tensor: resized, scaled to 0..1, then ``(x - mean) / deviation`` per channel.

    Attributes:
        layer: of a model that does all but the first of these itself, and takes bytes.

    Raises:
        ValueError: unless there are 1 or 3 channels, with as many means and positive deviations.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    layer: Images | None = None

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise ValueError(f"the model takes {self.channels} channels, an image has 1 or 3; run it on an .npy batch")
        for name, option, default in (("mean", self.mean, 0), ("deviation", self.deviation, 1)):
            value = option or (_IMAGENET[default] if self.channels == 3 else (float(default),))
            if len(value) != self.channels:
                raise ValueError(
                    f"the model takes {self.channels} channels, got {len(value)} values of the {name}; give one of each"
                )
            object.__setattr__(self, name, value)
        if min(self.deviation) <= 0:
            raise ValueError(f"deviations are positive, got {self.deviation}")

    def __str__(self) -> str:
        size = f"resized to {self.height}x{self.width}"
        if self.layer is not None:
            return f"{size}; the model normalises them"
        mean, deviation = (",".join(f"{x:g}" for x in values) for values in (self.mean, self.deviation))
        whose = " (ImageNet's; --mean and --std change that)" if (self.mean, self.deviation) == _IMAGENET else ""
        return f"{size}, scaled to 0..1, less mean {mean}, by deviation {deviation}{whose}"

    def blank(self) -> Tensor:
        """Zeros as :meth:`read` gives an image."""
        if self.layer is None:
            return torch.zeros(self.channels, self.height, self.width)
        is_last = self.layer.channels_last
        shape = (self.height, self.width, self.channels) if is_last else (self.channels, self.height, self.width)
        return torch.zeros(shape, dtype=torch.uint8)

    def read(self, path: Path) -> Tensor:
        """The image as (channels, height, width), or as the model's own layer takes it."""
        from PIL import Image

        try:
            with Image.open(path, formats=_formats()) as image:
                if image.mode.startswith(_DEEP_MODES):
                    raise ValueError(f"its mode {image.mode} has more than 8 bits per channel")
                resized = image.convert(_MODES[self.channels]).resize(
                    (self.width, self.height), Image.Resampling.BILINEAR
                )
        except Exception as error:  # of a damaged file Pillow's plugins raise anything
            raise ValueError(
                f"{path} is no readable image ({error}); mend it, convert it to 8 bits, or leave it out"
            ) from error
        pixels = np.asarray(resized).reshape(self.height, self.width, self.channels)
        if self.layer is not None:
            return torch.from_numpy(pixels.copy() if self.layer.channels_last else pixels.transpose(2, 0, 1).copy())
        pixels = pixels.astype(np.float32) / 255.0
        normalised = (pixels - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)
        return torch.from_numpy(normalised.transpose(2, 0, 1).copy())


def layer_of(mean: str, deviation: str) -> Images | None:
    """The layer that normalises so, as the command line says it; None where it says nothing."""
    if not mean and not deviation:
        return None
    if not (mean and deviation):
        raise ValueError("--mean and --std go together: pass both, with a number for each channel")
    return Images(_floats(mean, "--mean"), _floats(deviation, "--std"))


@dataclass(frozen=True)
class ImageOptions:
    """How images are prepared, as the command line says it."""

    size: Annotated[
        str | None, typer.Option(metavar="H,W", help="Resize images to this; by default to the size of the plan.")
    ] = None
    mean: Annotated[
        str,
        typer.Option(
            metavar="R,G,B",
            help="Subtracted from pixels in 0..1: what the model was trained with. By default ImageNet's, "
            "0.485,0.456,0.406; of grey images 0.",
        ),
    ] = ""
    deviation: Annotated[
        str,
        typer.Option(
            "--std",
            metavar="R,G,B",
            help="Pixels are divided by it then. By default ImageNet's, 0.229,0.224,0.225; of grey images 1.",
        ),
    ] = ""
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Images of folders within the folder, too, named with these.")
    ] = False

    def inputs(self, source: Path, shape: tuple[int, int, int], layer: Images | None = None) -> Inputs:
        """The inputs in a folder or a file, for a model that was planned for (C, H, W).

        Args:
            layer: what the model begins with where it takes bytes.
        """
        channels, height, width = shape
        if layer is not None and (self.mean or self.deviation):
            raise ValueError("the model normalises images itself; leave out --mean and --std")
        if source.is_dir() or source.suffix.lower() not in _ARRAYS:
            if self.size is not None:
                height, width = _pair(self.size)
            mean, deviation = _floats(self.mean, "--mean"), _floats(self.deviation, "--std")
            preparation = Preparation(channels, height, width, mean, deviation, layer)
            return Inputs.of_images(source, preparation, recursive=self.recursive)
        if self != ImageOptions():
            raise ValueError("--size, --mean, --std and --recursive are for images; an array goes in as it is")
        return Inputs.of_file(source, channels, layer)


@dataclass(frozen=True)
class Inputs:
    """Named inputs that are read batch by batch; an image is opened when its turn comes.

    Attributes:
        folder: where images lie; their names are paths from there.
    """

    names: list[str]
    array: NDArray[Any] | None
    paths: list[Path]
    preparation: Preparation | None
    folder: Path | None = None

    @classmethod
    def of_images(cls, source: Path, preparation: Preparation, *, recursive: bool = False) -> Inputs:
        """An image, or the images of a folder by name; a note says what else is in it.

        Args:
            recursive: whether those of folders within it are taken, too; folders that are links are not looked into.
        """
        folder = source if source.is_dir() else source.parent
        suffixes, images, left_out = _suffixes(), dict[str, Path](), list[str]()
        for path in _entries(source, recursive=recursive) if source.is_dir() else [source]:
            name = path.relative_to(folder).as_posix()
            if path.is_file() and path.suffix.lower() in suffixes:
                images[name] = path
            else:
                left_out.append(f"{name}/" if path.is_dir() else name)
        folders = [name for name in left_out if name.endswith("/")]
        if not images:
            deeper = "to which links are not followed" if recursive else "or pass --recursive"
            inside = f", or one of its folders, {listing(folders)}, {deeper}" if folders else ""
            raise ValueError(
                f"{source} holds no image and is no .npy or .npz batch; name images that Pillow reads, such as .jpg or "
                f".png{inside}"
            )
        if left_out:
            deeper = "links to folders are not followed" if recursive else "--recursive takes what folders hold, too"
            remedy = f"; {deeper}" if folders else ""
            note(f"{source}: left out {listing(left_out)}: no images, or of formats that are not read here{remedy}")
        return cls(list(images), None, list(images.values()), preparation, folder)

    @classmethod
    def of_file(cls, path: Path, channels: int, layer: Images | None = None) -> Inputs:
        """The (N, channels, H, W) array of an .npy file, or the only one of an .npz; of bytes as a layer takes them."""
        array = _read_array(path)
        is_last = layer is not None and layer.channels_last
        if array.ndim != 4 or array.shape[3 if is_last else 1] != channels:
            expected = f"(N, H, W, {channels})" if is_last else f"(N, {channels}, H, W)"
            raise ValueError(f"{path} holds an array of shape {array.shape}; the model takes {expected}; save one")
        if not array.size:
            raise ValueError(f"{path} holds no sample: its array has the shape {array.shape}; save at least one")
        if layer is not None:
            if array.dtype != np.uint8:
                raise ValueError(f"{path} holds {array.dtype}; the model normalises images itself: save them as uint8")
            return cls([str(index) for index in range(len(array))], array, [], None)
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{path} holds {array.dtype}; prepare it as the model was trained, as float32")
        return cls([str(index) for index in range(len(array))], array, [], None)

    def batches(self, size: int, failed: dict[str, str]) -> Iterator[tuple[list[str], Tensor]]:
        """Up to `size` each with their names, in order: (C, H, W) float32, or bytes where the model takes these.

        Args:
            failed: images that cannot be read are left out, and written to it by name with the reason.
        """
        if self.array is not None:
            dtype = np.uint8 if self.array.dtype == np.uint8 else np.float32
            for first in range(0, len(self.names), size):
                part = np.ascontiguousarray(self.array[first : first + size], dtype=dtype)
                yield self.names[first : first + size], torch.from_numpy(part)
            return
        assert self.preparation is not None
        names, read = list[str](), list[Tensor]()
        for name, path in zip(self.names, self.paths, strict=True):
            try:
                read.append(self.preparation.read(path))
            except ValueError as error:
                failed[name] = str(error)
                continue
            names.append(name)
            if len(names) == size:
                yield names, torch.stack(read)
                names, read = [], []
        if names:
            yield names, torch.stack(read)


def _entries(folder: Path, *, recursive: bool) -> Iterator[Path]:
    """What is in a folder, by name; in the place of a folder what is in that, where one looks into it."""
    for path in sorted(folder.iterdir()):
        if recursive and path.is_dir() and not path.is_symlink():
            yield from _entries(path, recursive=True)
        else:
            yield path


def _formats() -> list[str]:
    """The formats that are read, by Pillow's names. Raises ImportError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install escort-sparse[images]") from error
    Image.init()
    return [name for name in Image.OPEN if name not in _LEFT_OUT]


def _suffixes() -> set[str]:
    """What the names of images end in."""
    formats = _formats()
    from PIL import Image

    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def _read_array(path: Path) -> NDArray[Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if len(loaded.files) != 1:
                raise ValueError(f"it holds {len(loaded.files)} arrays ({', '.join(loaded.files)}), not one")
            return loaded[loaded.files[0]]
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file numpy, zipfile and zlib raise anything
        raise ValueError(
            f"{path} is no readable .npy or .npz batch ({first_sentence(error)}); write it by numpy.save"
        ) from error


def _pair(size: str) -> tuple[int, int]:
    values = numbers(size, "--size")
    if len(values) != 2:
        raise ValueError(f"--size is height,width, got {size!r}")
    return values[0], values[1]


def _floats(text: str, option: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{option} takes finite numbers separated by commas, got {text!r}")
    return values
