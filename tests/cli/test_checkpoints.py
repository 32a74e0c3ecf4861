"""Checkpoints of other tools: weights under many names, and what is said where a file does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from escort.cli import checkpoints
from tests.cli.invoking import invoke, succeed

TINY = "tests.cli.test_checkpoints:tiny"
State = dict[str, Tensor]


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def trained() -> nn.Sequential:
    """Another state than that of a new one."""
    model = tiny()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(5))
    return model


class Mask(nn.Module):
    """As torch.ao.pruning and others parametrize a pruned weight."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked() -> nn.Sequential:
    model = trained()
    prune.l1_unstructured(model[3], "weight", 0.5)
    return model


def parametrized() -> nn.Sequential:
    model = trained()
    parametrize.register_parametrization(model[3], "weight", Mask(torch.rand(4, 8, 3, 3) > 0.5))
    return model


def weight_normed() -> nn.Sequential:
    model = trained()
    parametrizations.weight_norm(model[3])
    return model


def named(state: State, change: Callable[[str], str]) -> State:
    return {change(name): tensor for name, tensor in state.items()}


def compiled(name: str) -> str:
    return f"_orig_mod.{name.replace('.', '._orig_mod.', 1)}"


#: What tools save of a model's state.
WAYS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.1},
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
    "nested": lambda state: {"model": {"state_dict": state, "step": 1}, "epoch": 3},
    "data parallel": lambda state: {"arch": "tiny", "state_dict": named(state, lambda name: f"module.{name}")},
    "compiled": lambda state: named(state, compiled),
    "compiled data parallel": lambda state: named(state, lambda name: f"_orig_mod.module.{name}"),
    "lightning": lambda state: {
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1},
        "state_dict": {**named(state, lambda name: f"model.{name}"), "loss.weight": torch.ones(3)},
    },
    "without counts": lambda state: {name: tensor for name, tensor in state.items() if "num_batches" not in name},
    "sparse": lambda state: {
        name: tensor.to_sparse() if tensor.ndim == 4 else tensor for name, tensor in state.items()
    },
    "half": lambda state: {name: tensor.half() for name, tensor in state.items()},
}


@pytest.mark.parametrize("make", [trained, masked, parametrized])
@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_what_other_tools_save(
    way: Callable[[State], Any], make: Callable[[], nn.Sequential], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, loaded, path = make(), tiny(), tmp_path / "weights.pt"
    torch.save(way(source.state_dict()), path)
    left_out = checkpoints.load_into(loaded, path)
    assert left_out == (["loss.weight"] if "lightning" in request.node.name else [])
    for index in (0, 1, 3):
        for name in ("weight", "bias"):
            expected, rtol = getattr(source[index], name), 1e-3 if "half" in request.node.name else 0.0
            torch.testing.assert_close(getattr(loaded[index], name), expected, rtol=rtol, atol=rtol)
    assert (loaded[3].weight == 0).any() == (make is not trained)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_masks_of_nncf(prefix: str, tmp_path: Path) -> None:
    """They lie beside the dense weights, in what it puts into the outermost module."""
    source, loaded, path = trained(), tiny(), tmp_path / "weights.pt"
    mask = torch.rand(4, 8, 3, 3) > 0.5
    hooks = {"__nncf_hooks.post_hooks.3:weight__0.0.binary_mask": mask}
    torch.save(named({**source.state_dict(), **hooks}, lambda name: prefix + name), path)
    checkpoints.load_into(loaded, path)
    assert torch.equal(loaded[3].weight, source[3].weight * mask) and torch.equal(loaded[0].weight, source[0].weight)


@pytest.mark.parametrize("suffix", checkpoints.SUFFIXES)
def test_every_suffix(suffix: str, tmp_path: Path) -> None:
    path, source, loaded = tmp_path / f"weights{suffix}", trained(), tiny()
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    checkpoints.load_into(loaded, path)
    assert torch.equal(loaded[3].weight, source[3].weight)


@pytest.mark.parametrize("make", [masked, parametrized, weight_normed])
def test_a_model_that_keeps_its_weights_in_parts_takes_them_so(
    make: Callable[[], nn.Sequential], tmp_path: Path
) -> None:
    source, loaded, path = make(), make(), tmp_path / "weights.pt"
    torch.save(named(source.state_dict(), lambda name: f"module.{name}"), path)
    checkpoints.load_into(loaded, path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


class _NeedsMore:
    """What weights_only refuses."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; name a checkpoint"),
        (b"not a zip file", r"weights_only=True \(.*save the model's state_dict\(\)"),
        (b"", r"weights_only=True \(EOFError\); where you trust it"),
        ({"0.weight": torch.zeros(8, 3, 3, 3), "extra": torch.zeros(1)}, "it lacks 0.bias, 1.weight, .* and has extra"),
        (
            {**tiny().state_dict(), "0.weight": torch.zeros(8, 3, 5, 5)},
            r"0.weight is \(8, 3, 5, 5\), not \(8, 3, 3, 3\); use",
        ),
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
        ({**tiny().state_dict(), "epoch": 3}, "no state dict"),
        ({1: torch.zeros(1)}, "no state dict"),
        ({"model": nn.ReLU}, r"weights_only=True \(UnpicklingError: Weights only load failed\);"),
        ({"state_dict": tiny().state_dict(), "hyper_parameters": _NeedsMore()}, "weights_only=True"),
        ({"model": tiny().state_dict(), "state_dict": tiny().state_dict()}, "several state dicts .state_dict, model.;"),
        (
            {**named(tiny().state_dict(), "student.{}".format), **named(tiny().state_dict(), "teacher.{}".format)},
            "several times, behind student., teacher.; save those that are meant",
        ),
        (weight_normed().state_dict(), r"computed from 3.parametrizations.weight.original0.*make them permanent"),
        (
            {**tiny().state_dict(), "__nncf_hooks.post_hooks.3:weight__0.0.mask": torch.ones(4, 8, 3, 3)},
            "computed from __nncf_hooks.*not by a mask that is in it; make them permanent .*by nncf.strip",
        ),
        (
            {**tiny().state_dict(), "3.weight_orig": torch.ones(1), "3.weight_mask": torch.ones(2)},
            "computed from 3.weight_orig",
        ),
    ],
)
def test_bad_checkpoints(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        checkpoints.load_into(tiny(), path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_safetensors(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="not a safetensors file"):
        checkpoints.load_into(tiny(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="ends in one of"):
        checkpoints.load_into(tiny(), tmp_path / "weights.onnx")
    with pytest.raises(FileNotFoundError, match="it is a folder; name a checkpoint"):
        (tmp_path / "folder.pt").mkdir()
        checkpoints.load_into(tiny(), tmp_path / "folder.pt")


class _Attack:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "NOTHING"])
def test_nothing_in_a_checkpoint_runs(tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    torch.save({"state_dict": tiny().state_dict(), "callbacks": _Attack(tmp_path / "ran")}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="weights_only=True"):
        checkpoints.load_into(tiny(), tmp_path / "weights.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_lightning_file_on_the_command_line(tmp_path: Path) -> None:
    torch.save(WAYS["lightning"](trained().state_dict()), tmp_path / "last.ckpt")
    args = TINY, "--checkpoint", tmp_path / "last.ckpt", "--input", "1,3,8,8", "--output", tmp_path / "m.escort"
    assert "last.ckpt: left out loss.weight, which the model has not" in succeed("convert", *args).stderr.replace(
        "\n", ""
    )
    torch.save([1], tmp_path / "last.ckpt")
    assert invoke("convert", *args).exit_code == 2
