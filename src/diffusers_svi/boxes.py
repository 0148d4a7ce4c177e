"""The boxes that an MP4 consists of, and the notes of a film among them."""

import json
import struct
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO


# Marks the notes of a film among its boxes.
NOTE = uuid.UUID("c2a5a7f8-6c0e-4d3e-9d7e-3b0f6f1d5a11").bytes
# Far more than a start image and its LoRAs need: what a file tells beyond it is damage.
MAX_NOTE = 2**26


def boxes(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """The boxes of an MP4, from where `file` stands: four letters, first byte and size of each.

    What is in them is skipped, not read; one that is cut short is left out.
    """
    place = file.tell()
    end = file.seek(0, 2)
    while place + 8 <= end:
        file.seek(place)
        size, kind = struct.unpack(">I4s", file.read(8))
        if size == 1 and place + 16 <= end:
            (size,) = struct.unpack(">Q", file.read(8))
        if size < 8 or place + size > end:
            return
        yield kind.decode("latin-1"), place, size
        place += size


def note(values: dict[str, Any]) -> bytes:
    """A box that tells `values`, which players skip."""
    content = NOTE + json.dumps(values, sort_keys=True).encode()
    return struct.pack(">I4s", 8 + len(content), b"uuid") + content


def read_notes(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """What the notes of a film tell, in their order.

    Raises:
        ValueError: for one that is damaged.
    """
    for kind, place, size in boxes(file):
        if kind != "uuid":
            continue
        file.seek(place + 8)
        if file.read(16) == NOTE:
            if size > MAX_NOTE:
                raise ValueError(f"the note at byte {place} has {size} bytes, more than {MAX_NOTE}")
            yield as_object(file.read(size - 24))


def as_object(content: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises a `ValueError` if it is none, or nested deeper than can be read."""
    try:
        values = json.loads(content)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"its JSON is no object but {type(values).__name__}")
    return values
