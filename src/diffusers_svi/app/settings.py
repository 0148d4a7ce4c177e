"""`Settings`: how a film of the page is made, the same for all its clips."""

from dataclasses import dataclass
from typing import Any

from ..checks import check_choice, check_count, check_number
from ..color import check_color_match
from ..conditions.talk_pipeline import AUDIO_GUIDANCE
from ..noise import MAX_SEED
from ..presets import PRESETS, SEED_STEP
from ..prompts import NEGATIVE_PROMPT
from ..start_image import RESIZE_MODES
from ..video import frame_rate
from ..wan import MAX_TOKENS


# What a page takes: larger than any model makes today, and small enough for a server to survive it.
MAX_SIDE, MAX_FRAMES, MAX_STEPS, MAX_FPS, MAX_CLIPS = 2048, 1001, 200, 120, 10_000
MAX_PROMPT, MAX_TITLE = 4000, 120


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
        audio_guidance_scale (`float`, defaults to 5.0): Weight of the audio, where the film follows one.
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
    audio_guidance_scale: float = AUDIO_GUIDANCE
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
        check_number("audio_guidance_scale", self.audio_guidance_scale)
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
