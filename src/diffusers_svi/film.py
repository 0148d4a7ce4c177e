"""`FilmWriter`: a film in one file that grows clip by clip, and survives whatever happens to the run.

The file is a fragmented MP4, or a Matroska segment without an end: what a player needs to know, then for every clip a
note of how it was made and its frames, encoded by themselves. Nothing that was written is ever changed. Beside it,
`<film>.state` holds the state of the chain and how much of the file belongs to it; it is replaced when the frames are
on disk. A film that is taken up again is cut to that length first, so that it ends with the very bytes of one that was
never stopped.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from diffusers.utils import logging
from filelock import FileLock, Timeout

from .chain import ChainState
from .checks import check_choice
from .clips import Clip
from .growing import GrowingFile, digest
from .notes import MAX_COMMENT, comment, note, read_notes
from .pieces import Form
from .recipe import FORM_KEY, RECIPE_KEY
from .sound import Sound
from .video import remux, to_8_bits


logger = logging.get_logger(__name__)


class FilmWriter:
    """Write the clips of a film to one file, which can be watched at any time and gone on with after a crash.

        with FilmWriter("film.mp4", fps=16) as film:
            for clip in pipe.stream(image=image, prompts=prompts, state=film.state, ...):
                film.append(clip)

    Run again, this goes on where it was stopped, and makes a finished film longer.

    Args:
        path: Of the film, `*.mp4` or `*.mkv`. Beside it lie `<path>.state` and, while it is written, `<path>.lock`.
        fps (`float`, defaults to 16): Frames a second.
        codec (`str`, defaults to `"libx264"`):
            `"libx264"`, which everything plays, `"libx265"`, `"libsvtav1"`, or in an .mkv file `"ffv1"`, which loses
            nothing.
        crf (`int`, *optional*, defaults to 18): Constant rate factor, 0 to 51: smaller is better and larger.
        pixel_format (`str`, *optional*, defaults to `"yuv420p"`):
            Or `"yuv444p"`, colours in full, which few players show. `"bgr0"`, and nothing else, with `"ffv1"`.
        audio (*optional*):
            A file with the sound of the film, mono or stereo, which begins with its first frame. In an .mp4 it becomes
            AAC, in an .mkv it is kept in 16 bits. Where it is shorter than the film, silence follows.
        background (`bool`, defaults to `False`):
            Encode and write a clip in a thread, while the next one is generated. A kill then loses one clip more.

    Raises:
        ValueError: if the file is no film of these settings that was begun by a `FilmWriter`, is damaged, or is being
            written by another run; for another suffix, settings that there are not, and a folder that is not there.
        OSError: if it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float = 16,
        *,
        codec: str = "libx264",
        crf: int | None = None,
        pixel_format: str | None = None,
        audio: str | os.PathLike | None = None,
        background: bool = False,
    ):
        self.path = Path(path)
        self._form = Form.checked(self.path.suffix, fps, codec, crf, pixel_format)
        if not self.path.parent.is_dir():
            raise ValueError(f"`path`={str(path)!r}: there is no folder {str(self.path.parent)!r}. Make it first.")
        # What cannot be written looks to the lock as if another held it.
        open(f"{self.path}.lock", "ab").close()
        self._lock = FileLock(f"{self.path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"`path`={str(self.path)!r} is being written by another run. Wait for it or stop it."
            ) from error
        self._sound = None
        try:
            if audio is not None:
                self._sound = Sound(audio)
                self._form = replace(self._form, audio=self._sound.digest)
            self._file = GrowingFile(self.path, asdict(self._form))
        except BaseException:
            if self._sound is not None:
                self._sound.close()
            self._lock.release()
            raise
        self._thread = ThreadPoolExecutor(1, "film") if background else None
        self._under_way: Future[None] | None = None

    @property
    def state(self) -> ChainState | None:
        """Where the film that is on disk is to go on: for `state=` of the pipeline. `None` before the first clip."""
        return self._file.state

    @property
    def fps(self) -> Fraction:
        """Frames a second."""
        return Fraction(self._form.fps)

    @property
    def num_frames(self) -> int:
        """Frames of the film that are on disk."""
        return self._file.record.num_frames

    def append(self, clip: Clip) -> None:
        """Add a clip. When this returns, it is on disk; with `background`, the one before is.

        Its `frames` may be any iterable, of pictures of any kind; they are asked for one by one.

        Raises:
            ValueError: if it is not the next clip of the film, or its frames are latents, of another size or too few.
            OSError: if it cannot be written; the film is as it was. With `background`, if the one before could not be:
                then this one is not added either.
        """
        self._wait()
        record, (height, width) = self._file.record, clip.state.image.shape[-2:]
        if clip.start not in (record.num_frames, record.num_frames - record.held_frames):
            raise ValueError(
                f"`clip` begins with frame {clip.start}, but the film has {record.num_frames}: it is not the next "
                "one. Pass `state=film.state` to the pipeline."
            )
        self._form.check_size(height, width)
        if self._file.state is not None and self._file.state.image.shape[-2:] != (height, width):
            raise ValueError(
                f"`clip` is of {height} x {width} pixels, but the film of "
                f"{' x '.join(map(str, self._file.state.image.shape[-2:]))}: begin another film."
            )
        if self._thread is None:
            self._write(clip)
        else:
            self._under_way = self._thread.submit(self._write, clip)

    def finalize(self, path: str | os.PathLike) -> None:
        """Write the film so far as an ordinary file whose index comes first, as editors and web servers want it.

        Nothing is encoded again, and how it was made is told in the container's comment, or, where that is too long
        for one, not at all, with a warning. This film stays as it is and can go on.

        Raises:
            ValueError: if `path` is the film's own or of another kind of file, or there is no clip yet.
            OSError: if it cannot be written.
        """
        self._wait()
        if Path(path).resolve() == self.path.resolve():
            raise ValueError(
                f"`path`={str(path)!r} is the film itself, which would not grow any more: choose another."
            )
        check_choice("path.suffix", Path(path).suffix, (self.path.suffix,))
        if not self.num_frames:
            raise ValueError(f"`path`={str(path)!r}: there is no clip yet that could be written.")
        told: str | None = comment(read_notes(self.path))
        if told is not None and len(told) > MAX_COMMENT:
            told = None
            logger.warning(
                f"How {self.path} was made is left out of {path}: with its images it is longer than a comment can be. "
                "The film itself tells it."
            )
        remux(self.path, path, told)

    def close(self) -> None:
        """Let others write the film, once what was appended is on disk.

        Raises:
            OSError, ValueError: with `background`, if the last clip could not be written.
        """
        try:
            self._wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._sound is not None:
                self._sound.close()
            self._lock.release()

    def __enter__(self) -> "FilmWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (OSError, ValueError) as lost:
            if error is None:
                raise
            error.add_note(f"The last clip of {self.path} could not be written: {lost}")

    def _wait(self) -> None:
        """Wait for the clip that is being written, and raise what went wrong with it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _write(self, clip: Clip) -> None:
        record, state = self._file.record, clip.state
        frames = _Pixels(itertools.chain(clip.frames, clip.tail), *state.image.shape[-2:])
        kept, number = state.start - clip.start, 2 * clip.index + 2
        head, told, held = b"", b"", b""
        if kept:
            head, told = self._form.encode(itertools.islice(frames, kept), clip.start, number, self._sound)
        if frames.count < kept:
            raise ValueError(f"`clip.frames` are {frames.count}, but the next clip begins {kept} after this one.")
        more = list(itertools.islice(frames, 1))
        if more:
            head, held = self._form.encode(itertools.chain(more, frames), state.start, number + 1, self._sound)
        recipe, notes = record.recipe_digest, b""
        if clip.recipe:
            recipe = digest(json.dumps(clip.recipe, sort_keys=True).encode())
            if recipe != record.recipe_digest:
                notes += note({RECIPE_KEY: dict(clip.recipe), FORM_KEY: asdict(self._form)}, self._form.container)
        notes += note(_told_of(clip), self._form.container)
        told = (b"" if record.size else head) + notes + told
        grown = record.grown(clip.start, told, held, clip.start + frames.count, frames.count - kept, recipe)
        self._file.grow(grown, told + held, state)


class _Pixels(Iterator[np.ndarray]):
    """Frames one by one, as `(height, width, 3)` uint8 of the size that is expected, and counted."""

    def __init__(self, frames: Iterable, height: int, width: int):
        self._frames, self._shape, self.count = iter(frames), (height, width, 3), 0

    def __next__(self) -> np.ndarray:
        pixels = to_8_bits(next(self._frames))
        if pixels.shape != self._shape:
            height, width, _ = self._shape
            raise ValueError(
                f"`clip.frames[{self.count}]` is {pixels.shape} (height, width, channels), but the film is of "
                f"{height} x {width} pixels. For latents see `decode_latents`."
            )
        self.count += 1
        return pixels


def _told_of(clip: Clip) -> dict[str, Any]:
    told = {"index": clip.index, "prompt": clip.prompt, "start": clip.start, "made_with": dict(clip.state.made_with)}
    return told | ({} if clip.spec is None else {"spec": clip.spec.to_dict()})


def read_clips(path: str | os.PathLike) -> list[dict[str, Any]]:
    """How the clips of a film were made: index, prompt, first frame, spec, and what they were made with.

    Raises:
        ValueError: if `path` is no film of a `FilmWriter`.
    """
    clips = [told for told in read_notes(path) if "index" in told]
    if not clips:
        raise ValueError(f"`path`={str(path)!r} does not say how it was made: it is no film of `FilmWriter`.")
    return clips
