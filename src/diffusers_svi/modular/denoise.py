"""The denoising of a clip: Wan's own blocks, for every kind of model, and one of ours for models that hold latents."""

from typing import Any

import torch
from diffusers.modular_pipelines import AutoPipelineBlocks, BlockState, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.wan.denoise import (
    Wan22Image2VideoDenoiseStep,
    WanDenoiseLoopWrapper,
    WanImage2VideoDenoiseStep,
    WanImage2VideoLoopBeforeDenoiser,
    WanLoopAfterDenoiser,
    WanLoopDenoiser,
)


class SVIPlainDenoiseStep(WanDenoiseLoopWrapper):
    """Of Wan's blocks, for one transformer that takes its condition on channels and no image embeddings."""

    block_classes = (WanImage2VideoLoopBeforeDenoiser, WanLoopDenoiser, WanLoopAfterDenoiser)
    block_names = ("before_denoiser", "denoiser", "after_denoiser")

    @property
    def description(self) -> str:
        return "Denoises with one transformer without image embeddings."


class SVIHeldLoopBeforeDenoiser(ModularPipelineBlocks):
    """Puts the held latents into their places, and gives their tokens the timestep 0."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Puts the held latents into their places, at timestep 0."

    @property
    def inputs(self) -> list[InputParam]:
        names = ("latents", "image_condition_latents", "held_mask", "dtype")
        return [InputParam(name, required=True) for name in names]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: BlockState, i: int, t: torch.Tensor) -> tuple[Any, BlockState]:
        block_state.latent_model_input = _held(block_state).to(block_state.dtype)
        # source: WanImageToVideoPipeline.__call__
        _, rows, columns = components.transformer.config.patch_size
        timesteps = (block_state.held_mask[0][0][:, ::rows, ::columns] * t).flatten()
        block_state.token_timesteps = timesteps.unsqueeze(0).expand(block_state.latents.shape[0], -1)
        return components, block_state


class SVIHeldLoopDenoiser(WanLoopDenoiser):
    """Wan's denoiser, with a timestep for every token."""

    @torch.no_grad()
    def __call__(self, components: Any, block_state: BlockState, i: int, t: torch.Tensor) -> tuple[Any, BlockState]:
        guider, transformer = components.guider, components.transformer
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        batches = guider.prepare_inputs_from_block_state(block_state, self._guider_input_fields)
        for batch in batches:
            guider.prepare_models(transformer)
            embeds = {name: getattr(batch, name).to(block_state.dtype) for name in self._guider_input_fields}
            batch.noise_pred = transformer(
                hidden_states=block_state.latent_model_input,
                timestep=block_state.token_timesteps,
                attention_kwargs=block_state.attention_kwargs,
                return_dict=False,
                **embeds,
            )[0]
            guider.cleanup_models(transformer)
        block_state.noise_pred = guider(batches)[0]
        return components, block_state


class SVIHeldDenoiseStep(WanDenoiseLoopWrapper):
    """For models that hold latents in place of the clip's first (TI2V-5B), which Wan's blocks do not know."""

    block_classes = (SVIHeldLoopBeforeDenoiser, SVIHeldLoopDenoiser, WanLoopAfterDenoiser)
    block_names = ("before_denoiser", "denoiser", "after_denoiser")

    @property
    def description(self) -> str:
        return "Denoises around the latents that are held."

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        components, state = super().__call__(components, state)
        state.set("latents", _held(state))
        return components, state


class SVIDenoiseStep(AutoPipelineBlocks):
    """The denoising that fits the model."""

    block_classes = (
        SVIHeldDenoiseStep,
        Wan22Image2VideoDenoiseStep,
        WanImage2VideoDenoiseStep,
        SVIPlainDenoiseStep,
    )
    block_names = ("held", "two_experts", "with_image_embeds", "plain")
    block_trigger_inputs = ("held_mask", "has_experts", "image_embeds", None)

    @property
    def description(self) -> str:
        return "Denoises the clip, as the model asks for it: Wan 2.2 TI2V-5B, 2.2 A14B, 2.1, or one without CLIP."

    def set_progress_bar_config(self, **config: Any) -> None:
        for block in self.sub_blocks.values():
            block.set_progress_bar_config(**config)


def _held(state: BlockState | PipelineState) -> torch.Tensor:
    """The latents with those that are held in their places."""
    return (1 - state.held_mask) * state.image_condition_latents + state.held_mask * state.latents
