"""A clip as it is asked for, [`ClipSpec`], and as it comes, [`Clip`]."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch

from .chain import ChainState


T = TypeVar("T")


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
        lora_weights (`dict[str, float]`, *optional*): Weights of loaded LoRAs by adapter name, from this clip on.
        anchor (`PIL.Image.Image`, *optional*): A new reference or anchor, from this clip on.
        last_image (`PIL.Image.Image`, *optional*): What it is to end with.
        cut (`PIL.Image.Image`, *optional*): A new shot that begins with this image; nothing is carried over.

    A call refuses a clip that sets one of the last four: they have no effect so far.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    num_clips: int = 1
    lora_weights: dict[str, float | dict[str, float]] | None = None
    anchor: PIL.Image.Image | None = None
    last_image: PIL.Image.Image | None = None
    cut: PIL.Image.Image | None = None

    @classmethod
    def from_dict(cls, values: Any, folder: Any = None) -> "ClipSpec":
        """Stand-in."""
        names = [field.name for field in fields(cls)]
        values = dict(values)
        for name in values:
            if name not in names:
                raise ValueError(f"`{name}` is no field of a clip: those are {', '.join(names)}.")
        if "prompt" not in values:
            raise ValueError("there is no `prompt`.")
        for name in ("anchor", "last_image", "cut"):
            if values.get(name) is not None:
                if folder is None or not isinstance(values[name], str):
                    raise ValueError(f"`{name}`={values[name]!r} is a path, and there is no folder.")
                try:
                    values[name] = PIL.Image.open(Path(folder) / values[name])
                except (OSError, ValueError) as error:
                    raise ValueError(f"`{name}`={values[name]!r} cannot be read as an image: {error}") from error
        return cls(**values)


@dataclass(frozen=True)
class Clip:
    """One clip of a film, as `SVIPipeline.stream` yields it.

    Args:
        index (`int`): Its number, from 0.
        prompt (`str`, *optional*): Its prompt; `None` when embeddings were given.
        frames (`np.ndarray`, `torch.Tensor` or `list[PIL.Image.Image]`):
            The frames it adds to the film, in the `output_type` asked for: overlaps are cut off already. With
            `output_type="latent"` all its latents, `(z_dim, latent_frames, latent_height, latent_width)`.
        start (`int`): The film frame it begins with.
        state (`ChainState`): What the next clip needs. Save it to be able to go on from here.
    """

    index: int
    prompt: str | None
    frames: np.ndarray | torch.Tensor | list[PIL.Image.Image]
    start: int
    state: ChainState


def one_per_clip(prompts: Iterable[T], num_clips: int | None) -> Iterator[T | None]:
    """The prompts of a chain, one a clip; the last one holds when there are more clips than prompts.

    With `num_clips=None` it ends with `prompts`, which may be endless. `None` where there never was a prompt. Where
    the last one holds on, its seed does not.
    """
    if num_clips is None:
        yield from prompts
        return
    last = None
    for last in itertools.islice(prompts, num_clips):
        yield last
        num_clips -= 1
    held = replace(last, seed=None) if isinstance(last, ClipSpec) else last
    yield from itertools.repeat(held, num_clips)


def with_last(items: Iterable[T], num_items: int | None, look_ahead: bool) -> Iterator[tuple[T, bool]]:
    """Every item, and whether it is the last one.

    Where `num_items`, their number, is not known, the item after is asked for first; without `look_ahead` nobody then
    knows, and no item is the last.
    """
    if num_items is not None or not look_ahead:
        yield from ((item, number == num_items) for number, item in enumerate(items, start=1))
        return
    ahead = iter(items)
    held = list(itertools.islice(ahead, 1))
    for following in ahead:
        yield held.pop(), False
        held.append(following)
    yield from ((item, True) for item in held)
