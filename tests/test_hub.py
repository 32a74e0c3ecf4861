"""Folders as repositories of converted models have them; `make test-integrations` tries the Hub's own library."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import escort
from tests.network.models import Branching, Small, pruned

X = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def fast() -> escort.ConvertedModel:
    return escort.convert(pruned(Small()), X, methods=["direct"])


def test_a_folder_there_and_back(fast: escort.ConvertedModel, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pruned-small"
    assert fast.save_pretrained(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.escort"]
    loaded = escort.from_pretrained(folder)
    assert torch.equal(loaded(X), fast(X)) and loaded.plan == fast.plan
    assert torch.equal(escort.from_pretrained(str(folder), device="cpu", remeasure=False)(X), fast(X))
    facts = json.loads((folder / "config.json").read_text())
    assert facts["library_name"] == "escort-sparse" and facts["input_shapes"] == [[2, 3, 16, 16]]


def test_a_folder_of_several(fast: escort.ConvertedModel, tmp_path: Path) -> None:
    """As on the Hub, `subfolder` says which."""
    fast.save_pretrained(tmp_path / "small")
    loaded = escort.from_pretrained(tmp_path, subfolder="small", remeasure=False)
    assert torch.equal(loaded(X), fast(X))
    with pytest.raises(FileNotFoundError, match="large has no model.escort"):
        escort.from_pretrained(tmp_path, subfolder="large")


def test_the_card(fast: escort.ConvertedModel, tmp_path: Path) -> None:
    fast.save_pretrained(tmp_path, repo_id="me/small")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: escort-sparse\n") and "\n# me/small\n" in card
    assert 'escort.from_pretrained("me/small")' in card
    assert f"{(tmp_path / 'model.escort').stat().st_size:,} bytes" in card
    assert "| Layer | Convolution | Zeros | Method |" in card and "\n| second | 8->8 3x3, 8x8 |" in card
    (tmp_path / "README.md").write_text("mine")
    fast.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_model_whose_code_no_file_holds(tmp_path: Path) -> None:
    model = pruned(Branching())
    fast = escort.convert(model, X)
    fast.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f'escort.from_pretrained("{tmp_path.name}", model)' in card and "a new dense one" in card
    torch.testing.assert_close(escort.from_pretrained(tmp_path, Branching())(X), fast(X))


def test_arguments_that_nothing_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="from_pretrained takes no kernel, remeasuer"):
        escort.from_pretrained(tmp_path, remeasuer=True, kernel=True, revision="main")


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="has no model.escort; name a folder"):
        escort.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"me/small is no folder here, and .*pip install 'escort-sparse\[hub\]'"):
        escort.from_pretrained("me/small")


def test_without_the_library(fast: escort.ConvertedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'escort-sparse\[hub\]'"):
        fast.push_to_hub("me/small")


def test_kernels_are_for_gpus(fast: escort.ConvertedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernels are saved of networks on a GPU"):
        fast.save_pretrained(tmp_path, kernels=True)


@pytest.mark.gpu
def test_kernels_go_along(tmp_path: Path) -> None:
    fast = escort.convert(pruned(Small()).cuda().half(), X.cuda().half())
    fast.save_pretrained(tmp_path, kernels=True)
    assert (tmp_path / "model.escort.kernels").exists()
    loaded = escort.from_pretrained(tmp_path, kernels=True)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(X.cuda().half()), fast(X.cuda().half()), rtol=2e-2, atol=2e-2)
