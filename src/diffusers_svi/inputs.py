"""What a film is asked for with, all of it checked here, before anything is computed."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import logging

from .caches import check_caches
from .chain import ChainState
from .checks import check_choice, check_count
from .clips import ClipSpec
from .color import check_color_match
from .conditioning import PixelMotion, Scheme
from .fingerprints import made_with
from .lora_layers import adjustable, experts_of
from .noise import clip_noise
from .options import FILM_DEFAULTS, FilmOptions
from .parallel import check_context_parallel
from .pixels import CLIP_RESIZES
from .resume import first_state, refuse_changes
from .specs import check_guidance, check_negative, check_prompts
from .start_image import RESIZE_MODES, film_size, read_image, to_pixels
from .wan import MAX_TOKENS, num_latent_frames


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "pt", "pil", "latent")


@dataclass(frozen=True, kw_only=True)
class Film:
    """A film as it was asked for, once everything about it is known to be right.

    Args:
        prompts (`Iterable`): One `ClipSpec` a clip, or rows of embeddings; what came out of an iterator is unchecked.
        num_clips (`int`, *optional*): How many, if it is known.
        noise (`Iterable[dict]`): For every clip the argument of the parent pipeline that makes its noise.
        state (`ChainState`): What the first clip to be made begins with.
        output_type (`str`): One of `OUTPUT_TYPES`.
        negative (`str` or `torch.Tensor`): Negative prompt, or its embeddings.
        max_sequence_length (`int`): Tokens of a prompt.
        clip_resize (`str`): What the image encoder sees of a frame, one of `CLIP_RESIZES`.
        resize_mode (`str`): How pictures are brought to the film's size, one of `RESIZE_MODES`.
        callback_on_clip_end (`Callable`, *optional*): Called with the pipeline and every clip.
        generator (`torch.Generator`, *optional*): The one that `noise` draws from.
        settings (`dict`): What the chain will say that it was made with, beside models and LoRAs.
        ignore_state_settings (`bool`): Whether that may differ from what `state` was made with.
        clip_options (`dict`): Arguments of the parent pipeline that are the same for every clip.
    """

    prompts: Iterable[Any]
    num_clips: int | None
    noise: Iterable[dict[str, Any]]
    state: ChainState
    output_type: str
    negative: str | torch.Tensor
    max_sequence_length: int
    clip_resize: str
    resize_mode: str
    callback_on_clip_end: Callable[..., Any] | None
    generator: torch.Generator | None
    settings: dict[str, Any]
    ignore_state_settings: bool
    clip_options: dict[str, Any]

    @property
    def shape(self) -> tuple[int | None, int, int]:
        """Frames, if the number of clips is known, height and width of what is still to be made; cuts make it more."""
        whole, state = None, self.state
        if self.num_clips is not None:
            missing = max(self.num_clips - state.num_clips, 0)
            whole = state.conditioning.film_length(missing, state.num_frames)
            whole -= state.conditioning.overlap if state.continues and state.conditioning.trims == "head" else 0
        return whole, *state.image.shape[-2:]


def check_film(
    pipe: WanImageToVideoPipeline,
    trained: Scheme | None,
    trained_clip_resize: str | None,
    image: PipelineImageInput | None,
    prompts: str | ClipSpec | Iterable[str | ClipSpec] | None,
    options: FilmOptions,
) -> Film:
    """The film that `pipe` is asked for. `trained` is the scheme of the loaded LoRA, and so is what CLIP then saw.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for everything that cannot be right; the message names argument, value and remedy.
    """
    unknown = options.keys() - FILM_DEFAULTS.keys()
    if unknown:
        raise TypeError(f"A film has no option {', '.join(sorted(unknown))}. There are: {', '.join(FILM_DEFAULTS)}.")
    given = {**FILM_DEFAULTS, **options}
    check_kinds(given)
    if given["prompt"] is not None:
        if prompts is not None:
            raise ValueError("`prompt` and `prompts` are the same; pass one of them, got both.")
        prompts = given["prompt"]
    state: ChainState | None = given["state"]
    picture = None if image is None else read_image(image)
    if picture is None and state is None:
        raise ValueError("`image`, the start image, is missing. Without one, pass the `state` of a chain.")
    height, width = check_size(pipe, given["height"], given["width"], picture, state)
    num_frames = check_num_frames(pipe, given["num_frames"])
    scheme = choose_scheme(
        given["conditioning"], given["condition_frames"], state, trained, given["ignore_lora_conditioning"]
    )
    # Noise levels are told apart by the timesteps of training.
    most_steps = pipe.scheduler.config.num_train_timesteps
    num_steps = check_count("num_inference_steps", given["num_inference_steps"], 1, most_steps)
    max_sequence_length = check_count("max_sequence_length", given["max_sequence_length"], 1, MAX_TOKENS)
    guidance_scale, guidance_scale_2 = check_guidance(given["guidance_scale"], given["guidance_scale_2"])
    scheme.check(num_frames, pipe.config.expand_timesteps)
    source = next((name for name in ("generator", "seeds", "latents") if given[name] is not None), "drawn")
    check_caches(experts_of(pipe).values(), guidance_scale)
    has_experts = pipe.config.boundary_ratio is not None
    adapters = adapters_of(pipe)
    items, num_clips = check_prompts(
        prompts, given["prompt_embeds"], given["num_clips"], source, has_experts, scheme, adapters
    )
    shape = latent_shape(pipe, num_frames, height, width)
    check_context_parallel(experts_of(pipe).values(), shape)
    noise = clip_noise(given["generator"], given["seeds"], given["latents"], num_clips, shape)
    tensor_inputs = given["callback_on_step_end_tensor_inputs"]
    if isinstance(given["callback_on_step_end"], (PipelineCallback, MultiPipelineCallbacks)):
        tensor_inputs = given["callback_on_step_end"].tensor_inputs
    pixels = None
    if picture is not None:
        pixels = to_pixels(pipe.video_processor, picture, height, width, given["resize_mode"])
    state = first_state(pixels, state, scheme, num_frames, height, width, shape, given["generator"])
    pipe.check_inputs(
        prompt="" if given["prompt_embeds"] is None else None,
        negative_prompt=given["negative_prompt"],
        image=state.image,
        height=height,
        width=width,
        prompt_embeds=given["prompt_embeds"],
        negative_prompt_embeds=given["negative_prompt_embeds"],
        callback_on_step_end_tensor_inputs=tensor_inputs,
        guidance_scale_2=guidance_scale_2,
    )
    if pipe.vae.dtype != torch.float32 and scheme.carried_frames > 0 and num_clips != 1:
        logger.warning(
            f"The VAE is in {pipe.vae.dtype}: over many clips its rounding errors add up. Load it with "
            "`torch_dtype=torch.float32`."
        )
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        # The model counts the tokens of the image from there on.
        if given[name] is not None and pipe.image_encoder is not None and given[name].shape[1] != MAX_TOKENS:
            raise ValueError(
                f"`{name}` must have {MAX_TOKENS} tokens for a model with an image encoder, got "
                f"{tuple(given[name].shape)}. Encode with `max_sequence_length={MAX_TOKENS}`, or fill up with zeros."
            )
    negative_embeds = check_negative(given["negative_prompt_embeds"], num_clips)
    negative = given["negative_prompt"] or "" if negative_embeds is None else negative_embeds
    clip_resize = given["clip_resize"] or trained_clip_resize or CLIP_RESIZES[0]
    settings = {
        "height": height,
        "width": width,
        "resize_mode": given["resize_mode"],
        "num_frames": num_frames,
        "noise": source,
        "num_inference_steps": num_steps,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "negative_prompt": negative,
        "max_sequence_length": max_sequence_length,
        "clip_resize": clip_resize,
        "color_match": given["color_match"],
    }
    refuse_changes(state, made_with(pipe, settings))
    return Film(
        prompts=items,
        num_clips=num_clips,
        noise=noise,
        state=state,
        output_type=given["output_type"],
        negative=negative,
        max_sequence_length=max_sequence_length,
        clip_resize=clip_resize,
        resize_mode=given["resize_mode"],
        callback_on_clip_end=given["callback_on_clip_end"],
        generator=given["generator"],
        settings=settings,
        ignore_state_settings=given["ignore_state_settings"],
        clip_options={
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "num_inference_steps": num_steps,
            "guidance_scale": guidance_scale,
            "guidance_scale_2": guidance_scale_2,
            "attention_kwargs": given["attention_kwargs"],
            "callback_on_step_end": given["callback_on_step_end"],
            "callback_on_step_end_tensor_inputs": tensor_inputs,
        },
    )


def check_kinds(given: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for an option that is of no use as it is, whatever the others are."""
    if not isinstance(given["num_videos_per_prompt"], numbers.Integral) or given["num_videos_per_prompt"] != 1:
        raise ValueError(
            f"`num_videos_per_prompt`={given['num_videos_per_prompt']!r}: a call makes one film, clip by clip. Call "
            "again with another `generator` for another."
        )
    check_choice("resize_mode", given["resize_mode"], RESIZE_MODES)
    check_choice("output_type", given["output_type"], OUTPUT_TYPES)
    check_color_match(given["color_match"])
    if given["output_type"] == "latent" and given["color_match"] != "none":
        raise ValueError(
            f"`color_match`={given['color_match']!r} changes pixels, but `output_type`='latent' gives none. Leave one "
            "of them out."
        )
    if given["clip_resize"] is not None:
        check_choice("clip_resize", given["clip_resize"], CLIP_RESIZES)
    callbacks = Callable, PipelineCallback, MultiPipelineCallbacks
    kinds: dict[str, tuple[Any, str]] = {
        "state": (ChainState, "a `ChainState`; use `ChainState.load` for a file"),
        "negative_prompt": (str, "one string for the whole film"),
        "attention_kwargs": (dict, "a dictionary"),
        "latents": (torch.Tensor, "a tensor, the noise of every clip"),
        "callback_on_step_end": (callbacks, "a function or one of diffusers' callbacks"),
        "callback_on_clip_end": (Callable, "a function of the pipeline and a `Clip`"),
        "callback_on_step_end_tensor_inputs": ((list, tuple), 'a list of names, such as ["latents"]'),
        "ignore_lora_conditioning": (bool, "`True` or `False`"),
        "ignore_state_settings": (bool, "`True` or `False`"),
    }
    for name, (kind, wanted) in kinds.items():
        if given[name] is not FILM_DEFAULTS[name] and not isinstance(given[name], kind):
            raise ValueError(f"`{name}` must be {wanted}, got {type(given[name]).__name__}: {given[name]!r}.")


