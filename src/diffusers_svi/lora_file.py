"""Files of SVI LoRAs, and the scheme each was trained for."""

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from .checks import check_choice
from .conditioning import HeldLatents, LatentMotion, PixelMotion, Scheme, scheme_from_dict
from .files import written_whole
from .lora_keys import original_name, some_of, to_diffusers
from .pixels import CLIP_RESIZES
from .weights_file import fetch_weights


logger = logging.get_logger(__name__)

# The keys under which scheme, expert, what CLIP was shown and what films follow stand in a safetensors file.
CONDITIONING_KEY = "svi_conditioning"
EXPERT_KEY = "svi_expert"
CLIP_RESIZE_KEY = "svi_clip_resize"
CONDITION_KEY = "svi_condition"
EXPERTS = ("high", "low")

# A published repository that is for one scheme: Pro for TI2V-5B (Impulse2000/svi-model-pro-5b).
_REPOSITORIES = ((r"svi[-_]model[-_]pro[-_]5b", HeldLatents(num_latents=1)),)
# Published files, by name: the authors' (vita-video-gen/svi-model) and the half-precision copies made for ComfyUI
# (Kijai/WanVideo_comfy). None of them carries metadata.
_PUBLISHED = (
    (r"svi.*(pro.*5b|5b.*pro)", HeldLatents(num_latents=1)),
    (r"svi[-_]film", PixelMotion(num_frames=5, padding="zeros")),
    (r"svi[-_]shot", PixelMotion(num_frames=1, padding="reference")),
    (r"svi[-_]tom", PixelMotion(num_frames=1, padding="zeros")),
    (r"svi[-_](talk|dance)", PixelMotion(num_frames=1, padding="reference")),
    (r"svi.*wan2\.?2.*v2\.0_pro|svi_v2_pro.*wan2\.2", LatentMotion(num_latents=1)),
    (r"svi_wan2\.1.*v2\.0", PixelMotion(num_frames=5, padding="reference")),
    (r"svi_wan2\.2.*v2\.0", PixelMotion(num_frames=1, padding="reference")),
)
# Experts, as the authors, the few-step LoRAs and the copies made for ComfyUI name them.
_EXPERT = re.compile(
    r"(?<![a-z])(?P<expert>high|low)_noise(?![a-z])"
    r"|a14b(?:-4steps-lora)?_(?:[ti]2v_)?(?P<copy>high|low)_(?:lora|lightning|lightx2v|fp16|bf16)"
)
# Members whose films follow something beside text, and the modules for it that may lie in the file of the LoRA.
_CONDITIONS = (
    (r"svi[-_]talk", "audio", r"(?:^|\.)(?:audio_proj|audio_cross_attn|norm_x)\."),
    (r"svi[-_]dance", "pose", r"(?:^|\.)(?:dwpose_embedding|randomref_embedding_pose)\."),
)
# What such films are made with.
PIPELINE_NAMES = {"audio": "SVITalkPipeline", "pose": "SVIDancePipeline"}

