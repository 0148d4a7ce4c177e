"""`Studio`: a folder of films that one worker makes, one after another."""

import contextlib
import errno
import itertools
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers.utils import logging
from filelock import FileLock, Timeout

from ..clips import ClipSpec
from ..conditioning import PixelMotion
from ..conditions.following import CALLED
from ..film import FilmWriter
from ..inputs import check_size
from ..pipeline import SVIPipeline
from ..plan import scheme_of
from ..presets import PRESETS, SEED_STEP
from .project import Project, Story
from .settings import Settings
from .uploads import read_followed


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a film stands that is being made.

    Args:
        clip (`int`): The clip that is being made, from 0.
        step, num_steps (`int`): Its denoising steps that are done, and all of them.
        seconds_a_clip (`float`, *optional*): As measured; `None` before the first step.
        since (`float`): When its clip began, by `time.monotonic`.
    """

    clip: int
    step: int
    num_steps: int
    seconds_a_clip: float | None
    since: float

    def seconds_left(self, num_clips: int) -> float | None:
        """Until a film of `num_clips` clips is made."""
        if self.seconds_a_clip is None:
            return None
        left = (num_clips - self.clip) * self.seconds_a_clip - (time.monotonic() - self.since)
        return max(left, (num_clips - self.clip - 1) * self.seconds_a_clip)


class Studio:
    """The films of a folder, each in a folder of its own, and the queue of those that are to be made.

    Any thread may call. One worker makes the films; the pipeline is loaded once, and again where a film wants another
    preset than the film before. What goes wrong with a film is told in `error`, and the next one's turn comes.

    Args:
        folder: Where the films lie. It is made if it is not there.
        load (`Callable[[str], SVIPipeline]`): Gives the pipeline of a preset, by name.

    Raises:
        ValueError: if another studio has the folder open.
        OSError: if it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, load: Callable[[str], SVIPipeline]):
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._folder_lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._folder_lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"`folder`={str(folder)!r} is open in another page. Close that, or take another."
            ) from error
        self._load = load
        self._pipeline: tuple[str, SVIPipeline] | None = None
        self._changed = threading.Condition()
        self._queue: deque[Project] = deque()
        self._making: Project | None = None
        self._stopping = self._closed = False
        self._progress: Progress | None = None
        self._errors: dict[str, str] = {}
        self._films = {}
        for path in self.folder.glob("*/film.json"):
            try:
                film = Project(path.parent)
            except ValueError as error:
                logger.warning(f"{path.parent} is left out: {error}")
            else:
                self._films[film.name] = film
        self._worker = threading.Thread(target=self._work, name="studio", daemon=True)
        self._worker.start()

    @property
    def films(self) -> list[Project]:
        """The last begun first."""
        return [self._films[name] for name in sorted(self._films, reverse=True)]

    def film(self, name: str) -> Project:
        """The film of that name. Raises a `ValueError` if there is none."""
        if name not in self._films:
            raise ValueError(f"There is no film {name!r} here.")
        return self._films[name]

    def create(
        self,
        image: PIL.Image.Image,
        story: Story,
        settings: Settings,
        title: str = "",
        followed: str | os.PathLike | None = None,
    ) -> Project:
        """A new film, which `make` makes.

        Args:
            image (`PIL.Image.Image`): Its first frame.
            story (`list[str]` or of `ClipSpec`): Its clips; an empty text for what happens in the clip before.
            settings (`Settings`): How it is made.
            title (`str`, *optional*): What people call it.
            followed (*optional*): The file of what it follows, for a preset whose films follow something. The film is
                as long as that.

        Raises:
            ValueError: if the first prompt is missing, or what it follows is, cannot be read or is too short.
            OSError: if it cannot be written.
        """
        family = PRESETS[settings.preset]
        if (family.follows is None) != (followed is None):
            what = "nothing" if family.follows is None else CALLED[family.follows]
            raise ValueError(f"A film of {settings.preset!r} follows {what}: choose that, or another preset.")
        follows, num_clips = None, None
        if family.follows is not None and followed is not None:
            follows = read_followed(family.follows, followed, settings.fps)
            # As published; it is counted again where a film of another LoRA begins.
            scheme = scheme_of(family, None) or PixelMotion()
            num_clips = follows.num_clips(None, [], scheme, settings.num_frames, None)
        for number in itertools.count(1):
            folder = self.folder / f"{time.strftime('%Y-%m-%d')}-{number:03}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                continue
        try:
            film = Project.create(folder, image, story, settings, title, follows, num_clips)
        except BaseException:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            raise
        self._films[film.name] = film
        return film

    def make(self, name: str) -> None:
        """Let a film be made, or go on, when its turn comes. Nothing happens to one that is waiting or being made."""
        film = self.film(name)
        with self._changed:
            if film in self._queue or (film is self._making and not self._stopping):
                return
            film.being_made(True)
            self._errors.pop(name, None)
            self._queue.append(film)
            self._changed.notify_all()

    def stop(self, name: str) -> None:
        """Let a film wait no more, or end with the clip before the one that is being made."""
        film = self.film(name)
        with self._changed:
            if film in self._queue:
                self._queue.remove(film)
                film.being_made(False)
            if film is self._making:
                self._stopping = True
            self._changed.notify_all()

    def status(self, name: str) -> str:
        """`"queued"`, `"making"`, `"stopping"`, `"failed"`, `"interrupted"` (by a crash), `"done"` or `"stopped"`."""
        film = self.film(name)
        with self._changed:
            if film in self._queue:
                return "queued"
            if film is self._making:
                return "stopping" if self._stopping else "making"
        if name in self._errors:
            return "failed"
        if film.was_being_made:
            return "interrupted"
        return "done" if film.is_complete else "stopped"

    def place(self, name: str) -> int:
        """How many films come before this one, which is waiting."""
        with self._changed:
            before = [film.name for film in self._queue]
            return (before.index(name) if name in before else 0) + (self._making is not None)

    def error(self, name: str) -> str:
        """Why a film failed, in plain words."""
        return self._errors.get(name, "")

    def progress(self, name: str) -> Progress | None:
        """Where a film stands that is being made; `None` for another, and while the model is loaded."""
        with self._changed:
            return self._progress if self._making is not None and self._making.name == name else None

    def finished(self, name: str) -> Path:
        """The film so far as an ordinary MP4, written if there is none yet.

        Raises:
            ValueError: if it has no clip yet, or is being made.
            OSError: if it cannot be written.
        """
        film = self.film(name)
        target = film.folder / f"{name}.mp4"
        if not film.num_done:
            raise ValueError("The film has no clip yet.")
        if not film.writing.acquire(blocking=False):
            raise ValueError("The film is being written. Stop it, or wait until it is made.")
        try:
            if not target.exists() or target.stat().st_mtime_ns < film.path.stat().st_mtime_ns:
                with FilmWriter(film.path, film.settings.fps, audio=film.sound) as writer:
                    writer.finalize(target)
        finally:
            film.writing.release()
        return target

    def close(self) -> None:
        """Stop what is being made, and let another studio have the folder. Films that wait are resumable."""
        with self._changed:
            self._closed = self._stopping = True
            self._queue.clear()
            self._changed.notify_all()
        self._worker.join()
        self._folder_lock.release()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                film = self._making = self._queue.popleft()
                self._stopping, self._progress = False, None
            error = ""
            try:
                self._make(film)
            except Exception as reason:
                error = in_plain_words(reason)
            with self._changed:
                if error:
                    self._errors[film.name] = error
                elif not (self._stopping or film.is_complete or film in self._queue):
                    self._queue.append(film)  # clips were added in the last moment
                # A server that ends leaves its mark, and so does one that has no room for another.
                with contextlib.suppress(OSError):
                    film.being_made(self._closed or film in self._queue)
                self._making = self._progress = None

    def _make(self, film: Project) -> None:
        """The clips that are missing, until there are none or somebody stops it."""
        settings = film.settings
        pipe = self._loaded(settings.preset)
        with film.writing, FilmWriter(film.path, settings.fps, audio=film.sound) as writer:
            if film.follows is not None:
                scheme = pipe.lora_conditioning or PixelMotion() if writer.state is None else writer.state.conditioning
                film.fit(film.follows.num_clips(None, [], scheme, settings.num_frames, writer.state))
            # Clips may be added while the last one is made.
            while not (film.is_complete or self._stopping):
                self._make_clips(film, pipe, writer)

    def _make_clips(self, film: Project, pipe: SVIPipeline, writer: FilmWriter) -> None:
        settings, began = film.settings, time.monotonic()
        seconds: float | None = None

        def step_made(pipe: SVIPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done, passed = step + 1, time.monotonic() - began
            estimate = passed / done * settings.num_inference_steps if seconds is None else seconds
            self._progress = Progress(film.num_done, done, settings.num_inference_steps, estimate, began)
            if self._stopping:
                pipe.interrupt = True
            return tensors

        size: dict[str, Any] = {"height": settings.height, "width": settings.width}
        if settings.max_sequence_length is not None:
            size["max_sequence_length"] = settings.max_sequence_length
        self._progress = Progress(film.num_done, 0, settings.num_inference_steps, None, began)
        follows: dict[str, Any] = {}
        if film.follows is not None:
            image = None if writer.state is not None else film.image
            of_film = check_size(pipe, settings.height, settings.width, image, writer.state)
            follows = {**film.follows.arguments(pipe, *of_film), "num_clips": len(film.clips)}

        def prompts() -> Iterator[ClipSpec]:
            yield from (ClipSpec.from_dict(spec) for spec in film.due())
            # Where the number of clips is told, and clips were cut out since, the last prompt would hold.
            if follows:
                pipe.interrupt = True

        clips = pipe.stream(
            image=film.image if writer.state is None else None,
            prompts=prompts(),
            seeds=itertools.count(settings.seed, SEED_STEP),
            state=writer.state,
            resize_mode=settings.resize_mode,
            negative_prompt=settings.negative_prompt,
            num_frames=settings.num_frames,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            guidance_scale_2=settings.guidance_scale_2,
            color_match=settings.color_match,
            callback_on_step_end=step_made,
            **size,
            **follows,
        )
        for clip in clips:
            writer.append(clip)
            film.clip_made(writer.num_frames)
            seconds, began = time.monotonic() - began, time.monotonic()
            self._progress = Progress(film.num_done, 0, settings.num_inference_steps, seconds, began)
            if self._stopping:
                return

    def _loaded(self, preset: str) -> SVIPipeline:
        if self._pipeline is None or self._pipeline[0] != preset:
            self._pipeline = None  # two do not fit into most memories
            self._pipeline = preset, self._load(preset)
            self._pipeline[1].set_progress_bar_config(disable=True)
        return self._pipeline[1]


def in_plain_words(error: Exception) -> str:
    """What went wrong, for a person who did not write the program."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full. Make room, then continue: what was made is safe."
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "The memory did not suffice. A smaller size or fewer frames a clip need less."
    if isinstance(error, ValueError | FloatingPointError | OSError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"
