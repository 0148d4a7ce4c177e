"""MP4 as a film grows in it: boxes, of which every clip adds its own."""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from .sound import PACKET


def muxer_options(number: int) -> dict[str, str]:
    """FFmpeg's, for a clip by itself: what a player needs to know, then one fragment, the `number`-th of the film."""
    return {
        "movflags": "empty_moov+default_base_moof+frag_discont+frag_custom+skip_trailer",
        "fragment_index": str(number + 1),
        "avoid_negative_ts": "disabled",
    }


def parts(content: bytes) -> tuple[bytes, bytes]:
    """Of what was written with these options: what begins a film, and what is added to it."""
    found = {kind: content[place : place + size] for kind, place, size in boxes(io.BytesIO(content))}
    return found["ftyp"] + _first_packet_unheard(found["moov"]), found["moof"] + found["mdat"]


def boxes(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Four letters, first byte and size of every box. What is in them is skipped, not read.

    One that is cut short is left out, and all behind it.
    """
    end, place = file.seek(0, 2), 0
    while place + 8 <= end:
        file.seek(place)
        size, kind = struct.unpack(">I4s", file.read(8))
        if size == 1 and place + 16 <= end:
            (size,) = struct.unpack(">Q", file.read(8))
        if size < 8 or place + size > end:
            return
        yield kind.decode("latin-1"), place, size
        place += size


def note(mark: bytes, content: bytes) -> bytes:
    """A box that players skip. `mark` has 16 bytes, which tell whose it is."""
    return _box(b"uuid", mark + content)


def notes(file: BinaryIO, mark: bytes, limit: int) -> Iterator[bytes]:
    """What stands in the boxes of that mark. Raises a `ValueError` for one of more than `limit` bytes."""
    for kind, place, size in boxes(file):
        if kind == "uuid" and size >= 24:
            file.seek(place + 8)
            if file.read(16) == mark:
                if size > limit:
                    raise ValueError(f"the note at byte {place} has {size} bytes, more than {limit}")
                yield file.read(size - 24)


def _first_packet_unheard(moov: bytes) -> bytes:
    """`moov` with an edit list for its sound, if it has any: it is heard from the second packet on."""
    # FFmpeg writes none where no packet is known yet. A version, one entry: all of it, from that sample, at its speed.
    edits = _box(b"edts", _box(b"elst", struct.pack(">IIIIHH", 0, 1, 0, PACKET, 1, 0)))
    content = b""
    for kind, track in _inner(moov):
        if kind == "trak" and b"soun" in track:
            track = _box(b"trak", b"".join(box + (edits if name == "tkhd" else b"") for name, box in _inner(track)))
        content += track
    return _box(b"moov", content)


def _inner(box: bytes) -> Iterator[tuple[str, bytes]]:
    content = box[8:]
    return ((kind, content[place : place + size]) for kind, place, size in boxes(io.BytesIO(content)))


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content
