"""`Journal`: the prompts that a film has used, on disk before they are, so that none is lost and none used twice."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from .clips import ClipSpec, one_per_clip
from .files import write_end
from .specs import check_clip, one_by_one


class Journal:
    """The prompts of a film whose clips are directed while it is made: a file of one JSON line a clip.

        journal = Journal("film.mp4.journal")
        clips = pipe.stream(image=image, prompts=journal.prompts(typed), state=film.state, ...)

    Run again after a kill, the clips that were begun are made with what they were begun with, and `typed` is asked
    from the next one on.

    Args:
        path: Of the file; it need not exist.
        clips (`Sequence[ClipSpec]`, *optional*):
            The clips that the film has already: what the journal lacks of them is taken from here, and written down
            with the next clip that is begun.

    Raises:
        ValueError: if the file is no journal, is damaged, or is that of another film than the one of `clips`.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike, clips: Sequence[ClipSpec] | None = None):
        self.path = Path(path)
        self._entries, self._size = self._read()
        # Of clips that were made without a journal: they are written down with the next one.
        self._unwritten: list[ClipSpec] = []
        if clips is not None:
            self._check(clips)

    @property
    def entries(self) -> list[ClipSpec]:
        """The clips that were begun."""
        return list(self._entries)

    def prompts(
        self, new: Iterable[str | ClipSpec | Mapping[str, Any]], num_clips: int | None = None
    ) -> Iterator[ClipSpec]:
        """The prompts of the film: those that were used, then `new` ones, each written down when its clip begins.

        Args:
            new (`Iterable`):
                Prompts, specs or dictionaries of their fields, of the clips that were not begun, each asked for when
                its clip is due. An empty one repeats the last.
            num_clips (`int`, *optional*): Clips of the whole film; when `new` ends before, the last prompt holds.

        Raises:
            ValueError: for a prompt that is not right, when its turn comes.
            OSError: if it cannot be written down; its clip is not begun then.
        """
        # Entries may be added while this waits for the next clip.
        written = len(self._entries)
        following = one_by_one(self._repeated(new))
        for index, item in enumerate(one_per_clip(chain(self._entries[:written], following), num_clips)):
            spec = check_clip(item, index)
            if index >= written:
                self._write(spec)
            yield spec

    def _repeated(self, new: Iterable[Any]) -> Iterator[Any]:
        """`new`, and for an empty prompt the last one; what happens once, such as a cut, does not happen again."""
        for item in new:
            if isinstance(item, str) and not item.strip() and self._entries:
                last = self._entries[-1]
                *_, item = one_per_clip([last], 2)
            yield item

    def _write(self, spec: ClipSpec) -> None:
        specs = [*self._unwritten, spec]
        content = b"".join(json.dumps(one.to_dict(), ensure_ascii=False).encode() + b"\n" for one in specs)
        # Without a buffer: what cannot be written is not tried once more when the file is closed.
        with open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0) as file:
            write_end(file, self._size, content)
        self._size += len(content)
        self._entries.append(spec)
        self._unwritten = []

    def _read(self) -> tuple[list[ClipSpec], int]:
        """The clips in the file, and how long it is without a last line that was cut off."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0
        *lines, _ = content.split(b"\n")
        specs = []
        for number, line in enumerate(lines, start=1):
            try:
                specs.append(check_clip(json.loads(line), number - 1))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"`path`={str(self.path)!r}, line {number} is not what a journal has there ({error}). Mend the "
                    "line, or delete the file to go on without the prompts that it tells."
                ) from error
        return specs, sum(len(line) + 1 for line in lines)

    def _check(self, clips: Sequence[ClipSpec]) -> None:
        """Raise a `ValueError` unless the journal is that of a film with these clips; add those that it lacks."""
        pairs = enumerate(zip(self._entries, clips, strict=False))
        differs = [index for index, (told, made) in pairs if told.prompt != made.prompt]
        # Only the first clip can have been begun where none is done.
        if differs or (not clips and len(self._entries) > 1):
            place = differs[0] if differs else 1
            made = f"was made with {clips[place].prompt!r}" if differs else "is not there"
            raise ValueError(
                f"`path`={str(self.path)!r} is the journal of another film: clip {place} of it is "
                f"{self._entries[place].prompt!r}, but that of the film {made}. Delete it, or choose another film."
            )
        self._unwritten = list(clips[len(self._entries) :])
        self._entries += self._unwritten
