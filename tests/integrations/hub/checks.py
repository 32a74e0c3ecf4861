"""Converted models pushed to a Hub and loaded from it, by the Hub's own library, over a loopback endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

import escort
from tests.integrations.hub.server import Hub, hub
from tests.network.models import Small, pruned

X = torch.randn(2, 3, 16, 16)
TOKEN = "hf_of_a_test"


@pytest.fixture(scope="module")
def fast() -> escort.ConvertedModel:
    return escort.convert(pruned(Small()), X, methods=["direct"])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the library takes for the only one."""
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def test_there_and_back(fast: escort.ConvertedModel, here: Hub, tmp_path: Path) -> None:
    url = fast.push_to_hub("me/small", token=TOKEN, private=True, commit_message="A smaller one")
    assert url.startswith(f"{here.endpoint}/me/small/commit/")
    repository = here.repositories["me/small"]
    assert sorted(repository.files) == ["README.md", "config.json", "model.escort"]
    assert repository.private and repository.commits == ["A smaller one"] and f"Bearer {TOKEN}" in here.tokens
    loaded = escort.from_pretrained("me/small", token=TOKEN, cache_dir=tmp_path)
    assert torch.equal(loaded(X), fast(X)) and loaded.plan == fast.plan


def test_a_card_of_their_own_stays(fast: escort.ConvertedModel, here: Hub) -> None:
    fast.push_to_hub("me/small", token=TOKEN)
    card = here.repositories["me/small"].files["README.md"].decode()
    data = huggingface_hub.ModelCard(card, ignore_metadata_errors=False).data
    assert data.library_name == "escort-sparse" and "pruning" in data.tags
    here.repositories["me/small"].files["README.md"] = b"mine"
    fast.push_to_hub("me/small", token=TOKEN)
    repository = here.repositories["me/small"]
    assert repository.files["README.md"] == b"mine" and len(repository.commits) == 2


def test_a_folder_that_is_pushed_too(fast: escort.ConvertedModel, here: Hub, tmp_path: Path) -> None:
    url = fast.save_pretrained(tmp_path / "small", repo_id="me/small", push_to_hub=True, token=TOKEN)
    assert url is not None and (tmp_path / "small" / "model.escort").exists()
    assert here.repositories["me/small"].files["model.escort"] == (tmp_path / "small" / "model.escort").read_bytes()


def test_from_the_cache_alone(fast: escort.ConvertedModel, here: Hub, tmp_path: Path) -> None:
    fast.push_to_hub("me/small", token=TOKEN)
    escort.from_pretrained("me/small", cache_dir=tmp_path)
    del here.repositories["me/small"]
    loaded = escort.from_pretrained("me/small", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(loaded(X), fast(X))


def test_what_is_not_there(here: Hub, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        escort.from_pretrained("me/nothing", cache_dir=tmp_path)
    huggingface_hub.HfApi(token=TOKEN).create_repo("me/empty")
    with pytest.raises(FileNotFoundError, match="me/empty has no model.escort; name a repository"):
        escort.from_pretrained("me/empty", cache_dir=tmp_path)


def test_a_damaged_file_is_refused(fast: escort.ConvertedModel, here: Hub, tmp_path: Path) -> None:
    fast.push_to_hub("me/small", token=TOKEN)
    repository = here.repositories["me/small"]
    repository.files["model.escort"] = repository.files["model.escort"][:-100]
    with pytest.raises(escort.ArtifactError, match="its checksum does not match"):
        escort.from_pretrained("me/small", cache_dir=tmp_path)


def test_what_cannot_be_saved_makes_no_repository(fast: escort.ConvertedModel, here: Hub) -> None:
    with pytest.raises(ValueError, match="kernels are saved of networks on a GPU"):
        fast.push_to_hub("me/small", token=TOKEN, kernels=True)
    assert not here.repositories