def choose_scheme(
    conditioning: Scheme | None,
    condition_frames: int | None,
    state: ChainState | None,
    trained: Scheme | None,
    ignore_lora_conditioning: bool,
) -> Scheme:
    """The scheme to use, once it agrees with that of the LoRA, `trained`, and the state's."""
    if conditioning is not None and not isinstance(conditioning, Scheme):
        raise ValueError(
            "`conditioning` must be `PixelMotion(...)`, `LatentMotion(...)` or `HeldLatents(...)`, got "
            f"{conditioning!r}."
        )
    scheme = conditioning or (state.conditioning if state is not None else None) or trained or PixelMotion()
    if condition_frames is not None:
        scheme = scheme.with_frames(condition_frames)
    if state is not None and scheme != state.conditioning:
        raise ValueError(
            f"`state` comes from a chain with `conditioning`={state.conditioning}, but {scheme} is asked for. "
            "Leave `conditioning` and `condition_frames` out to go on with it."
        )
    if trained is not None and scheme != trained and not ignore_lora_conditioning:
        raise ValueError(
            f"`conditioning`={scheme} is asked for, but the loaded LoRA was trained for {trained}: with another "
            "scheme it does not work. Leave `conditioning` and `condition_frames` out to use the LoRA's, or pass "
            "`ignore_lora_conditioning=True` if you mean it."
        )
    return scheme


