"""A file that grows: how much of it counts stands beside it, in the state of the chain, and is checked."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from .chain import ChainState, read_notes
from .files import write_end, written_whole


RECORD_KEY = "film"


@dataclass(frozen=True)
class Record:
    """What of the file belongs to the film, as of its last clip, and how it is encoded (`form`)."""

    form: dict[str, Any]
    size: int = 0
    num_frames: int = 0
    # The end that the next clip will tell again: where clips lose their last frames, the last one keeps them.
    held_size: int = 0
    held_frames: int = 0
    # Of the last clip's bytes, without the held ones and of these alone, to know the file again.
    last_size: int = 0
    last_digest: str = ""
    held_digest: str = ""
    # Of the recipe that stands in the file last.
    recipe_digest: str = ""

    def grown(self, start: int, told: bytes, held: bytes, num_frames: int, held_frames: int, recipe: str) -> "Record":
        """The record after a clip that begins with film frame `start`: what it tells, then what is held of it."""
        return replace(
            self,
            size=self.place(start) + len(told) + len(held),
            num_frames=num_frames,
            held_size=len(held),
            held_frames=held_frames,
            last_size=len(told),
            last_digest=digest(told),
            held_digest=digest(held),
            recipe_digest=recipe,
        )

    def place(self, start: int) -> int:
        """The byte at which a clip is to be written that begins with film frame `start`."""
        return self.size - (self.held_size if start < self.num_frames else 0)


class GrowingFile:
    """A film's file and its record. Nothing that counts is ever changed, but for the frames that are told again.

    Raises:
        ValueError: if the file is none that was begun like this, is of another form, or damaged.
    """

    def __init__(self, path: Path, form: dict[str, Any]):
        self.path, self.record = path, Record(form)
        self.state: ChainState | None = None
        self._take_up()

    @property
    def state_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.state")

    def grow(self, record: Record, content: bytes, state: ChainState) -> None:
        """Put `content` where the film is to go on, on disk, and then the record and the state.

        Raises:
            OSError: if it cannot be written; the film is as it was.
        """
        if not self.record.size:
            # So that what is written from now on can be told from a file of somebody else's.
            with written_whole(self.state_path) as unfinished:
                save_file({}, unfinished, metadata={RECORD_KEY: json.dumps(asdict(self.record))})
        place = record.size - len(content)
        before = _replace_end(self.path, place, content)
        try:
            state.save(self.state_path, {RECORD_KEY: json.dumps(asdict(record))})
        except Exception:
            _replace_end(self.path, place, before)
            raise
        self.record, self.state = record, state

    def _take_up(self) -> None:
        """Go on with the film that is there, if there is one."""
        if not self.state_path.exists():
            if self.path.exists() and self.path.stat().st_size:
                raise ValueError(
                    f"`path`={str(self.path)!r} is a file without {self.state_path.name} beside it, so nothing can "
                    "be added to it. Choose another name, or delete it."
                )
            return
        try:
            record = Record(**json.loads(read_notes(self.state_path)[RECORD_KEY]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.state_path} is the state of a chain, but of no film ({error}). Choose another name."
            ) from error
        if record.form != self.record.form:
            raise ValueError(
                f"`path`={str(self.path)!r} is a film with {record.form}, but {self.record.form} is asked for. Ask "
                "for the same, or choose another name."
            )
        self.state = ChainState.load(self.state_path) if record.size else None
        self.record = self._checked(record)

    def _checked(self, record: Record) -> Record:
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
        if digest(last) != record.last_digest:
            raise ValueError(
                f"`path`={str(self.path)!r} is not as it was written: its last clip, bytes {own - record.last_size} "
                f"to {own}, has been changed or cut. Put the file back, or begin another film."
            )
        if digest(held) != record.held_digest:
            # A run ended while it was writing the next clip over the frames that it tells again.
            frames = record.num_frames - record.held_frames
            record = replace(record, size=own, num_frames=frames, held_size=0, held_frames=0, held_digest=digest(b""))
        if self.path.stat().st_size > record.size:
            os.truncate(self.path, record.size)
        return record


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _replace_end(path: Path, place: int, content: bytes) -> bytes:
    """Make `content` what stands in the file from `place` on, on disk; where that fails, what stood there remains.

    Returns:
        `bytes`: What stood there.
    """
    # Without a buffer: what cannot be written is not tried once more when the file is closed.
    with open(path, "r+b" if path.exists() else "w+b", buffering=0) as file:
        file.seek(place)
        before = file.read()
        try:
            write_end(file, place, content)
        except OSError:
            write_end(file, place, before)
            raise
    return before
