"""What a checkpoint says of itself: its files with their sizes and hashes, and the run that wrote it.

It is written last, so a folder without it was not finished. Banks may be of 100 GB: of them only the size stands here,
since they carry checksums of their own, which [`load_bank`] compares while it reads them anyway.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..erft.snapshot import check_bank
from .cache import fingerprint


MANIFEST = "manifest.json"
BANK_FILES = "bank-*.safetensors"


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Manifest:
    """Of one checkpoint.

    Args:
        step (`int`): Steps that were done.
        num_processes (`int`): How many wrote it.
        run (`dict[str, Any]`): What is to be known of the run, anything that JSON can hold.
        files (`dict[str, list]`): Size in bytes and SHA-256 of every file, by its path in the folder; banks have "".
    """

    step: int
    num_processes: int
    run: dict[str, Any]
    files: dict[str, list]


def write_manifest(folder: Path, step: int, num_processes: int, run: dict[str, Any]) -> None:
    """Describe a finished folder. All of it is on the disk when this returns."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as stream:
            digest = "" if file.match(BANK_FILES) else hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        files[file.relative_to(folder).as_posix()] = [file.stat().st_size, digest]
    content = asdict(Manifest(step, num_processes, run, files))
    with open(folder / MANIFEST, "w", encoding="utf-8") as stream:
        json.dump({**content, "sha256": fingerprint(content)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files all have the sizes that they were written with.

    Raises:
        DamagedError: if it has none, one that was changed, or a file is missing or has another size.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sha256 = content.pop("sha256")
        manifest = Manifest(**content)
    except FileNotFoundError:
        raise DamagedError(f"{folder / MANIFEST} is missing: the checkpoint is unfinished or damaged.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{folder / MANIFEST} is damaged: {error}.") from error
    if fingerprint(content) != sha256:
        raise DamagedError(f"{folder / MANIFEST} is damaged: its content has another hash.")
    for name, (size, _) in manifest.files.items():
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name} is missing.")
        if (folder / name).stat().st_size != size:
            raise DamagedError(
                f"{folder / name} is damaged: it has {(folder / name).stat().st_size} bytes instead of {size}."
            )
    return manifest


def check_checkpoint(folder: Path, banks: bool = True) -> Manifest:
    """The manifest of a checkpoint all of whose files hold what was written; without `banks`, all but those.

    Raises:
        DamagedError: if it has no manifest, or a file is missing or was changed.
    """
    manifest = read_manifest(folder)
    for name, (_, sha256) in manifest.files.items():
        file = folder / name
        if sha256:
            with open(file, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                    raise DamagedError(f"{file} is damaged: its content has another hash.")
        elif banks:
            try:
                check_bank(file)
            except ValueError as error:
                raise DamagedError(str(error)) from error
    return manifest
