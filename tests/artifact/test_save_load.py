"""Converted models come back bit by bit, and what cannot be saved or loaded is named."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from escort.artifact import ArtifactError, load, save
from escort.network.convert import convert
from escort.network.model import ConvertedModel
from escort.network.plan import NetworkPlan
from tests.artifact.networks import Residual, Untraceable, X, assert_same, sparse


def test_a_traced_model_comes_back_bit_by_bit(converted: ConvertedModel, saved: Path, tmp_path: Path) -> None:
    back = load(saved)
    assert_same(back, converted)
    assert back.plan == converted.plan
    assert back.traced
    assert back.network.fc.weight.data_ptr() == back.network.again.weight.data_ptr()
    save(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_an_exported_program_comes_back(tmp_path: Path) -> None:
    model = sparse(Residual())
    fast = convert(torch.export.export(model, (X,)).module(check_guards=False), X)
    assert fast.traced and fast.plan.not_saved is None
    save(fast, tmp_path / "model")
    back = load(tmp_path / "model")
    with torch.inference_mode():
        assert torch.equal(back(X), fast(X))
        torch.testing.assert_close(back(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(back))(X), fast(X))
    assert torch.equal(pickle.loads(pickle.dumps(fast))(X), fast(X))


def test_an_untraceable_model_comes_back_into_a_new_one(untraced: ConvertedModel, saved_untraced: Path) -> None:
    fresh = Untraceable()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    back = load(saved_untraced, fresh)
    assert_same(back, untraced)
    assert back.plan == untraced.plan
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


def test_an_untraceable_model_is_asked_for(saved_untraced: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"untraced\.escort: it does not hold the whole program; pass load a new model of the class"
    ):
        load(saved_untraced)


def test_a_traced_model_needs_no_other(saved: Path) -> None:
    with pytest.raises(TypeError, match="model is an nn.Module, got 'cpu'; write device='cpu'"):
        load(saved, "cpu")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="its own program; leave out the model"):
        load(saved, Residual())


def test_what_names_no_file(converted: ConvertedModel) -> None:
    for call in (lambda: load(None), lambda: save(converted, None)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="path is a path, got NoneType; pass one such as"):
            call()


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (Untraceable(channels=4), "layer conv: the convolution takes 4 channels"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), "part features: the model has no features"),
        (nn.Module(), "pass a new model of the class"),
    ],
    ids=["channels", "structure", "empty"],
)
def test_another_model_is_refused(saved_untraced: Path, model: nn.Module, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        load(saved_untraced, model)


def _with_more() -> nn.Module:
    model = Untraceable()
    model.more = nn.Linear(2, 2)
    return model


def _with_less() -> nn.Module:
    model = Untraceable()
    model.fc = nn.Identity()
    return model


def _with_another_shape() -> nn.Module:
    model = Untraceable()
    model.fc = nn.Linear(6, 5)
    return model


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_with_more, "tensor more.weight is missing"),
        (_with_less, r"nothing in the network uses its tensor fc\.(weight|bias)"),
        (_with_another_shape, "fc.weight is of shape"),
    ],
)
def test_a_model_with_other_tensors_is_refused(
    saved_untraced: Path, make: Callable[[], nn.Module], complaint: str
) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        load(saved_untraced, make())


@pytest.mark.parametrize(("density", "share"), [(0.45, 0.65), (0.1, 0.18), (0.02, 0.07)])
def test_the_file_shrinks_with_the_density(tmp_path: Path, density: float, share: float) -> None:
    model = sparse(nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU()), density)
    save(convert(model, torch.randn(1, 32, 9, 9)), tmp_path / "model")
    assert (tmp_path / "model").stat().st_size <= share * len(safetensors.torch.save(model.state_dict()))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_an_interrupted_save_leaves_the_old_file(
    converted: ConvertedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"the old file")

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)) as caught:
        save(converted, path)
    if isinstance(error, OSError):
        assert "No space left on device; name a file in a folder that" in str(caught.value)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_stays_a_link_and_a_mode_a_mode(converted: ConvertedModel, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "model", tmp_path / "link"
    link.symlink_to(Path("folder") / "model")
    for mode in (None, 0o640, 0o600):
        if mode is not None:
            target.chmod(mode)
        save(converted, link)
        assert link.is_symlink() and os.readlink(link) == "folder/model"
        assert target.read_bytes() == saved.read_bytes() and not target.is_symlink()
        assert mode is None or target.stat().st_mode & 0o777 == mode
    assert os.listdir(target.parent) == ["model"] and sorted(os.listdir(tmp_path)) == ["folder", "link"]


def test_what_is_no_file_stays(converted: ConvertedModel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="cannot save: .*; name a file in a folder that exists"):
        save(converted, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("path", ["none/model", "file/model", "folder", "."])
def test_an_unwritable_path_is_named(
    converted: ConvertedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot save: .*; name a file in a folder that exists"):
        save(converted, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is not a file"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_only_a_converted_model_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="convert the model first"):
        save(Residual(), tmp_path / "model")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda n: setattr(n.fc, "in_features", 9), "layer fc: this Linear was changed after it was made"),
        (lambda n: n.fc.weight.data.fill_(float("nan")), "fc.weight holds NaN"),
        (lambda n: setattr(n, "scale", nn.Parameter(torch.ones(10, dtype=torch.cfloat))), "scale is a torch.complex64"),
        (lambda n: n.fc.register_forward_hook(print), "layer fc: forward hooks cannot be saved"),
    ],
    ids=["changed", "nan", "complex", "hook"],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, change: Callable[[Any], Any], complaint: str) -> None:
    model = convert(sparse(Residual()), X)
    change(model.network)
    with pytest.raises((TypeError, ValueError), match=complaint):
        save(model, tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_a_dense_network_that_was_kept_comes_back(tmp_path: Path, converted: ConvertedModel) -> None:
    plan: NetworkPlan = replace(converted.plan, kept_dense=True)
    kept = ConvertedModel(sparse(Residual()), plan)
    save(kept, tmp_path / "kept")
    back = load(tmp_path / "kept", Residual())
    assert back.plan.kept_dense
    assert_same(back, kept)


def test_files_are_told_of_in_the_log(
    converted: ConvertedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.escort"
    with caplog.at_level(logging.INFO, "escort"):
        save(converted, path)
        load(path, remeasure=False)
        load(path, remeasure=True)
    saved, loaded, again = (line for line in caplog.messages if str(path) in line)
    assert saved == f"saved {path}, {path.stat().st_size} bytes"
    assert re.fullmatch(rf"loaded {re.escape(str(path))} in \d+\.\d\d s", loaded)
    assert again.endswith(" s, to be measured anew")
