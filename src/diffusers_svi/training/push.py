"""A LoRA's repository on the Hub: made before training, filled after it, and by hand if that fails."""

import os
import shlex
import shutil
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from ..conditioning import Scheme
from ..hub import hub_trouble
from .model_card import description_name, read_description, weight_name, write_model_card


# What of the output folder belongs there; the checkpoints and the cache have LoRAs and latents too.
PUSHED = ["README.md", "pytorch_lora_weights*", "validation/*"]
_OTHERS = {"high": "low", "low": "high"}


class PushError(RuntimeError):
    """A LoRA is on disk but not on the Hub. The message says why, and how it gets there."""


def download_model(repo_id: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The folder of a model from the Hub.

    Raises:
        ValueError: if there is no such repository for this user, or the Hub cannot be reached.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, cache_dir=cache_dir))
    except Exception as error:
        raise ValueError(
            f"{repo_id!r} is no folder, and no model of the Hub: {hub_trouble(error, repo_id) or error}"
        ) from None


def open_repo(
    repo_id: str,
    folder: str | os.PathLike,
    scheme: Scheme,
    expert: str | None = None,
    token: str | None = None,
) -> str:
    """Make the repository of a LoRA, unless there is one, and return its full name.

    Args:
        repo_id (`str`): Its name, of this user if it names nobody.
        folder: Where the LoRA will lie; it is brought what the repository tells of the other expert.
        scheme (`Scheme`): What the LoRA is trained for.
        expert (`str`, *optional*): "high" or "low", for one expert of Wan 2.2 A14B.
        token (`str`, *optional*): Of the user; by default that of `hf auth login`.

    Raises:
        ValueError: if it cannot be made or written to, has the other expert of another scheme, or the Hub cannot be
            reached.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        # One that somebody else has counts as one that is there.
        api.auth_check(repo_id, write=True)
        _fetch_other(repo_id, Path(folder), expert, token)
    except Exception as error:
        raise ValueError(
            f"Nothing could be pushed to the repository {repo_id!r}: {hub_trouble(error, repo_id) or error}"
        ) from None
    other = None if expert is None else read_description(folder, _OTHERS[expert])
    if other is not None and other.scheme != scheme:
        raise ValueError(
            f"The repository {repo_id!r} has the {other.expert}-noise expert for {other.scheme}, but this one is to "
            f"be for {scheme}: they could not be used together. Choose another repository."
        )
    return repo_id


def push(folder: str | os.PathLike, repo_id: str, expert: str | None = None, token: str | None = None) -> None:
    """Push LoRA, card and films to the repository that `open_repo` has made, beside the other expert's.

    Raises:
        PushError: if that fails, whatever the reason: the LoRA is on disk, and the message has the command.
    """
    folder = Path(folder)
    try:
        _fetch_other(repo_id, folder, expert, token)
        write_model_card(folder, repo_id, expert)
        HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=PUSHED, commit_message="SVI LoRA"
        )
    except Exception as error:
        trouble = hub_trouble(error, repo_id) or f"{type(error).__name__}: {error}"
        raise PushError(
            f"The LoRA is whole, as {folder / weight_name(expert)}, but not on the Hub. {trouble}\n"
            f"Push it later, after `hf auth login`:\n\n    {push_command(folder, repo_id)}\n"
        ) from error


def push_command(folder: str | os.PathLike, repo_id: str) -> str:
    """The command line that pushes what `push` does."""
    included = [argument for pattern in PUSHED for argument in ("--include", pattern)]
    return shlex.join(["hf", "upload", repo_id, os.path.abspath(folder), ".", *included])


def _fetch_other(repo_id: str, folder: Path, expert: str | None, token: str | None) -> None:
    """What the repository tells of the other expert, for the card, unless that one was trained in this folder."""
    if expert is None or (folder / weight_name(_OTHERS[expert])).exists():
        return
    name = description_name(_OTHERS[expert])
    try:
        shutil.copy(hf_hub_download(repo_id, name, token=token), folder / name)
    except EntryNotFoundError:
        (folder / name).unlink(missing_ok=True)
