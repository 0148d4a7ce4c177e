"""The noise of a film: where that of each clip comes from."""

import itertools
from collections.abc import Iterable, Mapping, Set, Sized
from typing import Any

import torch
from diffusers.utils import logging

from .checks import check_count


logger = logging.get_logger(__name__)

# What a generator takes.
MAX_SEED = 2**64 - 1


def clip_noise(
    generator: torch.Generator | None,
    seeds: Iterable[int] | None,
    latents: torch.Tensor | None,
    num_clips: int | None,
    shape: tuple[int, int, int, int],
) -> Iterable[dict[str, Any]]:
    """The arguments of the parent pipeline that make the noise, one dictionary a clip.

    `generator` is drawn from again for every clip, `seeds` make a fresh generator for each, `latents` are the noise.
    `shape` is that of a clip's latents.
    """
    sources = {"generator": generator, "seeds": seeds, "latents": latents}
    given = [f"`{name}`" for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"The noise comes from one source, but {' and '.join(given)} are given.")
    if latents is not None:
        wanted = (num_clips, *shape)
        if tuple(latents.shape) != wanted:
            raise ValueError(f"`latents` must hold the noise of every clip, {wanted}, got {tuple(latents.shape)}.")
        if not latents.isfinite().all():
            raise ValueError("`latents` holds values that are not finite. Draw them with `torch.randn`.")
        return ({"latents": clip[None]} for clip in latents)
    if seeds is not None:
        _check_seeds(seeds, num_clips)
        checked = (check_count(f"seeds[{index}]", seed, 0, MAX_SEED) for index, seed in enumerate(seeds))
        return ({"generator": torch.Generator("cpu").manual_seed(seed)} for seed in checked)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"`generator` must be one `torch.Generator` for the whole film, got {generator!r}.")
    return itertools.repeat({"generator": generator})


def _check_seeds(seeds: Iterable[int], num_clips: int | None) -> None:
    if isinstance(seeds, (str, bytes, Mapping, Set)) or not isinstance(seeds, Iterable):
        raise ValueError(f"`seeds` must hold one seed a clip, as a list or an iterator, got {seeds!r}.")
    if isinstance(seeds, Sized):
        for index, seed in enumerate(seeds):
            check_count(f"seeds[{index}]", seed, 0, MAX_SEED)
        if num_clips is not None and len(seeds) < num_clips:
            raise ValueError(f"`seeds` must hold one seed for each of the {num_clips} clips, got {len(seeds)}.")
        if len(set(seeds)) < len(seeds):
            logger.warning("`seeds` repeats itself: the same noise in several clips accumulates artifacts.")
