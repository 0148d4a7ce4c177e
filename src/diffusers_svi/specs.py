"""What the clips of a film are asked for with: one `ClipSpec` a clip, checked."""

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import PIL.Image
import torch

from .checks import check_count, check_number
from .clips import PICTURES, ClipSpec, once_told
from .conditioning import Scheme
from .lora_layers import EXPERTS
from .noise import MAX_SEED
from .start_image import read_image


def check_clip(item: Any, index: int) -> ClipSpec:
    """`prompts[index]`, a string, a `ClipSpec` or a dictionary of its fields, as a `ClipSpec`.

    Raises:
        ValueError: if it is none of these or a field is not right; the message names it.
    """
    where = f"prompts[{index}]"
    if isinstance(item, Mapping):
        try:
            spec = ClipSpec.from_dict(item)
        except ValueError as error:
            raise ValueError(f"`{where}`: {error}") from error
    else:
        spec = item if isinstance(item, ClipSpec) else ClipSpec(item)
    if not isinstance(spec.prompt, str):
        raise ValueError(f"`{where}` must be a string, got {type(spec.prompt).__name__}: {spec.prompt!r}.")
    if not spec.prompt.strip():
        raise ValueError(f"`{where}` is empty. Describe what happens in clip {index}, or leave it out.")
    if spec.negative_prompt is not None and not isinstance(spec.negative_prompt, str):
        raise ValueError(f"`{where}.negative_prompt` must be a string, got {spec.negative_prompt!r}.")
    for name in ("guidance_scale", "guidance_scale_2"):
        if getattr(spec, name) is not None:
            check_number(f"{where}.{name}", getattr(spec, name))
    num_clips = check_count(f"{where}.num_clips", spec.num_clips, 1)
    seed = None if spec.seed is None else check_count(f"{where}.seed", spec.seed, 0, MAX_SEED + 1 - num_clips)
    if spec.lora_weights is not None:
        _check_weights(f"{where}.lora_weights", spec.lora_weights)
    pictures: Any = {name: _picture(f"{where}.{name}", getattr(spec, name)) for name in PICTURES}
    if spec.cut is not None and spec.anchor is not None:
        raise ValueError(
            f"`{where}` has a `cut` and an `anchor`: the image of a cut is the anchor of what follows. Leave `anchor` "
            "out, or set it from the next clip on."
        )
    return replace(spec, seed=seed, num_clips=num_clips, **pictures)


def _picture(where: str, picture: Any) -> PIL.Image.Image | None:
    if picture is None:
        return None
    if not isinstance(picture, PIL.Image.Image):
        raise ValueError(f"`{where}` must be a `PIL.Image.Image`, got {type(picture).__name__}: {picture!r}.")
    try:
        return read_image(picture)  # type: ignore[return-value]
    except ValueError as error:
        raise ValueError(f"`{where}` cannot be taken: {error}") from error


def _check_weights(where: str, weights: Any) -> None:
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(name, str) for name in weights):
        raise ValueError(f'`{where}` must be weights by adapter name, such as {{"default_0": 0.8}}, got {weights!r}.')
    for name, weight in weights.items():
        experts = weight if isinstance(weight, Mapping) else {EXPERTS[0]: weight}
        if not experts or not set(experts) <= set(EXPERTS):
            raise ValueError(f"`{where}[{name!r}]` must be a number, or numbers for {EXPERTS}, got {weight!r}.")
        for value in experts.values():
            check_number(f"{where}[{name!r}]", value)


def check_use(
    spec: ClipSpec, index: int, noise: str, has_experts: bool, scheme: Scheme, adapters: Mapping[str, Set[str]]
) -> None:
    """Raise a `ValueError` for a field that the film or the model has no use for.

    Args:
        spec (`ClipSpec`): The clip.
        index (`int`): Its number.
        noise (`str`): The argument that the film's noise comes from.
        has_experts (`bool`): Whether the model has two.
        scheme (`Scheme`): The film's.
        adapters (`dict[str, set[str]]`): The LoRAs that are loaded, by the transformer they are on.
    """
    where = f"prompts[{index}]"
    if spec.seed is not None and noise == "latents":
        raise ValueError(
            f"`{where}.seed`={spec.seed}: the noise of every clip is given as `latents`. Leave one of them out."
        )
    if spec.guidance_scale_2 is not None and not has_experts:
        raise ValueError(
            f"`{where}.guidance_scale_2`={spec.guidance_scale_2}: this model has no second expert. Leave it out."
        )
    if spec.anchor is not None and not scheme.has_anchor:
        raise ValueError(
            f"`{where}.anchor`: `conditioning`={scheme} looks at no anchor. Leave it out, pass `cut` for a new shot, "
            "or take a scheme with a reference and a LoRA trained for it."
        )
    for name, weight in (spec.lora_weights or {}).items():
        wanted = set(weight) if isinstance(weight, Mapping) else set()
        loaded = {expert for expert, names in adapters.items() if name in names}
        if not loaded or not wanted <= loaded:
            there = {expert: sorted(names) for expert, names in adapters.items()}
            raise ValueError(
                f"`{where}.lora_weights` names the adapter {name!r}"
                f"{' of ' + ' and '.join(sorted(wanted - loaded)) if loaded else ''}, but there are {there}. Load the "
                "LoRA with this `adapter_name`, or name one of those."
            )


