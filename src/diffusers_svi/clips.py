"""A clip as it is asked for, [`ClipSpec`], and as it comes, [`Clip`]."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image
from diffusers import AutoencoderKLWan

from .chain import ChainState
from .conditioning import Scheme
from .data_uri import PREFIX, from_data_uri, to_data_uri
from .source_video import VideoLike, open_source_video


T = TypeVar("T")

# Fields of a `ClipSpec` that are pictures.
PICTURES = ("anchor", "last_image", "cut")


@dataclass(frozen=True)
class ClipSpec:
    """What one clip of a film is to show. What is left out is as in the call.

    Args:
        prompt (`str`): What happens in it.
        negative_prompt (`str`, *optional*): What it should not show.
        seed (`int`, *optional*):
            Of its noise, whatever the noise of the others comes from; with `num_clips` counted up from clip to clip.
        guidance_scale (`float`, *optional*): Weight of classifier-free guidance.
        guidance_scale_2 (`float`, *optional*): That of the low-noise expert, for models with two.
        num_clips (`int`, defaults to 1): Clips in a row that this stands for.
        lora_weights (`dict[str, float]`, *optional*):
            Weights of loaded LoRAs by adapter name, from this clip to the end of the film; adapters that are not named
            keep theirs. As in `set_adapters`, a weight may be a dictionary, `{"transformer": 1.0, "transformer_2":
            3.0}`.
        anchor (`PIL.Image.Image`, *optional*):
            A new reference or anchor, from this clip to the next that has one. Not for `PixelMotion` with the padding
            `"zeros"`, which has none.
        last_image (`PIL.Image.Image`, *optional*): What it is to end with; of several clips, the last.
        cut (`PIL.Image.Image`, *optional*):
            A new shot, which begins with this image, its anchor from now on; nothing is carried over.

    Pictures are brought to the film's size as its start image is.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    num_clips: int = 1
    lora_weights: Mapping[str, float | Mapping[str, float]] | None = None
    anchor: PIL.Image.Image | None = None
    last_image: PIL.Image.Image | None = None
    cut: PIL.Image.Image | None = None

    def to_dict(self) -> dict[str, Any]:
        """What is set, as plain values; pictures as PNG in a data URI. `from_dict` is its inverse."""
        told = {of.name: getattr(self, of.name) for of in fields(self)}
        told = {name: value for name, value in told.items() if value is not None and (name, value) != ("num_clips", 1)}
        return {name: to_data_uri(value) if name in PICTURES else value for name, value in told.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: str | os.PathLike | None = None) -> "ClipSpec":
        """The clip that `to_dict` told.

        Args:
            values (`dict`): Fields by name; pictures as `PIL.Image.Image`, data URI, or path of a file in `folder`.
            folder (*optional*): Where pictures that are told by their paths are looked for.

        Raises:
            ValueError: if it is no dictionary or lacks a `prompt`, for fields that there are not, and for a picture
                that cannot be read.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a clip is told by a dictionary of its fields, got {values!r}.")
        known = [of.name for of in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown or "prompt" not in values:
            raise ValueError(
                f"a clip has {'no `prompt`' if not unknown else f'no field {unknown[0]!r}'}. Its fields are "
                f"{', '.join(known)}; `prompt` must be among them."
            )
        told = {name: value for name, value in values.items() if value is not None or name == "prompt"}
        pictures = {name: _picture(name, told[name], folder) for name in PICTURES if name in told}
        return cls(**{**told, **pictures})


def _picture(name: str, value: Any, folder: str | os.PathLike | None) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if value.startswith("data:"):
            return from_data_uri(value)
        if folder is None:
            raise ValueError(f"{value!r} is no picture: pass a `PIL.Image.Image`, or a text with {PREFIX!r}.")
        image = PIL.Image.open(Path(folder) / value)
        image.load()
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"`{name}` cannot be read: {error}") from error
    return image


@dataclass(frozen=True)
class Clip:
    """One clip of a film, as `SVIPipeline.stream` yields it.

    Args:
        index (`int`): Its number, from 0; -1 for a video that the film begins with.
        prompt (`str`, *optional*): Its prompt; `None` when embeddings were given.
        frames (`np.ndarray`, `torch.Tensor` or `list[PIL.Image.Image]`):
            What it adds to the film, in the `output_type` asked for: its frames from `start` on. Overlaps are cut off
            already. With `output_type="latent"` all its latents, `(z_dim, latent_frames, latent_height,
            latent_width)`.
        start (`int`): The film frame it begins with.
        state (`ChainState`): What the next clip needs. Save it to be able to go on from here.
        tail (as `frames`):
            Its last frames, where the next clip is to tell them again: they belong to the film if it ends here. Empty
            where there are none, and for a last clip that is known to be the last: `frames` has them then.
        spec (`ClipSpec`, *optional*): What it was asked for with, its seed included; `None` for embeddings.
        recipe (`dict`): How the film is made, in plain values: see [`film_recipe`].
    """

    index: int
    prompt: str | None
    frames: Any
    start: int
    state: ChainState
    tail: Any = ()
    spec: ClipSpec | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_video(
        cls,
        video: VideoLike,
        conditioning: Scheme,
        num_frames: int = 81,
        *,
        vae: AutoencoderKLWan | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: int | None = None,
    ) -> "Clip":
        """A video as what a film begins with: for `FilmWriter.append`, before the first clip.

        Arguments and errors are those of [`ChainState.from_video`]. Its frames are read one after the other.
        """
        source = open_source_video(video, height, width, fps)
        state = ChainState.from_video(source, conditioning, num_frames, vae=vae)
        return cls(-1, None, source.frames(), start=0, state=state)


def one_per_clip(prompts: Iterable[T], num_clips: int | None) -> Iterator[T | None]:
    """The prompts of a chain, one a clip; the last one holds when there are more clips than prompts.

    With `num_clips=None` it ends with `prompts`, which may be endless. `None` where there never was a prompt. Where
    the last one holds on, what happens once does not happen again: its seed, its pictures, its weights.
    """
    if num_clips is None:
        yield from prompts
        return
    last = None
    for last in itertools.islice(prompts, num_clips):
        yield last
        num_clips -= 1
    if isinstance(last, ClipSpec):
        yield from itertools.repeat(replace(once_told(last), seed=None, last_image=None), num_clips)
    else:
        yield from itertools.repeat(last, num_clips)


def once_told(spec: ClipSpec) -> ClipSpec:
    """`spec` for the clips after its first: what it changed is changed already."""
    return replace(spec, lora_weights=None, anchor=None, cut=None)
