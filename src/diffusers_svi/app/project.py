"""`Project`: the folder of one film, with its timeline, of which what has not begun may still be changed."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import PIL.Image
from safetensors import SafetensorError

from ..chain import read_notes
from ..checks import check_choice, check_count, check_number
from ..clips import ClipSpec
from ..color import check_color_match
from ..files import written_whole
from ..growing import RECORD_KEY
from ..inputs import MAX_TOKENS
from ..noise import MAX_SEED
from ..presets import PRESETS, SEED_STEP
from ..prompts import NEGATIVE_PROMPT
from ..specs import one_by_one
from ..start_image import RESIZE_MODES
from ..video import frame_rate


FORMAT = "diffusers_svi.project"
# What a page takes: larger than any model makes today, and small enough for a server to survive it.
MAX_SIDE, MAX_FRAMES, MAX_STEPS, MAX_FPS, MAX_CLIPS = 2048, 1001, 200, 120, 10_000
MAX_PROMPT, MAX_TITLE = 4000, 120
# Of the picture in the gallery.
POSTER_SIDE = 480

# What happens in the clips of a film: a text each, empty for what happens in the clip before, or more about it.
Story = Sequence[str | ClipSpec]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a film is made, the same for all its clips.

    Args:
        preset (`str`): Of the published family.
        height, width (`int`, *optional*): In pixels, multiples of 16; from the image's aspect if not given.
        resize_mode (`str`, defaults to `"crop"`): What happens to an image of another aspect.
        num_frames (`int`): Frames a clip, 1 + 4n.
        num_inference_steps (`int`): Steps a clip.
        guidance_scale (`float`): Weight of the prompt.
        guidance_scale_2 (`float`, *optional*): That of the low-noise expert, for models with two.
        negative_prompt (`str`): What the film should not show.
        color_match (`str`, defaults to `"none"`): How the colours of the start image are kept.
        seed (`int`, defaults to 0): Of the first clip.
        fps (`float`): Frames a second.
        max_sequence_length (`int`, *optional*): Tokens of a prompt; as many as the pipeline takes if not given.
        endless (`bool`, defaults to `False`): Whether the film goes on with its last prompt until it is stopped.

    Raises:
        ValueError: if a value is out of range.
    """

    preset: str
    height: int | None = None
    width: int | None = None
    resize_mode: str = "crop"
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    negative_prompt: str
    color_match: str = "none"
    seed: int = 0
    fps: float
    max_sequence_length: int | None = None
    endless: bool = False

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))
        check_choice("resize_mode", self.resize_mode, RESIZE_MODES)
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and check_count(name, side, 16, MAX_SIDE) % 16:
                raise ValueError(f"`{name}` must be a multiple of 16, got {side}.")
        if check_count("num_frames", self.num_frames, 5, MAX_FRAMES) % 4 != 1:
            raise ValueError(f"`num_frames` must be 1 + 4n, 81 say, got {self.num_frames}.")
        check_count("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_number("guidance_scale", self.guidance_scale)
        if self.guidance_scale_2 is not None:
            check_number("guidance_scale_2", self.guidance_scale_2)
        check_color_match(self.color_match)
        check_count("seed", self.seed, 0, MAX_SEED - SEED_STEP * MAX_CLIPS)
        if frame_rate(self.fps) > MAX_FPS:
            raise ValueError(f"`fps` must be {MAX_FPS} at most, got {self.fps}.")
        if self.max_sequence_length is not None:
            check_count("max_sequence_length", self.max_sequence_length, 1, MAX_TOKENS)
        if not isinstance(self.negative_prompt, str) or len(self.negative_prompt) > MAX_PROMPT:
            raise ValueError(f"`negative_prompt` must be a text of {MAX_PROMPT} characters at most.")

    @classmethod
    def of(cls, preset: str, **given: Any) -> "Settings":
        """Those of a preset, except what is `given` and not `None`."""
        check_choice("preset", preset, tuple(PRESETS))
        family = PRESETS[preset]
        names = ("num_frames", "num_inference_steps", "guidance_scale", "fps")
        published = {name: getattr(family, name) for name in names} | {"negative_prompt": NEGATIVE_PROMPT}
        return cls(preset=preset, **published | {name: value for name, value in given.items() if value is not None})


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
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the timeline of a film ({error}).") from error
        self._being_made = self.was_being_made
        self.num_done, self.num_frames = self._on_disk()

    @classmethod
    def create(
        cls, folder: Path, image: PIL.Image.Image, story: Story, settings: Settings, title: str = ""
    ) -> "Project":
        """A film that is not begun, in `folder`, which is there and empty.

        Raises:
            ValueError: for no prompt, or an empty first one.
        """
        specs = _specs(story)
        if not specs or not specs[0]["prompt"]:
            raise ValueError("A film needs a prompt for its first clip.")
        check_count("number of clips", len(specs), 1, MAX_CLIPS)
        with written_whole(folder / "start.png") as unfinished:
            image.save(unfinished, format="PNG")
        poster = image.copy()
        poster.thumbnail((POSTER_SIDE, POSTER_SIDE))
        with written_whole(folder / "poster.jpg") as unfinished:
            poster.save(unfinished, format="JPEG", quality=85)
        _write(folder, title.strip()[:MAX_TITLE], settings, specs, False)
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
            check_count("number of clips", len(self._clips) + len(specs), 1, MAX_CLIPS)
            self._save([*self._clips, *(self._entry(spec) for spec in specs)])

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
        _write(self.folder, self.title, self.settings, [entry.spec for entry in clips], self._being_made)
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


def _spec(prompt: str) -> dict[str, str]:
    prompt = " ".join(prompt.split())
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"A prompt may have {MAX_PROMPT} characters, this one has {len(prompt)}.")
    return {"prompt": prompt}


def _write(folder: Path, title: str, settings: Settings, specs: list[dict[str, Any]], being_made: bool) -> None:
    values = {
        "format": FORMAT,
        "title": title,
        "being_made": being_made,
        "settings": asdict(settings),
        "clips": specs,
    }
    with written_whole(folder / "film.json") as unfinished:
        unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
