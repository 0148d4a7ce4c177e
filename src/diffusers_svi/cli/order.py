"""A film as it is asked for on the command line: what can be known to be wrong is told before anything is loaded."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import PIL.Image
from diffusers.utils import load_image

from ..chain import ChainState
from ..checks import check_choice, check_count, check_number
from ..clips import ClipSpec
from ..color import check_color_match
from ..conditioning import Scheme
from ..conditions.following import CALLED, Following
from ..conditions.talk_pipeline import AUDIO_GUIDANCE
from ..film import FilmWriter
from ..loading import load_pipeline
from ..lora_file import published_condition
from ..noise import MAX_SEED
from ..pipeline import SVIPipeline
from ..plan import scheme_of
from ..presets import PRESETS, SEED_STEP, Preset
from ..prompts import NEGATIVE_PROMPT, load_prompts
from ..source_video import open_source_video
from ..specs import check_clip, check_guidance
from ..start_image import RESIZE_MODES, read_image
from ..wan import MAX_TOKENS
from .options import loading_of


# Of `--prompts`: they are typed, or come through a pipe, while the film is made.
TYPED = "-"
# Of the LoRA that `load_pipeline` loads.
ADAPTER = "default_0"
FILE = ("codec", "crf", "pixel_format", "audio", "background")
# Those that are of use to some films alone, by what these follow.
FOLLOWING = {"audio": ("audio_guidance_scale", "audio_encoder"), "pose": ("pose", "loop_pose")}
# Those whose defaults are the pipeline's.
SETTINGS = ("height", "width", "resize_mode", "guidance_scale_2", "max_sequence_length", "color_match")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A film as it is asked for.

    Args:
        out (`Path`): Its file.
        fps (`float`): Frames a second.
        load (`partial`): Gives the pipeline that it is made with.
        settings (`dict`): Arguments of `SVIPipeline.stream` that hold for all of it.
        prompts (`list`, *optional*): Of all its clips, or if `journaled` of the new ones; `None` if they are typed.
        journaled (`bool`): Whether prompts are kept in a journal when their clips begin.
        num_clips (`int`, *optional*): Its clips, if that is known; see `of_state`.
        seeds (`Iterable[int]`): Of its clips, those included that are made already.
        image (`PIL.Image.Image`, *optional*): Its start image.
        video (`Path`, *optional*): What it begins with instead.
        file (`dict`): The other arguments of `FilmWriter`.
        finalize (`Path`, *optional*): Where it is written as an ordinary MP4 once it is done.
        follows (`Following`, *optional*): What it follows beside text.
        scheme (`Scheme`, *optional*): How its clips are chained, if that is known.
        goes_on (`str`): What to do after it was stopped.
    """

    out: Path
    fps: float
    load: partial[SVIPipeline]
    settings: Mapping[str, Any]
    prompts: list[ClipSpec] | None
    journaled: bool
    num_clips: int | None
    seeds: Iterable[int]
    image: PIL.Image.Image | None = None
    video: Path | None = None
    file: Mapping[str, Any] = field(default_factory=dict)
    finalize: Path | None = None
    follows: Following | None = None
    scheme: Scheme | None = None
    goes_on: str = "The same command goes on with it."

    def writer(self) -> FilmWriter:
        """Its file, taken up where it is there already."""
        return FilmWriter(self.out, self.fps, **self.file)

    def of_state(self, state: ChainState | None) -> "Order":
        """The same, of a film with this state: where it ends with what it follows, its clips are counted.

        That a film begins with a video is known with its state, and how clips are chained, with the model at last.

        Raises:
            ValueError: if more clips are asked for than there are.
        """
        scheme = self.scheme if state is None else state.conditioning
        if self.follows is None or self.follows.loops or scheme is None or (state is None and self.video is not None):
            return self
        num_frames = self.settings["num_frames"]
        return replace(
            self, num_clips=self.follows.num_clips(self.num_clips, self.prompts or [], scheme, num_frames, state)
        )


