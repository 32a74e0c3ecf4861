"""Converted models on the Hugging Face Hub, and in folders as repositories there have them.

A repository has the file of :func:`escort.save`, a card that shows the plan, and a few facts in JSON, which nothing
here reads. Names and arguments are those of huggingface_hub's own mixin for models. Two functions are methods of
converted models, which `escort/__init__.py` makes of them.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from escort.arguments import path_of
from escort.artifact.kernels import beside
from escort.artifact.load import load
from escort.artifact.save import save
from escort.network.model import ConvertedModel
from escort.network.plan import plan_table
from escort.planner.machine import Machine
from escort.report import markdown

#: The names of the files in a repository.
MODEL, CARD, FACTS = "model.escort", "README.md", "config.json"
_EXTRA = "the Hub takes huggingface_hub: pip install 'escort-sparse[hub]'"

_CARD = """\
---
library_name: escort-sparse
tags:
- escort
- pruning
- sparsity
---

# {name}

A pruned network that [Escort](https://arxiv.org/abs/1802.10280) converted: each of its convolutions runs by the method
that measured fastest, from the weights' nonzeros alone. `{file}` has {size:,} bytes and holds no code.

```python
import escort

fast = escort.from_pretrained("{name}"{model})  # layers are measured anew where the machine is another one
```

{about}

{plan}
"""
_OWN_CODE = "Modules of the model could not be traced: `model` is a new dense one of the class that was converted."


def save_pretrained(
    self: ConvertedModel,
    save_directory: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    push_to_hub: bool = False,
    kernels: bool = False,
    **push: Any,
) -> str | None:
    """Writes a converted model into a folder as a repository on the Hub has it; a card that is there stays.

    Args:
        save_directory: is made where it is not there.
        repo_id: what the card calls the model, by default like the folder.
        push_to_hub: whether to push it besides, with `push` as :func:`push_to_hub` takes it.
        kernels: as of :func:`escort.save`.

    Returns:
        The address of the commit, if it was pushed.

    Raises:
        ValueError, TypeError, OSError: as :func:`escort.save`.
    """
    folder = path_of(save_directory, "resnet50-pruned", "save_directory")
    name = folder.resolve().name if repo_id is None else repo_id
    folder.mkdir(parents=True, exist_ok=True)
    save(self, folder / MODEL, kernels=kernels)
    (folder / FACTS).write_text(json.dumps(_facts(self), indent=2) + "\n")
    if not (folder / CARD).exists():
        (folder / CARD).write_text(_card(self, name, (folder / MODEL).stat().st_size))
    return self.push_to_hub(name, kernels=kernels, **push) if push_to_hub else None


def push_to_hub(
    self: ConvertedModel,
    repo_id: str,
    *,
    commit_message: str = "Push a converted network",
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    kernels: bool = False,
) -> str:
    """Pushes a converted model to a repository of the Hub, in one commit; a card that is there stays.

    Example:
        >>> fast.push_to_hub("me/resnet50-pruned")
        >>> fast = escort.from_pretrained("me/resnet50-pruned")

    Args:
        repo_id: the repository, ``"user/name"``; it is made where it is not there.
        private: whether to make it a private one; None is for what the owner's settings say.
        token: of the user; None is for the one of ``hf auth login``.
        branch: what to commit to, by default main.
        create_pr: whether to make a pull request instead.
        kernels: whether to push the compiled kernels too, see :func:`escort.save`.

    Returns:
        The address of the commit.

    Raises:
        ImportError: where huggingface_hub is not installed.
        ValueError, TypeError: as :func:`escort.save`; and what huggingface_hub raises.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    api = HfApi(token=token, library_name="escort-sparse", library_version=Machine.here().escort)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(self, folder, repo_id=repo_id, kernels=kernels)  # first, as it may be refused
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        has_card = api.file_exists(repo_id, CARD, revision=branch)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
            ignore_patterns=[CARD] if has_card else None,
        )
    return str(commit.commit_url)


#: What `from_pretrained` takes for the Hub alone, and a folder has no use for.
_OF_DOWNLOADS = frozenset(
    "revision token cache_dir local_files_only force_download subfolder endpoint etag_timeout user_agent".split()
)


def from_pretrained(
    pretrained_model_name_or_path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | None = None,
    remeasure: bool | None = None,
    kernels: bool = False,
    **download: Any,
) -> ConvertedModel:
    """The converted model of a repository on the Hub, or of a folder.

    Example:
        >>> fast = escort.from_pretrained("me/resnet50-pruned", revision="main")

    Args:
        pretrained_model_name_or_path: a repository's ``"user/name"``, or a folder that ``save_pretrained`` wrote.
        model, device, remeasure, kernels: as of :func:`escort.load`. A model of a stranger is safe to load without
            `kernels`, which are code.
        download: as of ``huggingface_hub.hf_hub_download``: ``revision``, ``token``, ``cache_dir``,
            ``local_files_only``, and so on.

    Raises:
        ArtifactError, ValueError, OSError: as :func:`escort.load`.
        FileNotFoundError: where there is no converted model in it.
        TypeError: for an argument that nothing takes.
        ImportError: where huggingface_hub is not installed, and it is no folder.
        Exception: what huggingface_hub raises.
    """
    source = str(path_of(pretrained_model_name_or_path, "user/name", "pretrained_model_name_or_path"))
    find = _in_folder if os.path.isdir(source) else _on_hub
    path = find(source, MODEL, download)
    beside_it: bool | Path = find(source, beside(Path(MODEL)).name, download) if kernels else False
    return load(path, model, device=device, remeasure=remeasure, kernels=beside_it)


def _in_folder(folder: str, name: str, download: dict[str, Any]) -> Path:
    if unknown := sorted(set(download) - _OF_DOWNLOADS):
        raise TypeError(f"from_pretrained takes no {', '.join(unknown)}")
    path = Path(folder, download.get("subfolder") or "", name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {name}; name a folder that a converted model's save_pretrained wrote"
        )
    return path


def _on_hub(repo_id: str, name: str, download: dict[str, Any]) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{repo_id} is no folder here, and {_EXTRA}") from error
    try:
        return Path(hf_hub_download(repo_id, name, library_name="escort-sparse", **download))
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no {name}; name a repository that a converted model's push_to_hub wrote"
        ) from error


def _facts(model: ConvertedModel) -> dict[str, Any]:
    plan = model.plan
    return {
        "library_name": "escort-sparse",
        "escort_version": Machine.here().escort,
        "precision": plan.precision,
        "device": plan.device,
        "input_shapes": [list(shape) for shape in plan.input_shapes],
        "layers": len(plan.layers),
    }


def _card(model: ConvertedModel, name: str, size: int) -> str:
    about = "" if model.traced else _OWN_CODE
    table = markdown(plan_table(model.plan, "Plan", whole=True))
    own = "" if model.traced else ", model"
    return _CARD.format(name=name, file=MODEL, size=size, about=about, plan=table, model=own).replace("\n\n\n", "\n\n")
