"""Weights from the files of other tools: state dicts under many names, read without running anything in them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from escort.cli.console import check_is_file, first_sentence
from escort.prune import listing

#: What the files are called: torch's, Lightning's (.ckpt), Hugging Face's (.bin) and those of torch's examples (.tar).
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")
#: Under which names tools keep a model's state dict among other things.
_KEYS = ("state_dict", "model_state_dict", "model")
#: What torch.compile puts into names, at any depth.
_COMPILED = "_orig_mod."
#: A batch norm counts its batches in training; older files lack the counts, and inference needs none.
_COUNT = "num_batches_tracked"
_ORIGINAL, _MASK = "_orig", "_mask"
_PARAMETRIZED, _PARAMETRIZATION_MASK = ".original", ".0.mask"
#: NNCF's names: a mask that is multiplied, and whatever else a weight passes through.
_NNCF = "__nncf_hooks."
_NNCF_MASK = re.compile(r"(.*)__nncf_hooks\.post_hooks\.([^.]+)__0\.0\.binary_mask")


def load_into(model: nn.Module, path: Path) -> list[str]:
    """Loads a checkpoint's weights into a model.

    The checkpoint is a state dict or holds one as "state_dict", "model_state_dict" or "model". Its names may stand
    behind a prefix ("module.", a Lightning module's "model.") and have "_orig_mod." in them. Pruned weights that are
    kept as an original and a mask are multiplied, unless the model keeps them so, too.

    Returns:
        The names of tensors beside the prefix that the model's weights stand behind: they are left out.

    Raises:
        FileNotFoundError, ValueError: where there is no such file, it needs more than ``weights_only=True`` loads, or
            it does not fit the model; names the file and the remedy.
    """
    state = _state_dict(_read(path), path)
    wanted = model.state_dict()
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    state = _masked(state, {name for name in state if _is_known(name, wanted)}, path)
    prefix = _prefix(state, [name for name in wanted if not name.endswith(_COUNT)], path)
    named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    _check_fit(named, wanted, f"{path} does not fit {type(model).__name__}")
    model.load_state_dict(named, strict=False)
    return [name for name in state if not name.startswith(prefix)]


def _read(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a checkpoint ends in one of {', '.join(SUFFIXES)}; name one of these")
    check_is_file(path, "a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}; save it anew") from error
    except Exception as error:
        raise ValueError(
            f"{path} cannot be loaded with weights_only=True ({first_sentence(error)}); where you trust it, load it in "
            "Python and save the model's state_dict() by torch.save or as .safetensors"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The only state dict in what was read."""
    while isinstance(content, Mapping) and not _is_state_dict(content):
        keys = [key for key in _KEYS if isinstance(content.get(key), Mapping)]
        if len(keys) > 1:
            raise ValueError(f"{path} holds several state dicts ({', '.join(keys)}); save the one that is meant alone")
        if not keys:
            break
        content = content[keys[0]]
    if not _is_state_dict(content):
        raise ValueError(
            f"{path} holds no state dict, names with tensors; save the model's state_dict(), or a dict with it as one "
            f"of {', '.join(_KEYS)}"
        )
    return {name: tensor if tensor.layout is torch.strided else tensor.to_dense() for name, tensor in content.items()}


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )


def _is_known(name: str, wanted: Collection[str]) -> bool:
    """Whether the model has a tensor of that name, behind whatever prefix."""
    words = name.split(".")
    return any(".".join(words[first:]) in wanted for first in range(len(words)))


def _masked(state: Mapping[str, Tensor], known: Collection[str], path: Path) -> dict[str, Tensor]:
    """The state with each pruned weight in the place of its original and its mask, but for names that the model has."""
    whole = dict(state)
    for name in [name for name in state if name not in known]:
        weight, original, mask = _parts(name)
        if original in whole and mask in whole and whole[mask].shape == whole[original].shape:
            value = whole.pop(original)
            whole[weight] = value * whole.pop(mask).to(value.dtype)
    computed = (name for name in whole if name.endswith(_ORIGINAL) or ".parametrizations." in name or _NNCF in name)
    if unknown := [name for name in computed if name not in known]:
        raise ValueError(
            f"{path} holds weights that are computed from {listing(unknown, 6)}, and not by a mask that is in it; make "
            "them permanent before saving: by torch.nn.utils.parametrize.remove_parametrizations, by squash_mask of "
            "torch.ao.pruning's sparsifiers, whose masks are in no state dict, or by nncf.strip"
        )
    return whole


def _parts(name: str) -> tuple[str, str, str]:
    """The names of a pruned weight, its original and its mask, by that of one of the two; or empty."""
    if ".parametrizations." in name and name.endswith(_PARAMETRIZED):
        head = name.removesuffix(_PARAMETRIZED)
        return head.replace(".parametrizations.", "."), name, head + _PARAMETRIZATION_MASK
    if match := _NNCF_MASK.fullmatch(name):
        weight = match[1] + match[2].replace(":", ".")
        return weight, weight, name
    weight = name.removesuffix(_ORIGINAL)
    return (weight, name, weight + _MASK) if weight != name else ("", "", "")


def _prefix(state: Iterable[str], wanted: list[str], path: Path) -> str:
    """What stands before the model's names in a checkpoint; "" where it has them as they are, or not all of them."""
    names = set(state)
    if not wanted or names.issuperset(wanted):
        return ""
    ends = {name.removesuffix(wanted[0]) for name in names if name.endswith(f".{wanted[0]}")}
    found = sorted(start for start in ends if names.issuperset(start + name for name in wanted))
    if len(found) > 1:
        raise ValueError(
            f"{path} holds the model's weights several times, behind {listing(found, 6)}; save those that are meant"
        )
    return found[0] if found else ""


def _check_fit(named: Mapping[str, Tensor], wanted: Mapping[str, Any], problem: str) -> None:
    missing = [name for name in wanted if name not in named and not name.endswith(_COUNT)]
    unexpected = [name for name in named if name not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"{problem}: it lacks {listing(missing, 6)}, and has {listing(unexpected, 6)} that the model does not "
            "know; use the checkpoint of this model"
        )
    shapes = {name: (tuple(tensor.shape), tuple(wanted[name].shape)) for name, tensor in named.items()}
    wrong = [f"{name} is {has}, not {takes}" for name, (has, takes) in shapes.items() if has != takes]
    if wrong:
        raise ValueError(f"{problem}: {listing(wrong, 3)}; use the checkpoint of this model")
