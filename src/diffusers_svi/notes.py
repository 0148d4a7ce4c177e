"""What a film's file tells of how it was made, and where it stands in it.

A film that grows has a note for every clip among its clips. A file made of it, and files of other programs, have all
in one: a JSON text as the container's comment.
"""

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from . import boxes, matroska


# Containers that a film grows in, by suffix.
CONTAINERS: dict[str, ModuleType] = {".mp4": boxes, ".mkv": matroska}
MARK = uuid.UUID("c2a5a7f8-6c0e-4d3e-9d7e-3b0f6f1d5a11").bytes
# Far more than start images and prompts need: what a file tells beyond it is damage.
MAX_NOTE = 2**27
# FFmpeg reads no Matroska file with a longer comment.
MAX_COMMENT = 2**24 - 1
COMMENT_FORMAT = "diffusers_svi.film"


def note(values: dict[str, Any], container: ModuleType) -> bytes:
    """The bytes of a note that tells `values`."""
    return container.note(MARK, json.dumps(values, sort_keys=True).encode())


def comment(notes: Iterable[dict[str, Any]]) -> str:
    """Notes as the one text that [`read_notes`] finds in a comment."""
    return json.dumps({"format": COMMENT_FORMAT, "notes": list(notes)}, sort_keys=True)


def read_notes(path: str | os.PathLike) -> list[dict[str, Any]]:
    """What a film's file tells, in the order of the film; nothing if it does not.

    Of a file in whose comment another program wrote JSON, that is the one note.

    Raises:
        ValueError: if the file cannot be read or is damaged, or tells more than can be.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            container = matroska if int.from_bytes(start[:4], "big") == matroska.HEADER else boxes
            notes = [_object(content) for content in container.notes(file, MARK, MAX_NOTE)]
        if not notes and container is boxes and start[4:] != b"ftyp":
            raise ValueError("it is no MP4 and no Matroska file")
        return notes or _read_comment(path, "mp4" if container is boxes else "matroska")
    except (OSError, ValueError) as error:
        raise ValueError(f"`path`={str(path)!r} cannot be read as a film: {error}") from error


def _read_comment(path: Path, kind: str) -> list[dict[str, Any]]:
    import av

    try:
        # Left to guess, FFmpeg follows playlists to other files.
        with av.open(str(path), format=kind, metadata_errors="replace") as file:
            text = {name.lower(): value for name, value in file.metadata.items()}.get("comment", "")
    except av.FFmpegError as error:
        raise ValueError(f"it is no video ({error})") from error
    if not text.lstrip().startswith("{"):
        return []
    if len(text) > MAX_COMMENT:
        raise ValueError(f"its comment has {len(text)} characters, more than {MAX_COMMENT}")
    told = _object(text)
    if told.get("format") != COMMENT_FORMAT:
        return [told]
    notes = told.get("notes")
    if not isinstance(notes, list) or not all(isinstance(entry, dict) for entry in notes):
        raise ValueError("its comment is not as it was written")
    return notes


def _object(content: bytes | str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"its JSON is no object but {type(values).__name__}")
    return values
