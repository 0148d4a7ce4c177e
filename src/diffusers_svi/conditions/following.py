"""What a film follows, out of a file: known before a model is loaded, and opened for the one that is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..chain import ChainState
from ..clips import ClipSpec
from ..conditioning import Scheme
from ..pipeline import SVIPipeline
from .audio import num_rows, open_audio
from .condition_pipeline import ConditionPipeline, told_of
from .dance_pipeline import SVIDancePipeline
from .pose import Poses, open_pose
from .rows import Rows
from .talk_pipeline import SVITalkPipeline
from .voice import Voice


# By what films follow beside text.
CALLED = {"audio": "speech", "pose": "poses"}
PIPELINES: dict[str, type[ConditionPipeline]] = {"audio": SVITalkPipeline, "pose": SVIDancePipeline}


@dataclass(frozen=True, kw_only=True)
class Following:
    """A sound or poses in a file, which a film follows.

    Args:
        name (`str`): "audio" or "pose".
        path (`Path`): As `audio` of [`SVITalkPipeline`] or `pose` of [`SVIDancePipeline`].
        fps (`float`): Frames a second of the film. A sound has so many rows a second, and a video of poses is brought
            to so many frames; for that, it must be a whole number.
        options (`dict`): What else a call of the pipeline is given: `audio_guidance_scale`, `loop_pose`.
    """

    name: str
    path: Path
    fps: float
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loops(self) -> bool:
        """Whether the film does not end with it."""
        return bool(self.options.get("loop_pose"))

    def read(self) -> "Following":
        """This, once all of it was read, which takes a while for an hour of sound.

        Raises:
            ValueError: if it cannot be read, is none, or is shorter than a frame.
        """
        assert self._known
        return self

    @property
    def num_frames(self) -> int:
        """Film frames of it."""
        return self._known[0]

    def num_clips(
        self, asked: int | None, specs: list[ClipSpec], scheme: Scheme, num_frames: int, state: ChainState | None
    ) -> int:
        """Clips of the film: as many as it is long, or as are `asked` for.

        Args:
            asked (`int`, *optional*): Clips, if that is told.
            specs (`list[ClipSpec]`): Those that have a prompt.
            scheme (`Scheme`), num_frames (`int`): How clips are chained, and the frames of one.
            state (`ChainState`, *optional*): What the film goes on from.

        Raises:
            ValueError: if there are to be more.
        """
        source, least = ("prompts", sum(spec.num_clips for spec in specs)) if asked is None else ("num_clips", asked)
        count = PIPELINES[self.name].clips_that_follow
        most = count(self.num_frames, scheme, num_frames, state, specs, least, source)
        return most if asked is None else asked

    def told(self, height: int, width: int) -> str:
        """What a film of this size remembers of it."""
        return told_of(self.num_frames, self._known[1] or self._poses(height, width).fingerprint)

    def arguments(self, pipe: SVIPipeline, height: int, width: int) -> dict[str, Any]:
        """What `pipe`, which is of [`PIPELINES`], is given for a film of this size."""
        rows: Rows
        if isinstance(pipe, SVITalkPipeline):
            rows = open_audio(self.path, pipe.audio_encoder, self.fps, pipe.audio_feature_extractor)
        else:
            rows = self._poses(height, width)
        return {self.name: rows, **self.options}

    @cached_property
    def _known(self) -> tuple[int, str]:
        """Its frames, and the fingerprint of a sound; that of poses depends on the size of the film."""
        if self.name == "pose":
            return len(self._poses()), ""
        voice = Voice(self.path)
        length = num_rows(voice, self.fps)
        if length < 1:
            raise ValueError(
                f"`audio`={str(self.path)!r} is shorter than a frame of the film, at {self.fps:g} a second."
            )
        return length, voice.fingerprint

    def _poses(self, height: int | None = None, width: int | None = None) -> Poses:
        whole = int(self.fps) if self.fps == int(self.fps) else self.fps
        return open_pose(self.path, height, width, whole)  # type: ignore[arg-type]
