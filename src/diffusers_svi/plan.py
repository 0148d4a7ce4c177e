"""What a film will be and take: its frames, and the memory that its models' weights need."""

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .conditioning import Scheme
from .lora_file import published_scheme, read_lora
from .presets import Preset


@dataclass(frozen=True)
class Weights:
    """Memory that the weights of a model need.

    Args:
        sizes (`dict[str, int]`): Bytes of every component.
    """

    sizes: dict[str, int]

    @property
    def all(self) -> int:
        """With everything on the device."""
        return sum(self.sizes.values())

    @property
    def largest(self) -> int:
        """Where only the model at work is on the device (`--offload model`)."""
        return max(self.sizes.values(), default=0)


def weights_of(model: str | os.PathLike, dtype: torch.dtype) -> Weights:
    """The memory of a model's weights, out of its configuration; nothing else of it is read.

    Args:
        model: Hub name, of which the configuration is fetched, or folder.
        dtype (`torch.dtype`): Of all but the VAE, which is in float32.

    Raises:
        OSError, ValueError: if its configuration cannot be read.
    """
    index = DiffusionPipeline.load_config(model)
    sizes = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        library, kind = entry
        made = getattr(importlib.import_module(library), kind, None)
        if isinstance(made, type) and issubclass(made, torch.nn.Module):
            own = torch.float32 if name == "vae" else dtype
            sizes[name] = own.itemsize * sum(value.numel() for value in _empty(made, model, name).parameters())
    return Weights(sizes)


def _empty(kind: Any, model: str | os.PathLike, name: str) -> torch.nn.Module:
    """A model without memory for its weights."""
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(model, subfolder=name))
        return kind(kind.config_class.from_pretrained(model, subfolder=name))


def scheme_of(preset: Preset, lora: str | os.PathLike | None) -> Scheme | None:
    """How clips will be chained, as far as the LoRA tells it without a model; `None` where it does not, or is none.

    Args:
        preset (`Preset`): The member of the family.
        lora (*optional*): Another LoRA: file, folder or Hub name.
    """
    if lora is None:
        return None if preset.lora is None else published_scheme(f"{preset.lora}/{preset.weight_name or ''}")
    if os.path.isfile(lora):
        return read_lora(lora).conditioning
    return published_scheme(os.fspath(lora))
