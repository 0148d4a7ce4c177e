"""The same film twice: by `SVIPipeline`, and by diffusers' pipeline called clip by clip, as people do it by hand."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import WanImageToVideoPipeline

from diffusers_svi import PixelMotion, SVIPipeline


def by_svi(pipe: SVIPipeline, image: PIL.Image.Image, num_clips: int, **options: Any) -> Iterator[np.ndarray]:
    """What the clips add to a film whose noise is that of `by_hand`, `(frames, height, width, 3)` in [0, 1]."""
    prompts = options.pop("prompt")
    scheme = PixelMotion(1)
    for clip in pipe.stream(
        image=image, prompts=prompts, num_clips=num_clips, conditioning=scheme, seeds=itertools.count(), **options
    ):
        yield clip.frames


def by_hand(pipe: SVIPipeline, image: PIL.Image.Image, num_clips: int, **options: Any) -> Iterator[np.ndarray]:
    """Clips by the parent of the same components, each of the last frame of the one before, which it tells again."""
    parent = WanImageToVideoPipeline(**pipe.components)
    parent.set_progress_bar_config(disable=True)
    for index in range(num_clips):
        generator = torch.Generator().manual_seed(index)
        frames = parent(image=image, generator=generator, output_type="np", **options).frames[0]
        image = PIL.Image.fromarray((frames[-1] * 255).round().astype(np.uint8))
        yield frames


SIDES = {"SVIPipeline": by_svi, "by hand": by_hand}


def largest_difference(made: dict[str, np.ndarray]) -> float:
    """Between the clips of both sides, of values in [0, 1]: by hand one has a last frame that the film has once."""
    kept = made["SVIPipeline"]
    return float(np.abs(made["by hand"][: len(kept)] - kept).max())
