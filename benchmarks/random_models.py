"""Image-to-video models of Wan's form with random weights: what they cost depends on shapes alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from contestants import SVI_TINY
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from diffusers_svi import SVIPipeline
from diffusers_svi.published import PUBLISHED


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the parts of a model are configured as, and the clips that it makes: `height`, `width`, `num_frames`."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    image_encoder: dict[str, Any] | None = None
    height: int
    width: int
    num_frames: int

    @property
    def clip(self) -> dict[str, int]:
        return {"height": self.height, "width": self.width, "num_frames": self.num_frames}


def _small(heads: int, layers: int, base_dim: int, height: int, width: int, **others: Any) -> Model:
    inner = 128 * heads
    return Model(
        transformer={
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "in_channels": 36,
            "out_channels": 16,
            "text_dim": inner,
            "ffn_dim": 4 * inner,
            "num_layers": layers,
            **others.pop("transformer", {}),
        },
        vae={"base_dim": base_dim},
        text_encoder={
            "vocab_size": 64,
            "d_model": inner,
            "d_kv": 64,
            "d_ff": 2 * inner,
            "num_layers": 2,
            "num_heads": 2 * heads,
        },
        height=height,
        width=width,
        num_frames=9,
        **others,
    )


_WAN_14B = PUBLISHED["wan2.1-i2v-14b-480p"]
_IMAGE_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "projection_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
MODELS = {
    # For tests; with an image encoder, as Wan 2.1 has one.
    "tiny": _small(
        1, 1, 4, 32, 32, transformer={"image_dim": 16, "added_kv_proj_dim": 128}, image_encoder=_IMAGE_ENCODER
    ),
    # For the CPU; below about 100 pixels a side its convolutions are slow ones.
    "small": _small(1, 2, 4, 112, 112),
    "medium": _small(2, 4, 6, 112, 144),
    "large": _small(4, 4, 8, 128, 160),
    # source: scripts/convert_wan_to_diffusers.py of diffusers, "Wan-T2V-1.3B"; here with the input of image-to-video
    "1.3b": Model(
        transformer={
            **_WAN_14B.transformer,
            "num_attention_heads": 12,
            "ffn_dim": 8960,
            "num_layers": 30,
            "image_dim": None,
            "added_kv_proj_dim": None,
        },
        vae=_WAN_14B.vae,
        text_encoder=_WAN_14B.text_encoder,
        height=480,
        width=832,
        num_frames=81,
    ),
    "14b": Model(
        transformer=_WAN_14B.transformer,
        vae=_WAN_14B.vae,
        text_encoder=_WAN_14B.text_encoder,
        image_encoder=_WAN_14B.image_encoder,
        height=_WAN_14B.height,
        width=_WAN_14B.width,
        num_frames=_WAN_14B.num_frames,
    ),
}


def random_pipeline(model: Model, device: str, dtype: torch.dtype, seed: int) -> SVIPipeline:
    """A pipeline whose weights are in `dtype`, the VAE's in float32, with svi-tiny's tokenizer."""
    torch.manual_seed(seed)
    image_encoder = image_processor = None
    with torch.device(device), _as_default(dtype):
        transformer = WanTransformer3DModel(**model.transformer)
        text_encoder = UMT5EncoderModel(UMT5Config(**model.text_encoder))
        if model.image_encoder is not None:
            image_encoder = CLIPVisionModel(CLIPVisionConfig(**model.image_encoder))
            side = model.image_encoder["image_size"]
            image_processor = CLIPImageProcessor(size=side, crop_size=side)
    with torch.device(device):
        vae = AutoencoderKLWan(**model.vae)
    # As when it is loaded.
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    parts = {"transformer": transformer, "text_encoder": text_encoder, "image_encoder": image_encoder, "vae": vae}
    for part in parts.values():
        if part is not None:
            part.eval().requires_grad_(False)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipe = SVIPipeline(
        **parts,
        tokenizer=AutoTokenizer.from_pretrained(SVI_TINY, subfolder="tokenizer"),
        image_processor=image_processor,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _as_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