def check_guidance(guidance_scale: Any, guidance_scale_2: Any) -> tuple[float, float | None]:
    """Both weights as numbers that the parent follows in both experts."""
    first = check_number("guidance_scale", guidance_scale)
    if guidance_scale_2 is None:
        return first, None
    second = check_number("guidance_scale_2", guidance_scale_2)
    # The parent guides neither expert where the first weight is 1: the least above it has the same effect.
    return (math.nextafter(1, 2) if first <= 1 < second else first), second


def one_by_one(items: Iterable[Any]) -> Iterator[Any]:
    """Every item as often as it stands for clips, with a seed of its own for each; asked for when its first is due.

    One that is not right comes out as it is: it is refused when its turn comes, not when it is looked at ahead.
    """
    index = 0
    for item in items:
        try:
            spec = check_clip(item, index)
        except ValueError:
            yield item
            index += 1
            continue
        for number in range(spec.num_clips):
            yield replace(
                spec if number == 0 else once_told(spec),
                num_clips=1,
                seed=None if spec.seed is None else spec.seed + number,
                last_image=spec.last_image if number == spec.num_clips - 1 else None,
            )
            index += 1


def check_prompts(
    prompts: str | ClipSpec | Iterable[str | ClipSpec] | None,
    prompt_embeds: torch.Tensor | None,
    num_clips: int | None,
    noise: str,
    has_experts: bool,
    scheme: Scheme,
    adapters: Mapping[str, Set[str]],
) -> tuple[Iterable[Any], int | None]:
    """What to iterate over for the clips of a film, and the number of its clips if it is known.

    The last four are as in [`check_use`].
    """
    if (prompts is None) == (prompt_embeds is None):
        raise ValueError(
            "Pass either `prompts` or `prompt_embeds`: " + ("none" if prompts is None else "both") + " is given."
        )
    items: Iterable[Any]
    known = None
    if prompt_embeds is not None:
        items = check_embeddings("prompt_embeds", prompt_embeds)
        known = len(prompt_embeds)
    elif isinstance(prompts, (str, ClipSpec, Mapping, list, tuple)):
        given = [prompts] if isinstance(prompts, (str, ClipSpec, Mapping)) else prompts
        if not given:
            raise ValueError(f"`prompts` must be a string or a list of at least one string, got {prompts!r}.")
        specs = [check_clip(item, index) for index, item in enumerate(given)]
        for index, spec in enumerate(specs):
            check_use(spec, index, noise, has_experts, scheme, adapters)
        items, known = one_by_one(specs), sum(spec.num_clips for spec in specs)
    elif isinstance(prompts, Iterable) and not isinstance(prompts, (Set, bytes)):
        items = one_by_one(prompts)
    else:
        raise ValueError(f"`prompts` must be a string, a list of strings or an iterator of strings, got {prompts!r}.")
    if num_clips is not None:
        num_clips = check_count("num_clips", num_clips, 1)
    if known is not None:
        if num_clips is not None and num_clips < known:
            raise ValueError(
                f"`num_clips`={num_clips} leaves out some of the {known} prompts. Give no more prompts than clips."
            )
        num_clips = num_clips or known
    return items, num_clips


def check_embeddings(name: str, embeds: object) -> torch.Tensor:
    """`embeds`, if it is a tensor `(clips, sequence_length, dim)` of finite numbers."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or len(embeds) == 0:
        shape = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise ValueError(f"`{name}` must be a tensor (clips, sequence_length, dim), a row a clip, got {shape}.")
    if not embeds.isfinite().all():
        raise ValueError(f"`{name}` holds values that are not finite. Encode the prompts again.")
    return embeds


def check_negative(negative_embeds: torch.Tensor | None, num_clips: int | None) -> torch.Tensor | None:
    """`negative_prompt_embeds` as one row, `(1, sequence_length, dim)`.

    `encode_prompt` repeats the row for every prompt: rows that are all alike are one.
    """
    if negative_embeds is None:
        return None
    rows = check_embeddings("negative_prompt_embeds", negative_embeds)
    if len(rows) not in (1, num_clips) or not torch.equal(rows, rows[:1].expand_as(rows)):
        raise ValueError(
            f"`negative_prompt_embeds` must be one row for the whole film, or the same row for each of its clips, got "
            f"{tuple(rows.shape)}."
        )
    return rows[:1]
