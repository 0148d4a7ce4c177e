"""The steps of a clip beside its denoising: directed, taken up, decoded, trimmed, carried on."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline

from .chain import ChainState, kept_frames
from .clips import Clip, ClipSpec, one_per_clip
from .color import match_colors
from .directing import Direction, direct
from .fingerprints import made_with
from .inputs import Film, adapters_of
from .lora_layers import experts_of, restore_weights, set_weight, weights_of
from .pixels import from_uint8
from .resume import SEED, warn_of_changes
from .start_image import to_pixels
from .wan import decode_video


# Prompts whose embeddings are kept while a chain runs: few enough for an endless one.
KEPT_EMBEDDINGS = 64


def prompt_encoder(
    pipe: WanImageToVideoPipeline, film: Film, device: torch.device | None = None
) -> Callable[[str], torch.Tensor]:
    """From a prompt of `film` to its embeddings, `(1, tokens, text_dim)`; the newest ones are kept."""

    @lru_cache(maxsize=KEPT_EMBEDDINGS)
    @torch.no_grad()
    def encode(prompt: str) -> torch.Tensor:
        length = film.max_sequence_length
        return pipe.encode_prompt(prompt, None, False, max_sequence_length=length, device=device)[0]

    return encode


def film_parts(clips: Iterable[Clip]) -> Iterator[Any]:
    """What clips add to a film, and what the last one ends with."""
    clip = None
    for clip in clips:
        yield clip.frames
    if clip is not None and len(clip.tail):
        yield clip.tail


def clips_due(pipe: WanImageToVideoPipeline, film: Film) -> Generator[Direction, None, None]:
    """The clips of `film` that are still to be made, each directed when it is due, LoRAs at the weights it asks for.

    The weights are as they were once the iterator has ended, or is closed.

    Raises:
        ValueError: for a clip that cannot be made as it is asked for, and where the seeds end before the prompts.
    """
    state, first = film.state, film.state.num_clips
    if film.generator is not None and state.generator is not None:
        film.generator.set_state(state.generator)
    noise, has_experts = iter(film.noise), pipe.config.boundary_ratio is not None
    with ExitStack() as weights_before:
        for index, item in enumerate(one_per_clip(film.prompts, film.num_clips)):
            noise_options = next(noise, None)
            if noise_options is None:
                raise ValueError(f"`seeds` ended after {index} clips, but there is a prompt for clip {index}.")
            clip = direct(item, index, film, noise_options, has_experts, adapters_of(pipe))
            if clip.spec is not None and clip.spec.lora_weights is not None:
                for module in experts_of(pipe).values():
                    weights_before.callback(restore_weights, module, weights_of(module))
                _set_weights(pipe, clip.spec.lora_weights)
            if index >= first:
                yield clip
            elif index == first - 1 and not film.ignore_state_settings:
                warn_of_changes(state, _made_with(pipe, film, clip))


def _set_weights(pipe: WanImageToVideoPipeline, weights: Mapping[str, float | Mapping[str, float]]) -> None:
    for adapter, weight in weights.items():
        for name, module in experts_of(pipe).items():
            value = weight.get(name) if isinstance(weight, Mapping) else weight
            if value is not None:
                set_weight(module, adapter, value)


def picture_of(pipe: WanImageToVideoPipeline, name: str, spec: ClipSpec | None, film: Film) -> torch.Tensor | None:
    """A picture of a clip as the film begins with one, `(1, 3, height, width)` in [-1, 1]."""
    picture = getattr(spec, name, None)
    height, width = film.state.image.shape[-2:]
    return None if picture is None else to_pixels(pipe.video_processor, picture, height, width, film.resize_mode)


def taken_up(pipe: WanImageToVideoPipeline, state: ChainState, spec: ClipSpec | None, film: Film) -> ChainState:
    """`state` as the clip takes it up, with its cut or anchor."""
    cut, anchor = (picture_of(pipe, name, spec, film) for name in ("cut", "anchor"))
    state = state if cut is None else state.cut(cut)
    return state if anchor is None else replace(state, anchor=anchor)


def decoded(
    pipe: WanImageToVideoPipeline, latents: torch.Tensor, begun: ChainState, film: Film
) -> torch.Tensor | None:
    """Pixels in [-1, 1] of the clip that took up `begun`, colours matched; `None` where nobody needs them.

    Raises:
        FloatingPointError: if latents or pixels are not finite.
    """
    _check_finite(pipe, latents, begun.num_clips, film)
    if film.output_type == "latent" and not begun.conditioning.carried_frames:
        return None
    video = decode_video(pipe.vae, latents)
    pipe.maybe_free_model_hooks()
    _check_finite(pipe, video, begun.num_clips, film)
    return match_colors(video, begun.shown[0], film.settings["color_match"])


def trimmed(
    pipe: WanImageToVideoPipeline,
    latents: torch.Tensor,
    video: torch.Tensor | None,
    before: ChainState,
    begun: ChainState,
    film: Film,
) -> tuple[Any, Any]:
    """What the clip after the state `before`, taken up as `begun`, adds to the film, and its tail: see [`Clip`]."""
    if film.output_type == "latent":
        return latents[0], ()
    assert video is not None
    is_last = film.num_clips is not None and before.num_clips == film.num_clips - 1
    kept = kept_frames(begun.conditioning, begun.num_frames, not begun.continues, is_last)
    shown = video[:, :, kept]
    if not begun.continues and before.told_again.shape[2]:
        # After a cut nobody tells again what the clip before ended with.
        shown = torch.cat([from_uint8(before.told_again.to(video.device), video.dtype), shown], dim=2)
    frames, tail = (
        pipe.video_processor.postprocess_video(part, film.output_type)[0] for part in (shown, video[:, :, kept.stop :])
    )
    return frames, tail


def carried_on(
    pipe: WanImageToVideoPipeline,
    latents: torch.Tensor,
    video: torch.Tensor | None,
    begun: ChainState,
    film: Film,
    clip: Direction,
) -> ChainState:
    """The state after the clip that took up `begun`."""
    generator = None if film.generator is None else film.generator.get_state()
    return begun.after(latents, video, generator, _made_with(pipe, film, clip))


def finished(
    frames: Any, tail: Any, before: ChainState, after: ChainState, clip: Direction, recipe: Mapping[str, Any]
) -> Clip:
    """The clip between the states `before` and `after`."""
    prompt = None if clip.spec is None else clip.spec.prompt
    return Clip(before.num_clips, prompt, frames, before.start, after, tail, clip.spec, recipe)


def _made_with(pipe: WanImageToVideoPipeline, film: Film, clip: Direction) -> dict[str, str]:
    return made_with(pipe, film.settings) | ({} if clip.seed is None else {SEED: str(clip.seed)})


def _check_finite(pipe: WanImageToVideoPipeline, values: torch.Tensor, index: int, film: Film) -> None:
    """Raise a `FloatingPointError` if a clip, its latents or its pixels, is not to be gone on from."""
    if not values.isfinite().all():
        models = {name: getattr(pipe, name) for name in ("transformer", "transformer_2", "vae")}
        told = {name: film.settings[name] for name in ("num_inference_steps", "guidance_scale")}
        told |= {name: model.dtype for name, model in models.items() if model is not None}
        listed = ", ".join(f"{name}={value}" for name, value in told.items())
        raise FloatingPointError(
            f"Clip {index} came out with values that are not finite ({listed}). It is not handed on: the state "
            "after the clip before is still good. Float16 is the usual cause (use bfloat16), then LoRA weights "
            "or a guidance that are too high."
        )