def check_size(
    pipe: WanImageToVideoPipeline,
    height: Any,
    width: Any,
    picture: PIL.Image.Image | torch.Tensor | None,
    state: ChainState | None,
) -> tuple[int, int]:
    """Height and width of the film, if the model can make it; those of `state` or `picture` where not given."""
    config = _transformer_config(pipe)
    patch_size = config.patch_size
    sizes = {"height": (height, patch_size[1]), "width": (width, patch_size[2])}
    multiples = []
    for name, (value, patch) in sizes.items():
        multiple = math.lcm(16, pipe.vae_scale_factor_spatial * patch)
        multiples.append(multiple)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < multiple or value % multiple:
            is_size = isinstance(value, numbers.Real) and math.isfinite(value)
            nearest = max(round(float(value) / multiple), 1) * multiple if is_size else multiple
            raise ValueError(
                f"`{name}` must be a multiple of {multiple} for this model, got {value!r}. The nearest is {nearest}."
            )
        most = config.rope_max_seq_len * pipe.vae_scale_factor_spatial * patch
        if value > most:
            raise ValueError(f"`{name}` must be at most {most}: this model's positions end there, got {value!r}.")
    height, width = (None if value is None else int(value) for value, _ in sizes.values())
    if state is not None:
        saved = state.image.shape[-2:]
        return (saved[0] if height is None else height), (saved[1] if width is None else width)
    assert picture is not None
    return film_size(picture, height, width, (multiples[0], multiples[1]))


def _transformer_config(pipe: WanImageToVideoPipeline) -> Any:
    """Of either expert: they are of one form."""
    return (pipe.transformer if pipe.transformer is not None else pipe.transformer_2).config


def check_num_frames(pipe: WanImageToVideoPipeline, num_frames: Any) -> int:
    """Frames of a clip, if the VAE can encode so many."""
    factor = pipe.vae_scale_factor_temporal
    config = _transformer_config(pipe)
    if not isinstance(num_frames, numbers.Integral) or num_frames < 1 or num_frames % factor != 1:
        raise ValueError(
            f"`num_frames` must be {factor}n + 1, such as {5 * factor + 1} or {20 * factor + 1}, got {num_frames!r}."
        )
    most = 1 + factor * (config.rope_max_seq_len * config.patch_size[0] - 1)
    if num_frames > most:
        raise ValueError(
            f"`num_frames` must be at most {most}, as far as this model's positions go, got {num_frames}."
        )
    return int(num_frames)


def latent_shape(pipe: WanImageToVideoPipeline, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """`(z_dim, latent_frames, latent_height, latent_width)` of a clip."""
    spatial = pipe.vae_scale_factor_spatial
    return pipe.vae.config.z_dim, num_latent_frames(num_frames), height // spatial, width // spatial


def adapters_of(pipe: WanImageToVideoPipeline) -> dict[str, set[str]]:
    """The LoRAs whose weights can be set, by the transformer they are on."""
    return {name: adjustable(module) for name, module in experts_of(pipe).items()}
