"""The shapes of a model's parts, and the memory of their weights in every form that they are kept in."""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from ..checks import check_choice
from ..conditions.converters import TRANSFORMERS
from ..lora_file import TARGET_MODULES
from ..published import PublishedModel, published_model


# Bytes a weight in linear layers of a transformer's blocks, by the form it is kept in; `None`: as it is computed in.
# source: gguf's GGML_QUANT_SIZES, bytes over weights of a block; bitsandbytes' NF4 with a float32 scale for 64 weights
FORMATS: dict[str, float | None] = {
    "none": None,
    "fp8": 1.0,
    "quanto": 1.0,
    "Q8_0": 34 / 32,
    "Q4_0": 18 / 32,
    "Q4_K": 144 / 256,
    "8bit": 1.0,
    "int8": 1.0,
    "4bit": 1 / 2 + 4 / 64,
}
_PUBLISHED_KINDS = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae")


@dataclass(frozen=True)
class Weights:
    """The weights of a part of a model, counted.

    Args:
        count (`int`): All of them.
        in_blocks (`int`): Those of the linear layers in its blocks, which can be kept in a smaller form.
        in_float32 (`int`): Those that diffusers keeps in float32, whatever the rest is in.
        largest (`int`): Those of the largest layer: what is on the device when a layer at a time is.
        largest_linear (`int`): Those of the largest linear layer in its blocks.
        lora_sides (`int`): Inputs and outputs of the layers that an SVI LoRA is for, together.
    """

    count: int
    in_blocks: int
    in_float32: int
    largest: int
    largest_linear: int
    lora_sides: int

    def num_bytes(self, dtype: torch.dtype, form: str = "none") -> int:
        """Bytes of them all, computed in `dtype`, with those in blocks kept in one of `FORMATS`."""
        check_choice("form", form, tuple(FORMATS))
        each = FORMATS[form]
        in_float32 = self.in_float32 * (4 - dtype.itemsize)
        small = 0 if each is None else round(self.in_blocks * (dtype.itemsize - each))
        return self.count * dtype.itemsize + in_float32 - small

    def lora_count(self, rank: int) -> int:
        """Weights of an SVI LoRA: two matrices a layer, `rank` x inputs and outputs x `rank`."""
        return rank * self.lora_sides

    def with_lora(self, rank: int) -> int:
        """Bytes of a LoRA of this rank where there is one, in bfloat16 or float16."""
        return 2 * self.lora_count(rank)


