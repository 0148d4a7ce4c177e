"""What one clip of a film is made with: the film's options, and what its `ClipSpec` says."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from .clips import ClipSpec
from .inputs import Film
from .specs import check_clip, check_guidance, check_use


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One clip, as it is to be made.

    Args:
        spec (`ClipSpec`, *optional*): What it was asked for with, its seed included; `None` for embeddings.
        positive (`str` or `torch.Tensor`): Prompt, or its embeddings, `(1, sequence_length, dim)`.
        negative (`str` or `torch.Tensor`): Negative prompt, or its embeddings.
        options (`dict`): Arguments of the parent pipeline, without the embeddings.
        seed (`int`, *optional*): Of its noise, if it has one of its own.
    """

    spec: ClipSpec | None
    positive: str | torch.Tensor
    negative: str | torch.Tensor
    options: dict[str, Any]
    seed: int | None


def direct(
    item: Any,
    index: int,
    film: Film,
    noise: Mapping[str, Any],
    has_experts: bool,
    adapters: Mapping[str, Set[str]],
) -> Direction:
    """The `index`-th clip of `film`, asked for with `item`, whose noise comes from `noise` unless it has a seed.

    Raises:
        ValueError: as [`check_clip`] and [`check_use`].
    """
    options = {**film.clip_options, **noise}
    if isinstance(item, torch.Tensor):
        seed = _seed(options, film.generator)
        return Direction(spec=None, positive=item[None], negative=film.negative, options=options, seed=seed)
    spec = check_clip(item, index)
    check_use(spec, index, film.settings["noise"], has_experts, film.state.conditioning, adapters)
    names = ("guidance_scale", "guidance_scale_2")
    told = {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}
    scales = check_guidance(*({**options, **told}[name] for name in names))
    options.update(zip(names, scales, strict=True))
    if spec.seed is not None:
        options["generator"] = torch.Generator("cpu").manual_seed(spec.seed)
    seed = _seed(options, film.generator)
    return Direction(
        spec=replace(spec, seed=seed),
        positive=spec.prompt,
        negative=film.negative if spec.negative_prompt is None else spec.negative_prompt,
        options=options,
        seed=seed,
    )


def _seed(options: Mapping[str, Any], of_film: torch.Generator | None) -> int | None:
    generator = options.get("generator")
    return None if generator is None or generator is of_film else generator.initial_seed()