# What the published LoRAs train, in every block.
TARGET_MODULES = [
    *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read by [`read_lora`].

    Args:
        state_dict (`dict[str, torch.Tensor]`): Weights under diffusers' names, such as
            `transformer.blocks.0.attn1.to_q.lora_A.weight`.
        adapter_metadata (`dict`, *optional*): diffusers' own record of the LoRA configuration.
        conditioning (`Scheme`, *optional*): The scheme it was trained for, if the file or its name says so.
        expert (`str`, *optional*): "high" or "low" for LoRAs of one expert of Wan 2.2 A14B.
        clip_resize (`str`, *optional*): What the image encoder saw in training, one of `CLIP_RESIZES`.
        name (`str`): What to call the file in messages.
        source (`dict`): Where it came from: `name`, `weight_name`, `subfolder`, `revision` and the file's `sha256`,
            as far as there are any.
        condition (`str`, *optional*): What its films follow beside text, "audio" or "pose".
        modules (`dict[str, torch.Tensor]`): Weights of the modules for that, under the file's own names.
    """

    state_dict: dict[str, torch.Tensor]
    adapter_metadata: dict | None
    conditioning: Scheme | None
    expert: str | None
    clip_resize: str | None
    name: str
    source: dict[str, str]
    condition: str | None = None
    modules: dict[str, torch.Tensor] = field(default_factory=dict)


def read_lora(
    source: str | os.PathLike | dict[str, torch.Tensor], weight_name: str | None = None, **hub_options: Any
) -> LoraFile:
    """Read a LoRA from the Hub, a folder, a safetensors file or a state dict; never from a pickled file.

    Args:
        source: Hub repository, folder, file, or state dict.
        weight_name (`str`, *optional*): The file in the repository or folder.
        hub_options: `subfolder`, `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`, `proxies`.

    Raises:
        ValueError: if the file cannot be read, is pickled, holds no LoRA or a damaged one, or needs modules that are
            not supported; for an option that is not one of those above, and `weight_name` where `source` is no folder.
    """
    fetched = fetch_weights(source, weight_name, what="LoRA", **hub_options)
    name, state_dict, adapter_metadata = fetched.name, fetched.state_dict, fetched.adapter_metadata
    state_dict, modules = without_modules(state_dict)
    if adapter_metadata is not None and any(key.endswith(".alpha") for key in state_dict):
        raise ValueError(
            f"The LoRA {name!r} gives its alpha twice, among the weights and as `{LORA_ADAPTER_METADATA_KEY}` in the "
            "metadata: take out the one that is wrong."
        )
    state_dict, left_out = to_diffusers(name, state_dict)
    if isinstance(source, dict):
        # Layers take tensors over as they are, and later change them: the caller's must be others.
        state_dict = {key: value.detach().clone() for key, value in state_dict.items()}
    if left_out:
        logger.warning(f"Of the LoRA {name!r}, this is left out, as no adapter can change it: {some_of(left_out)}.")
    if adapter_metadata is not None:
        _check_config(name, adapter_metadata, state_dict)
    conditioning, expert = _published(name)
    # source: the authors' code shows CLIP all of a frame, in training as well
    clip_resize = None if conditioning is None else "squash"
    metadata = fetched.metadata
    if CONDITIONING_KEY in metadata:
        conditioning = _scheme(name, metadata[CONDITIONING_KEY])
        clip_resize = metadata.get(CLIP_RESIZE_KEY)
        if clip_resize is not None:
            check_choice(CLIP_RESIZE_KEY, clip_resize, CLIP_RESIZES)
    if EXPERT_KEY in metadata:
        expert = metadata[EXPERT_KEY]
        check_choice(EXPERT_KEY, expert, EXPERTS)
    origin, condition = fetched.source, _condition(name, modules)
    if CONDITION_KEY in metadata:
        condition = metadata[CONDITION_KEY]
        check_choice(CONDITION_KEY, condition, tuple(PIPELINE_NAMES))
    return LoraFile(state_dict, adapter_metadata, conditioning, expert, clip_resize, name, origin, condition, modules)


def check_condition(lora: LoraFile, condition: str | None = None) -> None:
    """Raise a `ValueError` where the films of `lora` follow something beside text that is not `condition`."""
    if lora.condition not in (None, condition):
        raise ValueError(
            f"The LoRA {lora.name!r} is for films that follow {lora.condition}, for which a model has modules of "
            f"its own: load it with `{PIPELINE_NAMES[lora.condition]}`."
        )


def check_scheme(conditioning: Scheme | None) -> None:
    """Raise a `ValueError` unless `conditioning` is a scheme or `None`."""
    if conditioning is not None and not isinstance(conditioning, Scheme):
        raise ValueError(
            "`conditioning` must be the scheme a LoRA was trained for, `PixelMotion(...)`, `LatentMotion(...)` or "
            f"`HeldLatents(...)`, got {conditioning!r}."
        )


def lora_metadata(
    conditioning: Scheme | None,
    expert: str | None = None,
    clip_resize: str | None = None,
    condition: str | None = None,
) -> dict[str, str]:
    """What to write into the metadata of a LoRA file so that [`read_lora`] finds what is known of it.

    Raises:
        ValueError: if `conditioning` is no scheme, `expert` neither "high" nor "low", `clip_resize` neither "crop"
            nor "squash", or `condition` neither "audio" nor "pose".
    """
    check_scheme(conditioning)
    metadata = {} if conditioning is None else {CONDITIONING_KEY: json.dumps(conditioning.to_dict())}
    if expert is not None:
        check_choice("expert", expert, EXPERTS)
        metadata[EXPERT_KEY] = expert
    if clip_resize is not None:
        check_choice("clip_resize", clip_resize, CLIP_RESIZES)
        metadata[CLIP_RESIZE_KEY] = clip_resize
    if condition is not None:
        check_choice("condition", condition, tuple(PIPELINE_NAMES))
        metadata[CONDITION_KEY] = condition
    return metadata


def save_lora(
    file: str | os.PathLike,
    state_dict: dict[str, torch.Tensor],
    config: PeftConfig,
    conditioning: Scheme,
    expert: str | None = None,
    layout: str = "diffusers",
    clip_resize: str | None = None,
    condition: str | None = None,
    modules: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a LoRA with its scheme to a safetensors file that [`read_lora`] reads.

    Args:
        file: Where to.
        state_dict (`dict[str, torch.Tensor]`):
            Weights as `peft.get_peft_model_state_dict` gives them, such as `blocks.0.attn1.to_q.lora_A.weight`.
        config (`PeftConfig`): What they were trained with.
        conditioning (`Scheme`): The scheme it was trained for.
        expert (`str`, *optional*): "high" or "low", for one expert of Wan 2.2 A14B.
        layout (`str`, defaults to `"diffusers"`):
            Or "original": the names of the original code after `diffusion_model.`, as ComfyUI and the authors' loader
            read them. They apply no alpha, so it is multiplied into the weights.
        clip_resize (`str`, *optional*): What the image encoder saw in training, "crop" or "squash".
        condition (`str`, *optional*): What its films follow beside text, "audio" or "pose".
        modules (`dict[str, torch.Tensor]`, *optional*):
            The modules for that, under the names of the published files, to lie in the same file.

    Raises:
        ValueError: for another `layout`.
    """
    check_choice("layout", layout, ("diffusers", "original"))
    modules = modules or {}
    if layout == "diffusers":
        state_dict = {f"transformer.{key}": value for key, value in state_dict.items()}
        write_lora(file, {**state_dict, **modules}, conditioning, expert, config.to_dict(), clip_resize, condition)
    else:
        state_dict = {
            f"diffusion_model.{original_name(key)}": value * _scale(config, key) if ".lora_B." in key else value
            for key, value in state_dict.items()
        }
        modules = {f"diffusion_model.{key}": value for key, value in modules.items()}
        write_lora(file, {**state_dict, **modules}, conditioning, expert, clip_resize=clip_resize, condition=condition)


def write_lora(
    file: str | os.PathLike,
    state_dict: dict[str, torch.Tensor],
    conditioning: Scheme | None,
    expert: str | None,
    adapter_metadata: dict[str, Any] | None = None,
    clip_resize: str | None = None,
    condition: str | None = None,
) -> None:
    """Write weights under the names they have, with what is known of scheme, expert and LoRA configuration.

    Args:
        file: Where to.
        state_dict (`dict[str, torch.Tensor]`): Weights, such as `transformer.blocks.0.attn1.to_q.lora_A.weight`.
        conditioning (`Scheme`, *optional*), expert, clip_resize, condition (`str`, *optional*):
            As in [`lora_metadata`].
        adapter_metadata (`dict`, *optional*): What `PeftConfig.to_dict` gives.
    """
    metadata = {"format": "pt", **lora_metadata(conditioning, expert, clip_resize, condition)}
    if adapter_metadata is not None:
        adapter_metadata = {f"transformer.{key}": value for key, value in adapter_metadata.items()}
        # The sets of a `PeftConfig` are the one thing in it that JSON does not know.
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(adapter_metadata, default=sorted, sort_keys=True)
    with written_whole(file) as unfinished:
        tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
        save_file(tensors, unfinished, metadata=metadata)


def _scale(config: PeftConfig, key: str) -> float:
    """What peft multiplies the update of a layer by."""
    layer = key.split(".lora_")[0]
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def published_scheme(name: str) -> Scheme | None:
    """The scheme of a LoRA that was published, known by the name of its repository or file."""
    return _published(name)[0]


def published_condition(name: str) -> str | None:
    """What films of a LoRA that was published follow beside text, known by the name of its file."""
    return _condition(name, {})


def _published(name: str) -> tuple[Scheme | None, str | None]:
    name = name.lower()
    stem = os.path.basename(name)
    schemes: list[Scheme] = [scheme for pattern, scheme in _REPOSITORIES if re.search(pattern, name)]
    schemes += [scheme for pattern, scheme in _PUBLISHED if re.search(pattern, stem)]
    expert = _EXPERT.search(stem)
    return next(iter(schemes), None), (expert["expert"] or expert["copy"]) if expert else None


def without_modules(
    state_dict: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a file holds of a LoRA, and what it holds of modules for audio or poses."""
    of_modules = [
        key for key in state_dict if ".lora_" not in key and any(re.search(keys, key) for *_, keys in _CONDITIONS)
    ]
    modules = {key: state_dict[key] for key in of_modules}
    return {key: value for key, value in state_dict.items() if key not in modules}, modules


def _condition(name: str, modules: dict[str, torch.Tensor]) -> str | None:
    stem = os.path.basename(name).lower()
    for pattern, condition, keys in _CONDITIONS:
        if re.search(pattern, stem) or any(re.search(keys, key) for key in modules):
            return condition
    return None


def _scheme(name: str, text: str) -> Scheme:
    try:
        return scheme_from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The metadata of the LoRA {name!r} has a `{CONDITIONING_KEY}` that describes no scheme: {error} Write it "
            "with `save_lora_weights`."
        ) from error


def _check_config(name: str, adapter_metadata: Any, state_dict: dict[str, torch.Tensor]) -> None:
    """Raise a `ValueError` unless the LoRA configuration in the metadata is that of the weights."""
    try:
        of_transformer = (item for item in adapter_metadata.items() if item[0].startswith("transformer."))
        config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in of_transformer})
        scales = [config.lora_alpha, *config.alpha_pattern.values()]
        fits = all(0 < scale < math.inf for scale in scales) and not config.use_dora
        for key, value in state_dict.items():
            layer, side = key.removeprefix("transformer.").split(".lora_")
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
            fits = fits and (side != "A.weight" or value.shape[0] == rank)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ValueError(
            f"The metadata of the LoRA {name!r} has a `{LORA_ADAPTER_METADATA_KEY}` that is no LoRA configuration of "
            f"`transformer`: {error} Save it again with `save_lora_weights`."
        ) from error
    if not fits:
        raise ValueError(
            f"The metadata of the LoRA {name!r} has a `{LORA_ADAPTER_METADATA_KEY}` that is not that of the weights: "
            "another rank, an alpha that is not above 0, or DoRA. Save it again with `save_lora_weights`."
        )