def order(options: Mapping[str, Any], told: list[ClipSpec] | None = None) -> Order:
    """The film that `options`, those of `generate`, ask for; where `told` gives its prompts, they do not.

    Raises:
        click.UsageError, ValueError: for what cannot be right.
    """
    family = PRESETS[options["preset"]]
    if told is not None and (options["prompt_list"] or options["prompt_file"]):
        raise click.UsageError("With `--recipe`, leave out `--prompt` and `--prompts`: it tells them.")
    if told is None and bool(options["prompt_list"]) == bool(options["prompt_file"]):
        raise click.UsageError("Give either `--prompt` or `--prompts`.")
    check_finalize(options["finalize"], options["out"])
    if options["image"] is not None and options["continue_from"] is not None:
        raise click.UsageError("Give either `--image` or `--continue_from`: a film begins with one of them.")
    fps = family.fps if options["fps"] is None else options["fps"]
    follows = followed(family, options, fps)
    settings = film_settings(family, options)
    if options["continue_from"] is not None:
        _check_video(options["continue_from"], settings, fps)
    has_lora = family.has_lora(options["lora"])
    prompts = told or read_prompts(options, settings, fps, [ADAPTER] if has_lora else [])
    loading = loading_of(options)
    if family.follows == "audio":
        loading["audio_encoder"] = options["audio_encoder"]
    ends = follows is not None and not follows.loops
    return Order(
        out=options["out"],
        fps=fps,
        load=partial(load_pipeline, family, **loading),
        settings=settings,
        prompts=prompts,
        journaled=prompts is None,
        num_clips=_num_clips(options["num_clips"], prompts, ends),
        seeds=itertools.count(check_count("--seed", options["seed"], 0, MAX_SEED), SEED_STEP),
        image=None if options["image"] is None else open_image(options["image"]),
        video=options["continue_from"],
        file={name: options[name] for name in FILE if options.get(name) is not None},
        finalize=options["finalize"],
        follows=follows,
        scheme=None if follows is None else scheme_of(family, options["lora"]),
    )


def followed(family: Preset, options: Mapping[str, Any], fps: float) -> Following | None:
    """What the film is to follow beside text.

    Raises:
        click.UsageError, ValueError: if it is missing, cannot be read, or is for films of another preset.
    """
    check_followed(family, options)
    if family.follows is None:
        return None
    path = options[family.follows]
    if path is None:
        raise click.UsageError(
            f"A film of `--preset {options['preset']}` follows {CALLED[family.follows]}: give `--{family.follows}`, "
            "its file."
        )
    own = {"loop_pose": options["loop_pose"]}
    if family.follows == "audio":
        scale = options["audio_guidance_scale"]
        own = {
            "audio_guidance_scale": check_number("--audio_guidance_scale", AUDIO_GUIDANCE if scale is None else scale)
        }
    return Following(name=family.follows, path=path, fps=fps, options=own).read()


def check_followed(family: Preset, options: Mapping[str, Any]) -> None:
    """Raise a `click.UsageError` for what films of another preset follow."""
    for name, own in FOLLOWING.items():
        given = [option for option in own if options[option] is not None and options[option] is not False]
        if given and family.follows != name:
            more = " A film follows one of the two, audio or poses." if family.follows is not None else ""
            raise click.UsageError(
                f"`--{given[0]}` is for films that follow {name}, and `--preset {options['preset']}` makes none: "
                f"leave it out, or give `--preset {_preset_for(name)}`.{more}"
            )
    of_lora = published_condition(options["lora_weight_name"] or options["lora"] or "")
    if of_lora not in (None, family.follows):
        raise click.UsageError(
            f"`--lora {options['lora']}` is for films that follow {of_lora}: give `--preset {_preset_for(of_lora)}`."
        )


def _preset_for(follows: str) -> str:
    return next(name for name, preset in PRESETS.items() if preset.follows == follows)


