"""The options of a film, each with its default."""

from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .chain import ChainState
from .clips import ClipSpec
from .conditioning import Scheme


class FilmOptions(TypedDict, total=False):
    r"""
    The options of a film, of [`~SVIPipeline.__call__`] and [`~SVIPipeline.stream`] alike.

    Args:
        negative_prompt (`str`, *optional*):
            What the film should not show, in every clip. Only used with guidance. `NEGATIVE_PROMPT` is the authors'.
        num_clips (`int`, *optional*, defaults to `len(prompts)`):
            Clips of the film, those before `state` included.
        condition_frames (`int`, *optional*):
            Frames of a clip that condition the next: sets them on the scheme.
        conditioning (`Scheme`, *optional*):
            How a clip is conditioned on the one before. Defaults to the scheme the loaded SVI LoRA was trained for,
            without one to `PixelMotion(num_frames=1, padding="zeros")`, the plain chain.
        height, width (`int`, *optional*):
            Size of the film in pixels, multiples of 16 and of what the VAE and the transformer's patches ask for. By
            default of the aspect of `image` and the area of 480 x 832, or as in `state`.
        resize_mode (`str`, defaults to `"stretch"`):
            What happens to an `image` of another aspect: `"stretch"` distorts it, as the parent pipeline does, with a
            warning from 2% on; `"crop"` cuts off what does not fit; `"pad"` adds black.
        clip_resize (`str`, *optional*):
            What the image encoder of Wan 2.1 sees of a frame: `"crop"`, the square in the middle, as in diffusers, or
            `"squash"`, all of it, squeezed, as the authors have it. Defaults to what the loaded SVI LoRA was trained
            with (the published ones for Wan 2.1 with `"squash"`), without one to `"crop"`.
        num_frames (`int`, defaults to 81):
            Frames of a clip, 1 + 4n.
        num_inference_steps (`int`, defaults to 50):
            Denoising steps a clip.
        guidance_scale (`float`, defaults to 5.0):
            Weight of classifier-free guidance; 1 turns it off.
        guidance_scale_2 (`float`, *optional*, defaults to `guidance_scale`):
            Guidance of the low-noise expert, for models with two.
        generator (`torch.Generator`, *optional*):
            Source of the noise. Every clip draws afresh from it: the same noise in every clip accumulates artifacts.
        seeds (`Iterable[int]`, *optional*):
            One seed a clip, instead of `generator`. `itertools.count(0, 42)` is the authors' choice.
        latents (`torch.Tensor`, *optional*):
            The noise of every clip, `(num_clips, z_dim, latent_frames, latent_height, latent_width)`, instead of
            drawing it.
        prompt_embeds (`torch.Tensor` of shape `(clips, sequence_length, dim)`, *optional*):
            Text embeddings, one row a clip, instead of `prompts`.
        negative_prompt_embeds (`torch.Tensor` of shape `(1, sequence_length, dim)`, *optional*):
            Instead of `negative_prompt`.
        output_type (`str`, defaults to `"np"`):
            `"np"`, `"pt"` (both in [0, 1]), `"pil"`, or `"latent"`: the latents of every clip, overlaps included, for
            [`~SVIPipeline.decode_latents`].
        color_match (`str`, defaults to `"none"`):
            Take a shift of colours out of every clip: what takes its first frame to the one that it tells again (of a
            scheme with an anchor, to that) is applied to all of them, by a method of `match_colors`. For films
            without an SVI LoRA. Latents that are carried on are not corrected, only what is seen.
        attention_kwargs (`dict`, *optional*):
            Passed on to the attention processors.
        callback_on_step_end, callback_on_step_end_tensor_inputs:
            As in the parent, called at every step of every clip. `pipe.interrupt = True`, there or in another thread,
            ends the film with the last clip that was finished.
        callback_on_clip_end (`Callable`, *optional*):
            Called with the pipeline and every [`Clip`] when it is finished, before it is handed on.
        max_sequence_length (`int`, defaults to 512):
            Tokens of a prompt, 1 to 512.
        state (`ChainState`, *optional*):
            Go on from here: `prompts`, `seeds` and `num_clips` are still those of the whole film, of which the clips
            made before `state` are left out. What comes is, to the bit, what would have come without a stop. If the
            film was finished, `state.start` frames of it stay: its last clip is told again from there on.
        ignore_state_settings (`bool`, defaults to `False`):
            Do not warn where `state` was made with other models, LoRAs or settings.
        ignore_lora_conditioning (`bool`, defaults to `False`):
            Run a scheme other than the one the loaded LoRA was trained for.
        prompt (`str` or `Iterable[str]`, *optional*):
            Another name of `prompts`.
        num_videos_per_prompt (`int`, defaults to 1):
            A film is one video a call: anything else is refused.
    """

    negative_prompt: str | None
    num_clips: int | None
    condition_frames: int | None
    conditioning: Scheme | None
    height: int | None
    width: int | None
    resize_mode: str
    clip_resize: str | None
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    generator: torch.Generator | None
    seeds: Iterable[int] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    output_type: str
    color_match: str
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: list[str]
    callback_on_clip_end: Callable[..., Any] | None
    max_sequence_length: int
    state: ChainState | None
    ignore_state_settings: bool
    ignore_lora_conditioning: bool
    prompt: "str | ClipSpec | Iterable[str | ClipSpec] | None"
    num_videos_per_prompt: int


# What is not here defaults to `None`.
_DEFAULTS: dict[str, Any] = {
    "resize_mode": "stretch",
    "num_frames": 81,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "output_type": "np",
    "color_match": "none",
    "callback_on_step_end_tensor_inputs": ["latents"],
    "max_sequence_length": 512,
    "ignore_state_settings": False,
    "ignore_lora_conditioning": False,
    "num_videos_per_prompt": 1,
}
FILM_DEFAULTS: dict[str, Any] = {name: _DEFAULTS.get(name) for name in FilmOptions.__annotations__}
