"""Models by name: factories, checkpoints and archives, and what is said where one does not load."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from escort.cli import models
from escort.cli.options import ModelOptions
from tests.onnx_models import small

TINY = "tests.cli.test_models:tiny"


def tiny() -> nn.Module:
    """In training mode, as factories leave it."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.fixture(autouse=True)
def restore_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming a model puts the working directory on the import path, for good."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_archives_run_at_other_batch_sizes(tmp_path: Path) -> None:
    path, model = tmp_path / "model.pt2", tiny().eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8, 8),)), path)
    loaded, x = models.load(str(path)), torch.randn(5, 3, 8, 8)
    assert not loaded.training
    torch.testing.assert_close(loaded(x), model(x))


def test_onnx_files_say_what_they_take(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small(), path)
    assert models.declared_shapes(models.load(str(path))) == [(1, 3, 12, 10)]
    with pytest.raises(ValueError, match="leave out the checkpoint"):
        models.load(str(path), tmp_path / "weights.pt")
    width = small()
    width.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "w"
    onnx.save(width, path)
    with pytest.raises(ValueError, match=r"leaves sizes of 'x' open \(\?,3,12,\?\); give them with --input"):
        models.declared_shapes(models.load(str(path)))


def test_files_of_bytes_are_given_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    file = small()
    file.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    cast = onnx.helper.make_node("Cast", [file.graph.input[0].name], ["as_float"], to=onnx.TensorProto.FLOAT)
    for node in file.graph.node:
        node.input[:] = ["as_float" if name == file.graph.input[0].name else name for name in node.input]
    file.graph.node.insert(0, cast)
    onnx.save(file, path)
    _, (x,) = ModelOptions(str(path)).load_with_inputs()
    assert x.dtype is torch.uint8 and x.shape == (1, 3, 12, 10) and x.max() > 200
    file.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.save(file, path)
    with pytest.raises(ValueError, match="its input 'x' is of torch.int64; convert it in Python"):
        ModelOptions(str(path)).load_with_inputs()


def test_models_come_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text("from torch import nn\n\nclass Zoo:\n    net = nn.Conv2d(3, 4, 3)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(models.load("my_nets:Zoo.net"), nn.Conv2d)
    assert not models.load("my_nets:Zoo.net").training


def test_modules_that_fail_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import missing_dependency\n")
    (tmp_path / "typo.py").write_text("def net(:\n")
    monkeypatch.chdir(tmp_path)
    for name, message in (("needs_more", "No module named 'missing_dependency'"), ("typo", "SyntaxError")):
        with pytest.raises(ValueError, match=f"importing {name} failed: .*{message}"):
            models.load(f"{name}:net")


class _Attack:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "part",
    [
        "data/sample_inputs/model.pt",
        "data/weights/weight_0",
        "data/constants/opaque_obj_0",
        "data/constants/opaque_obj_0/x",
        "data/constants/OPAQUE_OBJ_0",
        "data/constants/opaque_obj_0.json",
        "data/constants/Opaque_obj_0_constants_config.json",
    ],
)
def test_what_is_pickled_in_an_archive_does_not_run(part: str, tmp_path: Path) -> None:
    path, forged, mark = tmp_path / "model.pt2", tmp_path / "forged.pt2", tmp_path / "ran"
    model = tiny().eval()
    torch.export.save(torch.export.export(model, (torch.randn(1, 3, 8, 8),)), path)
    pickled = io.BytesIO()
    if "constants" in part:
        pickle.dump(_Attack(mark), pickled)
    else:
        torch.save((_Attack(mark),), pickled)
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(forged, "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("model_weights_config.json") and "weights" in part:
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true')
            if name.endswith("model_constants_config.json") and "constants" in part:
                name_in_config = part.removeprefix("data/constants/").lower()
                entry = {"path_name": name_in_config, "is_param": False, "use_pickle": True, "tensor_meta": None}
                data = json.dumps({"config": {"a": entry}}).encode()
            if not name.endswith(part):
                bad.writestr(name, data)
        bad.writestr(good.namelist()[0].partition("/")[0] + "/" + part, pickled.getvalue())
    with pytest.raises(ValueError, match="is not a torch.export archive"):
        models.load(str(forged))
    assert not mark.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("part", ["data/aotinductor/model/code.so", "data/executorch/a", "data/weights/../x", "x"])
def test_other_members_of_an_archive_are_refused(part: str, tmp_path: Path) -> None:
    """Compiled libraries above all, which torch would load."""
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(tiny().eval(), (torch.randn(1, 3, 8, 8),)), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/{part}", b"")
    with pytest.raises(ValueError, match=f"its member .*/{part} may run code .*; export the model anew"):
        models.load(str(path))


def test_archives_exported_in_training_mode(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(tiny().train(), (torch.randn(2, 3, 8, 8),)), path)
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
        models.load(str(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"not a torch\.export archive"):
        models.load(str(path))
    with pytest.raises(ValueError, match="its own weights"):
        models.load(str(path), tmp_path / "weights.pt")