def _check_video(path: Path, settings: Mapping[str, Any], fps: float) -> None:
    """Raise a `ValueError` unless a film can go on from a video."""
    if fps != int(fps):
        raise ValueError(f"`--fps` {fps:g}: a video is brought to whole frames a second. Give a whole number.")
    try:
        open_source_video(path, settings.get("height"), settings.get("width"), int(fps))
    except ValueError as error:
        raise ValueError(f"`--continue_from` {str(path)!r} cannot be gone on from: {error}") from error


def read_prompts(
    options: Mapping[str, Any], settings: Mapping[str, Any], fps: float, adapters: list[str], first: int = 0
) -> list[ClipSpec] | None:
    """The clips that the options tell, the first of which is clip `first`; `None` if they are typed.

    `adapters` are the names of the LoRAs, in the order in which a schedule weighs them.
    """
    if options["prompt_file"] == TYPED:
        return None
    told: list[Any] = list(options["prompt_list"])
    if options["prompt_file"]:
        about = {"num_clips": options["num_clips"], "num_frames": settings["num_frames"], "fps": fps}
        told = load_prompts(options["prompt_file"], **about, adapters=adapters)
    return [check_clip(prompt, index) for index, prompt in enumerate(told, start=first)]


def _num_clips(num_clips: int | None, prompts: list[ClipSpec] | None, follows: bool) -> int | None:
    if num_clips is not None:
        check_count("--num_clips", num_clips, 1)
    if prompts is None:
        return num_clips
    told = sum(spec.num_clips for spec in prompts)
    if num_clips is not None and num_clips < told:
        raise click.UsageError(f"`--num_clips {num_clips}` leaves out some of the {told} clips that have a prompt.")
    return told if num_clips is None and not follows else num_clips


def film_settings(family: Preset, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `SVIPipeline.stream` for a member of the family; a `ValueError` for what no model can make."""
    settings = {name: options[name] for name in SETTINGS if options.get(name) is not None}
    settings["negative_prompt"] = NEGATIVE_PROMPT if options["negative_prompt"] is None else options["negative_prompt"]
    for name in ("num_frames", "num_inference_steps", "guidance_scale"):
        settings[name] = getattr(family, name) if options[name] is None else options[name]
    check_settings(settings)
    return settings


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for what no model can make; what this one cannot is told once it is loaded."""
    for name in ("num_frames", "num_inference_steps"):
        check_count(f"--{name}", settings[name], 1)
    if settings["num_frames"] % 4 != 1:
        raise ValueError(f"`--num_frames` must be 1 + 4n, such as 81, got {settings['num_frames']}.")
    for name in ("height", "width"):
        if settings.get(name) is not None and (settings[name] < 16 or settings[name] % 16):
            raise ValueError(f"`--{name}` must be a multiple of 16, got {settings[name]}.")
    check_guidance(settings["guidance_scale"], settings.get("guidance_scale_2"))
    check_count("--max_sequence_length", settings.get("max_sequence_length", MAX_TOKENS), 1, MAX_TOKENS)
    check_choice("--resize_mode", settings.get("resize_mode", RESIZE_MODES[0]), RESIZE_MODES)
    check_color_match(settings.get("color_match", "none"))


def check_finalize(path: Path | None, out: Path) -> None:
    """Raise a `ValueError` if the film could not be written there, which would be known after hours."""
    if path is None:
        return
    check_choice("suffix of `--finalize`", path.suffix, (out.suffix,))
    if path.resolve() == out.resolve():
        raise ValueError(f"`--finalize {path}` is the film itself, which would not grow any more: choose another.")
    if not path.parent.is_dir():
        raise ValueError(f"`--finalize {path}`: there is no folder {str(path.parent)!r}. Make it first.")


def open_image(image: str) -> PIL.Image.Image:
    """The picture of a file or an address, if a film can begin with it."""
    try:
        picture = load_image(image)
    except Exception as error:
        raise ValueError(f"`--image`={image!r} cannot be read: {error}") from error
    read_image(picture)
    return picture