@dataclass(frozen=True)
class ModelShapes:
    """A model, as far as memory depends on it.

    Args:
        name (`str`): What to call it.
        weights (`dict[str, Weights]`): Of its parts, by their names in the pipeline.
        transformer, vae, text_encoder (`dict`): Their configurations.
        image_encoder (`dict`, *optional*): Where there is one.
        expand_timesteps (`bool`): Whether every token has a timestep of its own (TI2V-5B).
        size (`tuple[int, int, int]`): Frames, height and width of the clips that it was made for.
        boundary (`float`, *optional*): The noise level at which the low-noise expert takes over, of two.
    """

    name: str
    weights: Mapping[str, Weights]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    image_encoder: Mapping[str, Any] | None
    expand_timesteps: bool
    size: tuple[int, int, int]
    boundary: float | None = None

    @property
    def width(self) -> int:
        """Channels of the transformer's tokens."""
        return int(self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"])

    @property
    def step(self) -> int:
        """Of which height and width are multiples, in pixels."""
        return int(self.vae["scale_factor_spatial"] * self.transformer["patch_size"][1])

    def num_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of the weights of every part as they are loaded, in `dtype`, but the VAE in float32."""
        return {name: weights.num_bytes(self.dtype_of(name, dtype)) for name, weights in self.weights.items()}

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`(z_dim, latent_frames, latent_height, latent_width)` of a clip."""
        scale, z_dim = self.vae["scale_factor_spatial"], self.vae["z_dim"]
        return z_dim, (num_frames - 1) // self.vae["scale_factor_temporal"] + 1, height // scale, width // scale

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of a clip in the transformer."""
        patch = self.transformer["patch_size"]
        _, frames, rows, columns = self.latent_shape(num_frames, height, width)
        return (frames // patch[0]) * (rows // patch[1]) * (columns // patch[2])

    @staticmethod
    def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
        """What a part is in when the model is loaded in `dtype`."""
        return torch.float32 if name == "vae" else dtype


def model_shapes(model: str | os.PathLike, follows: str | None = None) -> ModelShapes:
    """The shapes of a model: by a short name of [`PUBLISHED`] or its Hub name without looking anywhere.

    Args:
        model: Short name; Hub name, of which the configuration is fetched; or folder.
        follows (`str`, *optional*): "audio" or "pose", for the published modules on it, where it has none.

    Raises:
        OSError, ValueError: if its configuration cannot be read.
    """
    known = None if os.path.isdir(model) else published_model(model)
    if known is not None:
        parts, name = _published_parts(known), known.name
        expand_timesteps, size = known.expand_timesteps, (known.num_frames, known.height, known.width)
        boundary = known.boundary_ratio
    else:
        index = DiffusionPipeline.load_config(model)
        parts, name = _loaded_parts(index, model), os.fspath(model)
        expand_timesteps, size = bool(index.get("expand_timesteps")), (81, 480, 832)
        boundary = index.get("boundary_ratio")
    if follows is not None and "transformer" in parts:
        parts["transformer"] = _with_modules(parts["transformer"], TRANSFORMERS[follows])
    return shapes_of(name, parts, expand_timesteps, size, boundary)


def _with_modules(transformer: Any, kind: type[Any]) -> torch.nn.Module:
    """The same with modules of the published sizes, on the meta device."""
    if isinstance(transformer, kind):
        return transformer
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        return kind(**config)


def shapes_of(
    name: str,
    parts: Mapping[str, torch.nn.Module],
    expand_timesteps: bool,
    size: tuple[int, int, int],
    boundary: float | None = None,
) -> ModelShapes:
    """The shapes of a model whose parts are at hand, under their names in the pipeline; the others as in
    [`ModelShapes`].

    Raises:
        ValueError: if a part is missing without which nothing can be planned.
    """
    for needed in ("transformer", "vae", "text_encoder"):
        if needed not in parts and (needed != "transformer" or "transformer_2" not in parts):
            raise ValueError(f"`model`={name!r} has no `{needed}`: it is no model of Wan's kind in diffusers' layout.")
    configs = {part: _config_of(module) for part, module in parts.items()}
    transformer = configs.get("transformer", configs.get("transformer_2", {}))
    return ModelShapes(
        name=name,
        weights={part: count_weights(module) for part, module in parts.items()},
        transformer=transformer,
        vae=configs["vae"],
        text_encoder=configs["text_encoder"],
        image_encoder=configs.get("image_encoder"),
        expand_timesteps=expand_timesteps,
        size=size,
        boundary=boundary,
    )


def _config_of(module: torch.nn.Module) -> dict[str, Any]:
    config: Any = module.config
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def build(known: PublishedModel, part: str) -> torch.nn.Module | None:
    """A part of a published model on the meta device; `None` if it has no such part."""
    check_choice("part", part, _PUBLISHED_KINDS)
    with torch.device("meta"):
        if part == "vae":
            return AutoencoderKLWan(**known.vae)
        if part == "text_encoder":
            return UMT5EncoderModel(UMT5Config(**known.text_encoder))
        if part == "image_encoder":
            return None if known.image_encoder is None else CLIPVisionModel(CLIPVisionConfig(**known.image_encoder))
        if part == "transformer_2" and known.boundary_ratio is None:
            return None
        return WanTransformer3DModel(**known.transformer)


def _published_parts(known: PublishedModel) -> dict[str, torch.nn.Module]:
    built = {part: build(known, part) for part in _PUBLISHED_KINDS}
    return {part: module for part, module in built.items() if module is not None}


def _loaded_parts(index: Mapping[str, Any], model: str | os.PathLike) -> dict[str, torch.nn.Module]:
    parts = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        library, kind = entry
        made = getattr(importlib.import_module(library), kind, None)
        if isinstance(made, type) and issubclass(made, torch.nn.Module):
            with torch.device("meta"):
                parts[name] = _empty(made, model, name)
    return parts


def _empty(kind: Any, model: str | os.PathLike, name: str) -> torch.nn.Module:
    if hasattr(kind, "load_config"):
        return kind.from_config(kind.load_config(model, subfolder=name))
    return kind(kind.config_class.from_pretrained(model, subfolder=name))


def count_weights(module: torch.nn.Module) -> Weights:
    """The weights of a module, counted; a module on the meta device is enough."""
    kept = getattr(module, "_keep_in_fp32_modules", None) if isinstance(module, WanTransformer3DModel) else None
    parameters = dict(module.named_parameters())
    in_float32 = (
        value.numel() for name, value in parameters.items() if kept and set(name.split(".")).intersection(kept)
    )
    layers = {name: layer for name, layer in module.named_modules() if not any(layer.children())}
    linear = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
    }
    of_lora = (layer for name, layer in linear.items() if name.endswith(tuple(f".{end}" for end in TARGET_MODULES)))
    return Weights(
        count=sum(value.numel() for value in parameters.values()),
        in_blocks=sum(layer.weight.numel() for layer in linear.values()),
        in_float32=sum(in_float32),
        largest=max(sum(value.numel() for value in layer.parameters()) for layer in layers.values()),
        largest_linear=max((layer.weight.numel() for layer in linear.values()), default=0),
        lora_sides=sum(layer.in_features + layer.out_features for layer in of_lora),
    )
