"""What the clips of a film are asked for with: one `ClipSpec` a clip, checked."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from .checks import check_count, check_number
from .clips import ClipSpec
from .noise import MAX_SEED


# Fields that a call does not know what to do with yet.
_WITHOUT_EFFECT: tuple[str, ...] = ()


def check_clip(item: Any, index: int) -> ClipSpec:
    """`prompts[index]`, a string, a `ClipSpec` or a dictionary of its fields, as a `ClipSpec`.

    Raises:
        ValueError: if it is none of these or a field is not right; the message names it.
    """
    where = f"prompts[{index}]"
    if isinstance(item, Mapping):
        known = [field.name for field in fields(ClipSpec)]
        unknown = [name for name in item if name not in known]
        if unknown or "prompt" not in item:
            raise ValueError(
                f"`{where}` has {'no `prompt`' if not unknown else f'a field {unknown[0]!r}'}. The fields of a clip "
                f"are {', '.join(known)}; `prompt` must be among them."
            )
        spec = ClipSpec(**item)
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
    for name in _WITHOUT_EFFECT:
        if getattr(spec, name) is not None:
            raise ValueError(
                f"`{where}.{name}`={getattr(spec, name)!r} has no effect so far. Leave it out, or set it for the "
                "whole film."
            )
    return replace(spec, seed=seed, num_clips=num_clips)


def check_use(spec: ClipSpec, index: int, noise: str, has_experts: bool) -> None:
    """Raise a `ValueError` for a field that the film or the model has no use for.

    `noise` is the argument that the film's noise comes from.
    """
    if spec.seed is not None and noise == "latents":
        raise ValueError(
            f"`prompts[{index}].seed`={spec.seed}: the noise of every clip is given as `latents`. Leave one of them "
            "out."
        )
    if spec.guidance_scale_2 is not None and not has_experts:
        raise ValueError(
            f"`prompts[{index}].guidance_scale_2`={spec.guidance_scale_2}: this model has no second expert. Leave it "
            "out."
        )


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
            yield replace(spec, num_clips=1, seed=None if spec.seed is None else spec.seed + number)
            index += 1
