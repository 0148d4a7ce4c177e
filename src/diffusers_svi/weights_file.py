"""Weights out of a safetensors file, wherever it is: on the Hub, in a folder, or as a state dict at hand."""

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, _best_guess_weight_name, _fetch_state_dict
from diffusers.utils import _get_model_file
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from .checks import check_choice
from .hub import hub_trouble


# What stands for the source of weights that no file tells.
NO_FILE = ("a state dict", "loaded otherwise")
# Where a file of the Hub lies in the cache.
_SNAPSHOT = re.compile(r"[\\/]snapshots[\\/](?P<commit>[0-9a-f]{40})[\\/]")
_HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only", "proxies")


@dataclass(frozen=True)
class Fetched:
    """What [`fetch_weights`] read.

    Args:
        name (`str`): What to call the file in messages.
        state_dict (`dict[str, torch.Tensor]`): Its tensors; the caller's own where a state dict was given.
        adapter_metadata (`dict`, *optional*): diffusers' own record of a LoRA's configuration.
        metadata (`dict[str, str]`): What the file says beside.
        source (`dict[str, str]`): Where it came from: `name`, `weight_name`, `subfolder`, `revision` and the file's
            `sha256`, as far as there are any.
    """

    name: str
    state_dict: dict[str, torch.Tensor]
    adapter_metadata: dict[str, Any] | None
    metadata: dict[str, str]
    source: dict[str, str]


def fetch_weights(
    source: str | os.PathLike | dict[str, torch.Tensor],
    weight_name: str | None = None,
    *,
    what: str,
    **hub_options: Any,
) -> Fetched:
    """Read a safetensors file from the Hub, a folder or a path, or take a state dict; never a pickled file.

    Args:
        source: Hub repository, folder, file, or state dict.
        weight_name (`str`, *optional*): The file in the repository or folder.
        what (`str`): What errors call it, such as "LoRA".
        hub_options: `subfolder`, `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`, `proxies`.

    Raises:
        ValueError: if the file cannot be read or is pickled; for an option that is not one of those above, and
            `weight_name` where `source` is no folder.
    """
    for option in hub_options:
        check_choice("hub_options", option, _HUB_OPTIONS)
    if weight_name is not None and (isinstance(source, dict) or os.path.isfile(source)):
        raise ValueError(
            f"`weight_name`={weight_name!r} is a file in a folder or repository, but what it is to be in is "
            f"{'a state dict' if isinstance(source, dict) else f'the file {os.fspath(source)!r}'}: leave it out, or "
            "give the folder."
        )
    name = _name(source, weight_name)
    if not isinstance(source, dict):
        _refuse_pickles(source, weight_name, what)
    try:
        if weight_name is None and not isinstance(source, dict):
            weight_name = (
                _best_guess_weight_name(source)
                if os.path.exists(source)
                else _file_of_repository(os.fspath(source), hub_options)
            )
        state_dict, adapter_metadata, file_metadata = _fetch_state_dict(
            source,
            weight_name=weight_name,
            use_safetensors=True,
            allow_pickle=False,
            return_file_metadata=True,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            **{option: hub_options.get(option) for option in _HUB_OPTIONS},
        )
    except (OSError, HTTPError, IndexError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        trouble = hub_trouble(error, str(source))
        if trouble is not None:
            raise ValueError(f"No {what} could be read from {name!r}. {trouble}") from None
        raise ValueError(
            f"No {what} could be read from {name!r}: {error} Give a safetensors file, or a folder or Hub repository "
            "with `weight_name`, the file in it."
        ) from error
    origin = _origin(source, weight_name, hub_options)
    return Fetched(name, state_dict, adapter_metadata, file_metadata or {}, origin)


def _name(source: str | os.PathLike | dict[str, torch.Tensor], weight_name: str | None) -> str:
    if isinstance(source, dict):
        return "state dict"
    return os.path.join(os.fspath(source), weight_name) if weight_name else os.fspath(source)


def _origin(
    source: str | os.PathLike | dict[str, torch.Tensor], weight_name: str | None, hub_options: dict[str, Any]
) -> dict[str, str]:
    """Where a file that was just read came from, and the digest of its file."""
    if isinstance(source, dict):
        return {"name": NO_FILE[0]}
    name, revision, subfolder = os.fspath(source), hub_options.get("revision"), hub_options.get("subfolder")
    file = _get_model_file(
        name,
        weights_name=weight_name or LORA_WEIGHT_NAME_SAFE,
        subfolder=subfolder,
        revision=revision,
        cache_dir=hub_options.get("cache_dir"),
        local_files_only=True,
    )
    with open(file, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    commit = None if os.path.exists(name) else _SNAPSHOT.search(file)
    told = {
        "name": name,
        "weight_name": weight_name,
        "subfolder": subfolder,
        # A branch moves on; the commit that it was does not.
        "revision": commit["commit"] if commit else revision,
        "sha256": sha256,
    }
    return {key: value for key, value in told.items() if value is not None}


def _file_of_repository(repo_id: str, hub_options: dict[str, Any]) -> str | None:
    """The one file of a repository. diffusers would look for it without token and revision."""
    if hub_options.get("local_files_only") or HF_HUB_OFFLINE:
        return None
    folder = f"{hub_options['subfolder']}/" if hub_options.get("subfolder") else ""
    files = HfApi(token=hub_options.get("token")).list_repo_files(repo_id, revision=hub_options.get("revision"))
    names = [file.removeprefix(folder) for file in files if file.startswith(folder) and file.endswith(".safetensors")]
    if LORA_WEIGHT_NAME_SAFE in names:
        return LORA_WEIGHT_NAME_SAFE
    if len(names) > 1:
        raise ValueError(f"It has several files, {', '.join(map(repr, sorted(names)))}.")
    return names[0] if names else None


def _refuse_pickles(source: str | os.PathLike, weight_name: str | None, what: str) -> None:
    file = weight_name if weight_name is not None else os.fspath(source) if os.path.isfile(source) else None
    if file is not None and not file.endswith(".safetensors"):
        raise ValueError(
            f"The {what} {_name(source, weight_name)!r} is not a safetensors file. Other formats can run code when "
            "they are read and are not loaded; convert it with `safetensors.torch.save_file` where you trust it."
        )
