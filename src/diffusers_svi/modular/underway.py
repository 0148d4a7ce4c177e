"""The clip that is being made: what its steps share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

from ..chain import ChainState
from ..directing import Direction
from ..inputs import Film
from ..pipeline import SVIPipeline


MODELS = ("tokenizer", "text_encoder", "image_encoder", "image_processor", "transformer", "transformer_2", "vae")
CONFIGS = ("boundary_ratio", "expand_timesteps")


def pipeline_of(components: Any) -> SVIPipeline:
    """`SVIPipeline` over the models of a modular pipeline: the same checks, conditions and joints for both."""
    models = {name: getattr(components, name, None) for name in (*MODELS, "scheduler")}
    return SVIPipeline(**models, **{name: components.config[name] for name in CONFIGS})


@dataclass(frozen=True, kw_only=True)
class ClipUnderway:
    """What the steps of a clip share.

    Args:
        pipe (`SVIPipeline`): Over the models; it denoises nothing here.
        film (`Film`): What the clip belongs to.
        direction (`Direction`): How the clip is to be made.
        before (`ChainState`): The state before it.
        begun (`ChainState`): The same as the clip takes it up, with its cut or anchor.
        last (`torch.Tensor` of shape `(1, 3, height, width)`, *optional*): What it is to end with, in [-1, 1].
        encode (`Callable[[str], torch.Tensor]`): From a prompt of the film to its embeddings.
    """

    pipe: SVIPipeline
    film: Film
    direction: Direction
    before: ChainState
    begun: ChainState
    last: torch.Tensor | None
    encode: Callable[[str], torch.Tensor]


def clip_input() -> InputParam:
    """The input of a step that needs the clip; [`SVIClipLoop`] gives it."""
    return InputParam("clip", type_hint=ClipUnderway, required=True, description="The clip that is being made.")
