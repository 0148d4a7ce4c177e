"""What a film needs: the parts of a clip, one after the other, in each way of offloading."""

import math
from dataclasses import dataclass, replace

import torch

from ..checks import check_choice
from ..lora_layers import EXPERTS
from ..wan import MAX_TOKENS
from .activations import (
    ATTENTION_COPIES,
    FLOAT,
    Tokens,
    block_peak,
    decode_peak,
    encode_peak,
    image_peak,
    text_peak,
)
from .model import FORMATS, ModelShapes, Weights
from .phases import Phase, Plan


# "group" as `--offload group` has it, a layer at a time; with streams, as on CUDA, the next one is there already.
OFFLOADS = ("none", "model", "group", "group+streams", "sequential")
_LAYERS_THERE = {"group": 1, "group+streams": 2, "sequential": 1}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How a film is made, as far as memory depends on it. Guidance does not: its passes are one after the other.

    Args:
        num_frames, height, width (`int`): Of a clip.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): Of all but the VAE, which is in float32.
        form (`str`, defaults to `"none"`): What the weights in the transformers' blocks are kept in, of `FORMATS`.
        offload (`str`, defaults to `"none"`): One of `OFFLOADS`.
        vae_tiling (`bool`, defaults to `False`): Encode and decode in tiles.
        lora_rank (`int`, defaults to 128): Of the LoRA beside each transformer; 0: none, or fused.
        attention (`str`, defaults to `"flash"`): One of `ATTENTION_COPIES`.

    Raises:
        ValueError: for a value that there is not.
    """

    num_frames: int
    height: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    form: str = "none"
    offload: str = "none"
    vae_tiling: bool = False
    lora_rank: int = 128
    attention: str = "flash"

    def __post_init__(self) -> None:
        check_choice("form", self.form, tuple(FORMATS))
        check_choice("offload", self.offload, OFFLOADS)
        check_choice("attention", self.attention, tuple(ATTENTION_COPIES))


def inference_memory(model: ModelShapes, clip: Clip) -> Plan:
    """What the clips of a film need: the same for every clip, however long the film is.

    With "none" all weights are on the GPU all the while. With "model" one model is there, and what the one before it
    left: accelerate's hooks take away the model that comes before in the pipeline's order, so the text encoder, or the
    image encoder, is still there while the start of a clip is encoded, and the VAE while it is denoised. A layer at a
    time, the largest layer of the model at work is there.
    """
    size = (clip.num_frames, clip.height, clip.width)
    tokens = tokens_of(model, *size, clip.dtype.itemsize)
    latents = 12 * FLOAT * math.prod(model.latent_shape(*size))
    encoder = "text_encoder" if "image_encoder" not in model.weights else "image_encoder"
    denoisers = [name for name in EXPERTS if name in model.weights]
    work = {
        "text": (("text_encoder",), text_peak(model.text_encoder, MAX_TOKENS, clip.dtype.itemsize)),
        "encode": (("vae", encoder), encode_peak(model.vae, *size, clip.vae_tiling)),
        **{
            f"denoise{'' if len(denoisers) == 1 else f' {number}'}": (
                (name, "vae"),
                block_peak(tokens, clip.lora_rank, clip.attention) + _unpacked(model.weights[name], clip),
            )
            for number, name in enumerate(denoisers, start=1)
        },
        "decode": (("vae",), decode_peak(model.vae, *size, clip.vae_tiling)),
    }
    if model.image_encoder is not None:
        image = ("image_encoder",), image_peak(model.image_encoder, clip.dtype.itemsize)
        work = {"text": work["text"], "image": image, **work}
    stored = {name: _stored(name, weights, model, clip) for name, weights in model.weights.items()}
    phases = tuple(
        Phase(name, {**_there(model, stored, there, clip), "activations": peak, "latents and prompts": latents})
        for name, (there, peak) in work.items()
    )
    video = 2 * 3 * clip.num_frames * clip.height * clip.width * FLOAT
    told = "weights, while they are loaded" if clip.offload == "none" else "weights"
    return Plan(phases, {told: sum(stored.values()), "frames of a clip": video})


def tokens_of(model: ModelShapes, num_frames: int, height: int, width: int, itemsize: int, batch: int = 1) -> Tokens:
    """What the transformer is run on for a clip, or a batch of them."""
    seen = 0
    if model.image_encoder is not None:
        seen = (model.image_encoder["image_size"] // model.image_encoder["patch_size"]) ** 2 + 1
    return Tokens(
        count=batch * model.num_tokens(num_frames, height, width),
        width=model.width,
        inner=model.transformer["ffn_dim"],
        heads=model.transformer["num_attention_heads"],
        context=batch * (MAX_TOKENS + seen),
        itemsize=itemsize,
        timesteps=model.expand_timesteps,
    )


def _stored(name: str, weights: Weights, model: ModelShapes, clip: Clip) -> int:
    """Bytes of a part's weights, and of the LoRA on it."""
    form = clip.form if name in EXPERTS or (clip.form == "quanto" and name == "text_encoder") else "none"
    lora = weights.with_lora(clip.lora_rank) if name in EXPERTS else 0
    return weights.num_bytes(model.dtype_of(name, clip.dtype), form) + lora


def _there(model: ModelShapes, stored: dict[str, int], there: tuple[str, ...], clip: Clip) -> dict[str, int]:
    """Bytes of weights on the GPU while the first of `there` is at work."""
    if clip.offload == "none":
        return stored
    if clip.offload == "model":
        return {name: stored[name] for name in there}
    layers = _LAYERS_THERE[clip.offload]
    at_work = there[0]
    largest = model.weights[at_work].largest * model.dtype_of(at_work, clip.dtype).itemsize
    return {"layers": layers * largest}


def _unpacked(weights: Weights, clip: Clip) -> int:
    """Bytes of the largest layer as it is computed with, where weights are kept in another form."""
    return 0 if clip.form == "none" else weights.largest_linear * clip.dtype.itemsize


def what_fits(model: ModelShapes, clip: Clip, gibibytes: float, forms: tuple[str, ...]) -> Clip | None:
    """The first way of making these clips that fits a card, in the order of what is lost: nothing by offloading, time
    by offloading more, then tiles, then a smaller form of the weights; `None` if none does."""
    for form in (clip.form, *(form for form in forms if form != clip.form)):
        for tiling in (clip.vae_tiling, True):
            for offload in ("none", "model", "group+streams", "group"):
                way = replace(clip, form=form, offload=offload, vae_tiling=tiling)
                if inference_memory(model, way).fits(gibibytes):
                    return way
    return None
