"""Matroska as a film grows in it: a segment of unknown size, to which every clip adds its clusters."""

import io
from collections.abc import Iterator
from typing import BinaryIO


HEADER, SEGMENT, INFO, TRACKS, CLUSTER, VOID = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0xEC


def muxer_options(number: int) -> dict[str, str]:
    """FFmpeg's, for a clip by itself: clusters have the time they have in the film, and nothing in it is random."""
    return {"live": "1", "fflags": "+bitexact", "avoid_negative_ts": "disabled"}


def parts(content: bytes) -> tuple[bytes, bytes]:
    """Of what was written with these options: what begins a film, and what is added to it."""
    head, body = b"", b""
    for kind, place, data, end in elements(io.BytesIO(content)):
        if kind in (HEADER, INFO, TRACKS):
            head += content[place:end]
        elif kind == SEGMENT:
            head += content[place:data]
        elif kind == CLUSTER:
            body += content[place:end]
    return head, body


def elements(file: BinaryIO) -> Iterator[tuple[int, int, int, int]]:
    """Number, first byte, first byte of what is in it, and end, of every element of a file and of its segment.

    What is in them is skipped, not read. One that is cut short is left out, and all behind it.
    """
    last, place = file.seek(0, 2), 0
    while place < last:
        file.seek(place)
        kind, size = _number(file, True), _number(file, False)
        data = file.tell()
        if kind is None or size is None:
            return
        if kind == SEGMENT:
            # Its elements follow, to the end of the file while it grows.
            yield kind, place, data, last
            place = data
            continue
        if data + size > last:
            return
        yield kind, place, data, data + size
        place = data + size


def note(mark: bytes, content: bytes) -> bytes:
    """An element that players skip. `mark` tells whose it is."""
    content = mark + content
    return bytes([VOID]) + (1 << 56 | len(content)).to_bytes(8, "big") + content


def notes(file: BinaryIO, mark: bytes, limit: int) -> Iterator[bytes]:
    """What stands in the elements of that mark. Raises a `ValueError` for one of more than `limit` bytes."""
    for kind, place, data, end in elements(file):
        if kind == VOID:
            file.seek(data)
            if file.read(len(mark)) == mark:
                if end - place > limit:
                    raise ValueError(f"the note at byte {place} has {end - place} bytes, more than {limit}")
                yield file.read(end - data - len(mark))


def _number(file: BinaryIO, is_kind: bool) -> int | None:
    """A number as EBML has it: as many bytes as the first has zeros before its first one, and one. `None` without.

    Of a size, that one is not counted, and all ones say that it is not known.
    """
    first = file.read(1)
    length = 9 - first[0].bit_length() if first else 9
    rest = file.read(length - 1)
    if length > 8 or len(rest) < length - 1:
        return None
    value = int.from_bytes(first + rest, "big")
    return value if is_kind else value - (1 << 7 * length)
