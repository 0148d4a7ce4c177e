"""`Project`: the folder of one film, with its timeline, of which what has not begun may still be changed."""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import PIL.Image
from safetensors import SafetensorError

from ..chain import read_notes
from ..checks import check_count
from ..clips import ClipSpec
from ..conditions.following import Following
from ..files import written_whole
from ..growing import RECORD_KEY
from ..presets import PRESETS
from ..sound import has_sound
from ..specs import one_by_one
from .settings import MAX_CLIPS, MAX_PROMPT, MAX_TITLE, Settings


FORMAT = "diffusers_svi.project"
# Of the picture in the gallery.
POSTER_SIDE = 480

# What happens in the clips of a film: a text each, empty for what happens in the clip before, or more about it.
Story = Sequence[str | ClipSpec]


@dataclass(frozen=True)
class Followed:
    """What a film follows: its `file` in the film's folder, the `num_frames` it has, and the `num_clips` they make."""

    file: str
    num_frames: int
    num_clips: int


@dataclass(frozen=True)
class Entry:
    """A clip on the timeline: `spec` has the fields of a `ClipSpec`, `number` is its own while this program runs."""

    number: int
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """What happens in it; empty for what happens in the clip before."""
        return self.spec.get("prompt", "")


class Project:
    """A film's folder: its start image, its timeline and settings in `film.json`, and the film as it grows.

    Every change is on disk when its method returns. Any thread may call.

    Args:
        folder: Of the film, as `create` left it.

    Raises:
        ValueError: if it is no such folder, or what it holds is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.writing = threading.Lock()  # held by whoever has the film's file open
        self._lock = threading.RLock()
        self._numbers = 0
        self._begun = 0
        path = self.folder / "film.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"its `format` is not {FORMAT!r}")
            known = {field.name for field in fields(Settings)}
            self.title = str(values["title"])
            self.settings = Settings(**{name: values["settings"][name] for name in known & set(values["settings"])})
            self._clips = [self._entry(spec) for spec in values["clips"]]
            self.was_being_made = bool(values["being_made"])
            self.followed = self._followed(values.get("followed"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the timeline of a film ({error}).") from error
        self._being_made = self.was_being_made
        self.num_done, self.num_frames = self._on_disk()

    @classmethod
    def create(
        cls,
        folder: Path,
        image: PIL.Image.Image,
        story: Story,
        settings: Settings,
        title: str = "",
        follows: Following | None = None,
        num_clips: int | None = None,
    ) -> "Project":
        """A film that is not begun, in `folder`, which is there and empty.

        What it follows is copied; where that makes `num_clips`, the story is as long, in which the last prompt holds.

        Raises:
            ValueError: for no prompt, or an empty first one, and for more of them than clips.
        """
        specs = _specs(story)
        if not specs or not specs[0]["prompt"]:
            raise ValueError("A film needs a prompt for its first clip.")
        check_count("number of clips", max(len(specs), num_clips or 0), 1, MAX_CLIPS)
        followed = None
        if follows is not None:
            if settings.endless:
                raise ValueError("A film that follows something ends with it: it cannot go on until you stop it.")
            assert num_clips is not None
            followed = Followed(f"{follows.name}{follows.path.suffix.lower()}", follows.num_frames, num_clips)
            specs = _as_long(specs, followed)
            with written_whole(folder / followed.file) as unfinished:
                shutil.copyfile(follows.path, unfinished)
        with written_whole(folder / "start.png") as unfinished:
            image.save(unfinished, format="PNG")
        poster = image.copy()
        poster.thumbnail((POSTER_SIDE, POSTER_SIDE))
        with written_whole(folder / "poster.jpg") as unfinished:
            poster.save(unfinished, format="JPEG", quality=85)
        _write(folder, title.strip()[:MAX_TITLE], settings, specs, False, followed)
        return cls(folder)

    @property
    def name(self) -> str:
        """Of the folder, by which the film is known."""
        return self.folder.name

    @property
    def path(self) -> Path:
        """Of the film that grows."""
        return self.folder / "film.mp4"

    @property
    def image(self) -> PIL.Image.Image:
        """The first frame of the film."""
        return PIL.Image.open(self.folder / "start.png")

    @property
    def follows(self) -> Following | None:
        """What it follows, which is read when it is needed."""
        if self.followed is None:
            return None
        name = str(PRESETS[self.settings.preset].follows)
        options = {"audio_guidance_scale": self.settings.audio_guidance_scale} if name == "audio" else {}
        return Following(name=name, path=self.folder / self.followed.file, fps=self.settings.fps, options=options)

    @property
    def sound(self) -> Path | None:
        """What has the sound of the film: what it follows, poses out of a video with sound too."""
        follows = self.follows
        return None if follows is None or not has_sound(follows.path) else follows.path

    @property
    def clips(self) -> list[Entry]:
        """The timeline, those made first."""
        return self._clips

    @property
    def num_fixed(self) -> int:
        """Clips that are made or being made, and cannot be changed any more."""
        return max(self.num_done, self._begun)

    @property
    def is_complete(self) -> bool:
        """Whether every clip of the timeline is in the film, and no more are to come."""
        endless = self.settings.endless and self.num_done < MAX_CLIPS
        return self.num_done >= len(self._clips) and not endless

    def edit(self, number: int, prompt: str) -> None:
        """Let another prompt be that of a clip that has not begun. Raises a `ValueError` for one that has."""
        spec = _spec(prompt)
        with self._lock:
            if any(entry.number == number and entry.prompt == spec["prompt"] for entry in self._clips):
                return
            place = self._place(number)
            entry = replace(self._clips[place], spec={**self._clips[place].spec, **spec})
            self._save([*self._clips[:place], entry, *self._clips[place + 1 :]])

    def remove(self, number: int) -> None:
        """Cut out a clip that has not begun. Raises a `ValueError` for one that has, and for the only one."""
        with self._lock:
            place = self._place(number)
            if len(self._clips) == 1:
                raise ValueError("This is the only clip: a film needs one.")
            self._save([*self._clips[:place], *self._clips[place + 1 :]])

    def move(self, number: int, by: int) -> None:
        """Change the place of a clip among those that have not begun, `by` places; past the ends it stays there."""
        with self._lock:
            place = self._place(number)
            others = [*self._clips[:place], *self._clips[place + 1 :]]
            target = min(max(place + by, self.num_fixed), len(others))
            self._save([*others[:target], self._clips[place], *others[target:]])

    def add(self, story: Story) -> None:
        """Add clips at the end. Raises a `ValueError` if there are too many."""
        with self._lock:
            specs = _specs(story)
            if self.followed is not None and len(self._clips) + len(specs) > self.followed.num_clips:
                raise ValueError(f"The film ends with what it follows, after {self.followed.num_clips} clips.")
            check_count("number of clips", len(self._clips) + len(specs), 1, MAX_CLIPS)
            self._save([*self._clips, *(self._entry(spec) for spec in specs)])

    def fit(self, num_clips: int) -> None:
        """Let the film be as long as what it follows, now that the clips of that are known for sure.

        Raises:
            ValueError: if its story is longer.
        """
        assert self.followed is not None
        with self._lock:
            if num_clips == self.followed.num_clips:
                return
            followed = replace(self.followed, num_clips=num_clips)
            specs = _as_long([entry.spec for entry in self._clips], followed)
            self.followed = followed
            self._save([*self._clips, *(self._entry(spec) for spec in specs[len(self._clips) :])])

    def due(self) -> Iterator[dict[str, Any]]:
        """The clips of the film, those made before it goes on first, each taken when it is asked for.

        From then on it cannot be changed. Ends with the timeline, which may have grown in the meantime. Raises a
        `ValueError` if the first clip has no prompt.
        """
        place = 0
        while True:
            with self._lock:
                clips = self._clips
                if place == len(clips) and self.settings.endless and place < MAX_CLIPS:
                    clips = [*clips, self._entry({})]
                if place == len(clips):
                    return
                spec = clips[place].spec
                if not clips[place].prompt:
                    if place == 0:
                        raise ValueError("The first clip has no prompt. Write what happens in it.")
                    # What stands in the film stands on the timeline too.
                    spec = {**spec, "prompt": clips[place - 1].prompt}
                    clips = [*clips[:place], replace(clips[place], spec=spec), *clips[place + 1 :]]
                if place >= self.num_done:
                    self._save(clips)
                    self._begun = place + 1
            yield spec
            place += 1

    def clip_made(self, num_frames: int) -> None:
        """One more clip is in the film, which has `num_frames` frames now."""
        self.num_done, self.num_frames = self.num_done + 1, num_frames

    def being_made(self, value: bool) -> None:
        """Note whether the film is waiting or being made, for who finds it after a crash; at rest nothing is begun."""
        with self._lock:
            self._being_made = value
            if not value:
                self._begun = 0
                self.was_being_made = False
            self._save(self._clips)

    def _followed(self, values: Any) -> Followed | None:
        if values is None:
            return None
        followed = Followed(**values)
        if Path(followed.file).name != followed.file or not (self.folder / followed.file).is_file():
            raise ValueError(f"{followed.file!r}, which it follows, is not there")
        if PRESETS[self.settings.preset].follows is None:
            raise ValueError(f"a film of {self.settings.preset!r} follows nothing")
        return followed

    def _place(self, number: int) -> int:
        """Where the clip stands that may still be changed."""
        for place, entry in enumerate(self._clips):
            if entry.number == number:
                if place < self.num_fixed:
                    raise ValueError(f"Clip {place + 1} has begun: what it shows is settled.")
                return place
        raise ValueError("This clip is not on the timeline any more.")

    def _entry(self, spec: dict[str, Any]) -> Entry:
        if not isinstance(spec, dict):
            raise ValueError(f"{spec!r} is no clip")
        self._numbers += 1
        return Entry(self._numbers, spec)

    def _save(self, clips: list[Entry]) -> None:
        """Make `clips` the timeline, once it is on disk."""
        specs = [entry.spec for entry in clips]
        _write(self.folder, self.title, self.settings, specs, self._being_made, self.followed)
        self._clips = clips

    def _on_disk(self) -> tuple[int, int]:
        """Clips and frames of the film."""
        state = self.path.with_name(f"{self.path.name}.state")
        if not state.exists():
            return 0, 0
        try:
            notes = read_notes(state)
            return int(notes.get("num_clips", 0)), int(json.loads(notes[RECORD_KEY])["num_frames"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{state} is damaged ({error}): the film cannot go on.") from error


def _specs(story: Story) -> list[dict[str, Any]]:
    """The fields of every clip, one by one."""
    clips = (clip.to_dict() if isinstance(clip, ClipSpec) else {"prompt": clip} for clip in one_by_one(story))
    return [{**clip, **_spec(clip["prompt"])} for clip in clips]


def _as_long(specs: list[dict[str, Any]], followed: Followed) -> list[dict[str, Any]]:
    """A story as long as what the film follows."""
    if len(specs) > followed.num_clips:
        raise ValueError(
            f"The story has {len(specs)} clips, but what the film follows is over after {followed.num_clips}."
        )
    return [*specs, *({"prompt": ""} for _ in range(followed.num_clips - len(specs)))]


def _spec(prompt: str) -> dict[str, str]:
    prompt = " ".join(prompt.split())
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"A prompt may have {MAX_PROMPT} characters, this one has {len(prompt)}.")
    return {"prompt": prompt}


def _write(
    folder: Path,
    title: str,
    settings: Settings,
    specs: list[dict[str, Any]],
    being_made: bool,
    followed: Followed | None,
) -> None:
    values = {
        "format": FORMAT,
        "title": title,
        "being_made": being_made,
        "settings": asdict(settings),
        "followed": None if followed is None else asdict(followed),
        "clips": specs,
    }
    with written_whole(folder / "film.json") as unfinished:
        unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
