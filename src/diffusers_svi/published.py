"""The published Wan models that SVI is for, as facts: what their parts are configured as, by short names.

Nothing here is downloaded. With these, models of the true size are built on the meta device, where they take no
memory: what a machine needs, and whether a LoRA fits, depends on shapes alone.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from .presets import WAN_21, WAN_21_720P, WAN_22, WAN_22_5B


# What MultiTalk's modules hear with, and where its repository has the weights as safetensors.
# source: MultiTalk's README
AUDIO_ENCODER, _SAFETENSORS = "TencentGameMate/chinese-wav2vec2-base", "refs/pr/1"
# source: scripts/convert_wan_to_diffusers.py of diffusers, "Wan2.2-I2V-14B-720p"
_A14B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
# source: the same, "Wan-I2V-14B-480p"; "Wan-I2V-14B-720p" has the same configuration
_14B = {**_A14B, "image_dim": 1280, "added_kv_proj_dim": 5120}
# source: the same, "Wan2.2-TI2V-5B"
_5B = {
    **_A14B,
    "num_attention_heads": 24,
    "in_channels": 48,
    "out_channels": 48,
    "ffn_dim": 14336,
    "num_layers": 30,
}
# source: the same, `vae22_diffusers_config`; its statistics are left out, as no shape depends on them
_VAE_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
# source: config.json of google/umt5-xxl, of which all Wan models use the encoder
_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# source: config.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, `vision_config`
_CLIP_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model as it was published.

    Args:
        name (`str`): On the Hub, in diffusers' layout.
        transformer (`dict`): Configuration of `WanTransformer3DModel`, of both experts where there are two.
        vae (`dict`): Of `AutoencoderKLWan`; diffusers' own defaults are those of Wan 2.1.
        text_encoder (`dict`): Of `UMT5Config`.
        image_encoder (`dict`, *optional*): Of `CLIPVisionConfig`, where the model has one.
        boundary_ratio (`float`, *optional*): Where the low-noise expert takes over, with two experts.
        expand_timesteps (`bool`): Whether clean latents are held in place of the clip's first.
        height, width, num_frames (`int`): Of the clips that it was made for.
    """

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=lambda: dict(_UMT5_XXL))
    image_encoder: dict[str, Any] | None = None
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    height: int = 480
    width: int = 832
    num_frames: int = 81


PUBLISHED = {
    "wan2.1-i2v-14b-480p": PublishedModel(name=WAN_21, transformer=_14B, image_encoder=_CLIP_H),
    "wan2.1-i2v-14b-720p": PublishedModel(
        name=WAN_21_720P, transformer=_14B, image_encoder=_CLIP_H, height=720, width=1280
    ),
    # source: its model_index.json
    "wan2.2-i2v-a14b": PublishedModel(name=WAN_22, transformer=_A14B, boundary_ratio=0.9),
    # source: its model card; clips of 121 frames at 704 x 1280
    "wan2.2-ti2v-5b": PublishedModel(
        name=WAN_22_5B,
        transformer=_5B,
        vae=_VAE_22,
        expand_timesteps=True,
        height=704,
        width=1280,
        num_frames=121,
    ),
}
# What the first of them is called where its resolution goes without saying.
ALIASES = {"wan2.1-i2v-14b": "wan2.1-i2v-14b-480p"}


def published_model(name: str | os.PathLike) -> PublishedModel | None:
    """The model of a short name, in any case, or of its name on the Hub; `None` for any other."""
    asked = os.fspath(name)
    short = asked.lower()
    found = PUBLISHED.get(ALIASES.get(short, short))
    return found or next((model for model in PUBLISHED.values() if model.name == asked), None)


def audio_encoder_revision(name: str) -> str:
    """Of which revision of a repository an audio encoder is read: "main", but for the published one."""
    return _SAFETENSORS if name == AUDIO_ENCODER else "main"
