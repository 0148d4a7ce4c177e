"""`FilmWriter`: a film in one file that grows clip by clip, and survives whatever happens to the run.

The file is a fragmented MP4: what a player needs to know, then for every clip a note of how it was made and its
frames, encoded by themselves. Nothing that was written is ever changed. Beside it, `<film>.state` holds the state of
the chain and how much of the file belongs to it; it is replaced when the frames are on disk. A film that is taken up
again is cut to that length first, so that it ends with the very bytes of one that was never stopped.
"""

import hashlib
import io
import json
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from .chain import ChainState, read_notes
from .checks import check_choice, check_count
from .clips import Clip
from .files import written_whole
from .video import CONSTANT_RATE_FACTOR, encode_frames, frame_rate, remux, to_8_bits


CODECS = ("libx264", "libx265", "libsvtav1")
PIXEL_FORMATS = ("yuv420p", "yuv444p")
# Marks the notes of a film among its boxes.
NOTE = uuid.UUID("c2a5a7f8-6c0e-4d3e-9d7e-3b0f6f1d5a11").bytes
RECORD_KEY = "film"


@dataclass(frozen=True)
class _Record:
    """What of the file belongs to the film, as of its last clip."""

    fps: str
    codec: str
    crf: int
    pixel_format: str
    size: int = 0
    num_frames: int = 0
    # The end that the next clip will tell again: where clips lose their last frames, the last one keeps them.
    held_size: int = 0
    held_frames: int = 0
    # Of the last clip's bytes, without the held ones and of these alone, to know the file again.
    last_size: int = 0
    last_digest: str = ""
    held_digest: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("fps", "codec", "crf", "pixel_format")}


