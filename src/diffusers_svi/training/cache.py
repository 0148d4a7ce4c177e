"""`TensorCache`: what the encoders made of videos and captions, on disk under keys that say what it was made of."""

import hashlib
import json
import os
import re
import uuid
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

from ..files import sync


def fingerprint(*parts: object) -> str:
    """SHA-256, 64 hexadecimal digits, of `parts`: bytes, or anything that JSON can hold (the order of keys is not)."""
    digest = hashlib.sha256()
    for part in parts:
        kind, content = (b"b", part) if isinstance(part, bytes) else (b"j", json.dumps(part, sort_keys=True).encode())
        digest.update(kind + len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()


class TensorCache:
    """A folder of tensors by key. Several processes may use it at once, and may be killed at any time.

    Args:
        folder: Where to; it is made when the first entry is saved.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def path(self, key: str) -> Path:
        """Where the entry of `key`, a `fingerprint`, is or will be."""
        if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
            raise ValueError(f"`key` must be a `fingerprint`, 64 hexadecimal digits, got {key!r}.")
        return self.folder / key[:2] / f"{key}.safetensors"

    def save(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write an entry, whole or not at all. One that was there is replaced."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.parent / f".{key}.{uuid.uuid4().hex}.tmp"
        # Parts of larger tensors would be refused or saved with the whole.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, unfinished)
            sync(unfinished)  # else a power cut could leave nothing under its name
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, key: str) -> dict[str, torch.Tensor]:
        """Read an entry. Raises a `FileNotFoundError` if there is none and a `ValueError` if it is damaged."""
        path = self.path(key)
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it, and it is made anew.") from error


class CachedSamples(torch.utils.data.Dataset):
    """Entries of a cache as a dataset: item i holds the tensors of all entries in `keys[i]`.

    Args:
        cache (`TensorCache`): Where they are.
        keys (`list[tuple[str, ...]]`): For every sample the keys of its parts: clip and caption.
    """

    def __init__(self, cache: TensorCache, keys: list[tuple[str, ...]]):
        self.cache, self.keys = cache, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor for key in self.keys[index] for name, tensor in self.cache.load(key).items()}
