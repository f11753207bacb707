"""Artefacts on the hub: fetching one by name, and uploading what is trained on a model."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from reftune.errors import AdapterError, ModelError
from reftune.nano import NAMES

NAME = "owner/name, or owner/name@revision"


@lru_cache(maxsize=64)
def check_reachable(name: str, revision: str | None = None) -> None:
    """Ask the hub once about a model that is not here, rather than many times for its files.

    Args:
        name: What may be a hub name.
        revision: Branch, tag or commit.

    Raises:
        ModelError: If it cannot be a hub name, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if "/" not in name and difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6):
        close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6)[0]
        raise ModelError(f'There is no model "{name}".', f'Did you mean "{close}"?')
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        if not constants.HF_HUB_OFFLINE:
            HfApi().model_info(name, revision=revision, timeout=10)
    except HFValidationError as error:
        raise ModelError(
            f'"{name}" is neither a folder nor a hub name.', "Give nano, a folder or owner/name."
        ) from error
    except HfHubHTTPError:
        return  # it answers: loading says what is wrong
    except Exception as error:  # what the hub's library raises differs between its versions
        raise ModelError(
            f'"{name}" is no local folder and the hub cannot be reached ({type(error).__name__}).',
            "Check the name and the network, or give nano or a model folder.",
        ) from error


def download(name: str) -> Path:
    """Fetch an artefact by `owner/name` or `owner/name@revision`; return its folder.

    Raises:
        AdapterError: If it is not there, or the network is not.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(
            f'"{name}" is no local folder and could not be fetched from the hub '
            f"({type(error).__name__}).",
            f"Check the name ({NAME}) and the network.",
        ) from error


def push(
    model: nn.Module | str | Path,
    repo: str,
    *,
    name: str | None = None,
    figures: dict[str, Any] | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "Upload with reftune",
    token: str | None = None,
) -> str:
    """Upload what is trained on a model to the hub, with a card that says how to load it.

    Args:
        model: As `reftune.save` takes it, or the folder of an artefact or run.
        repo: `owner/name`; made if it is not there.
        name: The adapter to upload, where several are active.
        figures: Figures for the model card.
        tokenizer: Uploaded beside a whole model.
        revision: Branch to upload to; made if it is not there.
        private: Whether a new repository is private; default is the account's setting.
        message: Commit message.
        token: Access token; default is the one you logged in with.

    Returns:
        The address of the repository.

    Raises:
        AdapterError: If there is nothing to upload, or the hub refuses.

    ```python
    reftune.push(model, "owner/name")
    model, tokenizer = reftune.load("owner/name@main")
    ```
    """
    from reftune.model.artefact import resolve_folder
    from reftune.model.checkpoint import save_adapter
    from reftune.model.levels import PLACE

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "artefact"
        if isinstance(model, nn.Module):
            save_adapter(model, folder, figures, name=name)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        else:
            shutil.copytree(resolve_folder(model), folder)
        card = folder / "README.md"
        if card.is_file():
            text = card.read_text(encoding="utf-8").replace(PLACE, repo)
            card.write_text(text, encoding="utf-8")
        return _upload(folder, repo, revision, private, message, token)


def _upload(
    folder: Path, repo: str, revision: str | None, private: bool | None, message: str,
    token: str | None,
) -> str:  # fmt: skip
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=str(folder), commit_message=message, revision=revision
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(
            f'The hub did not take "{repo}" ({type(error).__name__}).',
            "Log in (hf auth login) with a token that may write, and check the name.",
        ) from error
    return str(address)