class FilmWriter:
    """Write the clips of a film to one file, which can be watched at any time and gone on with after a crash.

        with FilmWriter("film.mp4", fps=16) as film:
            for clip in pipe.stream(image=image, prompts=prompts, state=film.state, ...):
                film.append(clip)

    Run again, this goes on where it was stopped, and makes a finished film longer.

    Args:
        path: Of the film, `*.mp4`. Beside it lie `<path>.state` and, while it is written, `<path>.lock`.
        fps (`float`, defaults to 16): Frames a second.
        codec (`str`, defaults to `"libx264"`): `"libx264"`, which everything plays, `"libx265"` or `"libsvtav1"`.
        crf (`int`, defaults to 18): Constant rate factor, 0 to 51: smaller is better and larger.
        pixel_format (`str`, defaults to `"yuv420p"`): Or `"yuv444p"`, colours in full, which few players show.

    Raises:
        ValueError: if the file is no film of these settings that was begun by a `FilmWriter`, is damaged, or is being
            written by another run; for another suffix and settings that there are not.
        OSError: if it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float = 16,
        *,
        codec: str = "libx264",
        crf: int = CONSTANT_RATE_FACTOR,
        pixel_format: str = "yuv420p",
    ):
        self.path = Path(path)
        check_choice("suffix of `path`", self.path.suffix, (".mp4",))
        check_choice("codec", codec, CODECS)
        check_choice("pixel_format", pixel_format, PIXEL_FORMATS)
        self._record = _Record(str(frame_rate(fps)), codec, check_count("crf", crf, 0, 51), pixel_format)
        self._state: ChainState | None = None
        self._lock = FileLock(f"{self.path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"`path`={str(self.path)!r} is being written by another run. Wait for it or stop it."
            ) from error
        try:
            self._take_up()
        except BaseException:
            self._lock.release()
            raise

    @property
    def state(self) -> ChainState | None:
        """Where the film is to go on: for `state=` of the pipeline. `None` before the first clip."""
        return self._state

    @property
    def fps(self) -> Fraction:
        """Frames a second."""
        return Fraction(self._record.fps)

    @property
    def num_frames(self) -> int:
        """Frames of the film so far."""
        return self._record.num_frames

    def append(self, clip: Clip) -> None:
        """Add a clip. When this returns, it is on disk.

        Raises:
            ValueError: if it is not the next clip of the film, or its frames are latents or of another size.
            OSError: if it cannot be written; the film is as it was.
        """
        record, state = self._record, clip.state
        if clip.start not in (record.num_frames, record.num_frames - record.held_frames):
            raise ValueError(
                f"`clip` begins with frame {clip.start}, but the film has {record.num_frames}: it is not the next "
                "one. Pass `state=film.state` to the pipeline."
            )
        frames = [to_8_bits(frame) for frame in clip.frames]
        kept = state.start - clip.start
        height, width = state.image.shape[-2:]
        if {frame.shape for frame in frames} != {(height, width, 3)}:
            found = sorted({frame.shape for frame in frames})
            raise ValueError(
                f"`clip.frames` are {found} (height, width, channels), but the film is of {height} x {width} pixels. "
                "For latents see `decode_latents`."
            )
        note = {"index": clip.index, "prompt": clip.prompt, "start": clip.start, "made_with": dict(state.made_with)}
        told = self._encode(frames[:kept], clip.start, 2 * clip.index, note)
        held = self._encode(frames[kept:], state.start, 2 * clip.index + 1) if frames[kept:] else b""
        place = record.size - (record.held_size if clip.start < record.num_frames else 0)
        if not record.size:
            # So that what is written from now on can be told from a file of somebody else's.
            with written_whole(self._state_path) as unfinished:
                save_file({}, unfinished, metadata={RECORD_KEY: json.dumps(asdict(record))})
        _replace_end(self.path, place, told + held)
        record = replace(
            record,
            size=place + len(told) + len(held),
            num_frames=clip.start + len(frames),
            held_size=len(held),
            held_frames=len(frames[kept:]),
            last_size=len(told),
            last_digest=_digest(told),
            held_digest=_digest(held),
        )
        state.save(self._state_path, {RECORD_KEY: json.dumps(asdict(record))})
        self._record, self._state = record, state

    def finalize(self, path: str | os.PathLike) -> None:
        """Write the film so far as an ordinary MP4 whose index comes first, as editors and web servers want it.

        Nothing is encoded again. This film stays as it is and can go on.

        Raises:
            ValueError: if `path` is the film's own, or there is no clip yet.
            OSError: if it cannot be written.
        """
        if Path(path).resolve() == self.path.resolve():
            raise ValueError(
                f"`path`={str(path)!r} is the film itself, which would not grow any more: choose another."
            )
        if not self.num_frames:
            raise ValueError(f"`path`={str(path)!r}: there is no clip yet that could be written.")
        remux(self.path, path)

    def close(self) -> None:
        """Let others write the film. What was appended is on disk already."""
        self._lock.release()

    def __enter__(self) -> "FilmWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _state_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.state")

    def _take_up(self) -> None:
        """Go on with the film that is there, if there is one."""
        if not self._state_path.exists():
            if self.path.exists() and self.path.stat().st_size:
                raise ValueError(
                    f"`path`={str(self.path)!r} is a file without {self._state_path.name} beside it, so nothing can "
                    "be added to it. Choose another name, or delete it."
                )
            return
        try:
            notes = read_notes(self._state_path)
            record = _Record(**json.loads(notes[RECORD_KEY]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._state_path} is the state of a chain, but of no film ({error}). Choose another name."
            ) from error
        if record.settings != self._record.settings:
            raise ValueError(
                f"`path`={str(self.path)!r} is a film with {record.settings}, but {self._record.settings} is asked "
                "for. Ask for the same, or choose another name."
            )
        self._state = ChainState.load(self._state_path) if record.size else None
        self._record = self._checked(record)

    def _checked(self, record: _Record) -> _Record:
        """`record`, once the file has what it says, and nothing behind that."""
        if not record.size:
            # A run ended in its first clip.
            self.path.unlink(missing_ok=True)
            return record
        own = record.size - record.held_size
        try:
            with open(self.path, "rb") as file:
                file.seek(own - record.last_size)
                last, held = file.read(record.last_size), file.read(record.held_size)
        except (OSError, ValueError) as error:
            raise ValueError(f"`path`={str(self.path)!r} cannot be read: {error}") from error
        if _digest(last) != record.last_digest:
            raise ValueError(
                f"`path`={str(self.path)!r} is not as it was written: its last clip, bytes {own - record.last_size} "
                f"to {own}, has been changed or cut. Put the file back, or begin another film."
            )
        if _digest(held) != record.held_digest:
            # A run ended while it was writing the next clip over the frames that it tells again.
            frames = record.num_frames - record.held_frames
            record = replace(record, size=own, num_frames=frames, held_size=0, held_frames=0, held_digest=_digest(b""))
        if self.path.stat().st_size > record.size:
            os.truncate(self.path, record.size)
        return record

    def _encode(self, frames: list[np.ndarray], start: int, number: int, note: dict[str, Any] | None = None) -> bytes:
        """Boxes of an MP4 with frames that begin with frame `start` of the film, the `number`-th of its fragments."""
        record, buffer = self._record, io.BytesIO()
        encode_frames(
            buffer,
            frames,
            Fraction(record.fps),
            record.codec,
            record.crf,
            record.pixel_format,
            start=start,
            # What a player needs to know, then one fragment whose number and time go on from those before.
            options={
                "movflags": "empty_moov+default_base_moof+frag_discont+frag_custom+skip_trailer",
                "fragment_index": str(number + 1),
                "avoid_negative_ts": "disabled",
            },
        )
        parts = dict(boxes(buffer.getvalue()))
        head = b"" if record.size else parts["ftyp"] + parts["moov"]
        return head + (b"" if note is None else _note(note)) + parts["moof"] + parts["mdat"]


def read_clips(path: str | os.PathLike) -> list[dict[str, Any]]:
    """How the clips of a film were made: index, prompt, first frame, and what they were made with.

    Raises:
        ValueError: if `path` is no film of a `FilmWriter`.
    """
    try:
        content = Path(path).read_bytes()
        notes = [box[24:] for kind, box in boxes(content) if kind == "uuid" and box[8:24] == NOTE]
        clips = [json.loads(note) for note in notes]
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"`path`={str(path)!r} cannot be read as a film: {error}") from error
    if not clips:
        raise ValueError(f"`path`={str(path)!r} does not say how it was made: it is no film of `FilmWriter`.")
    return clips


def boxes(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The boxes that an MP4 consists of, by their four letters; one that is cut short is left out."""
    place = 0
    while place + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        if size == 1:
            (size,) = struct.unpack(">Q", content[place + 8 : place + 16])
        if size < 8 or place + size > len(content):
            return
        yield kind.decode("latin-1"), content[place : place + size]
        place += size


def _note(values: dict[str, Any]) -> bytes:
    content = NOTE + json.dumps(values, sort_keys=True).encode()
    return struct.pack(">I4s", 8 + len(content), b"uuid") + content


def _replace_end(path: Path, place: int, content: bytes) -> None:
    """Make `content` what stands in the file from `place` on, on disk; where that fails, what stood there remains."""
    # Without a buffer: what cannot be written is not tried once more when the file is closed.
    with open(path, "r+b" if path.exists() else "w+b", buffering=0) as file:
        file.seek(place)
        before = file.read()
        try:
            _write_end(file, place, content)
        except OSError:
            _write_end(file, place, before)
            raise


def _write_end(file: RawIOBase, place: int, content: bytes) -> None:
    file.truncate(place)
    file.seek(place)
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
