"""The steps of a clip before and after its denoising, as blocks."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.wan.before_denoise import WanPrepareLatentsStep
from diffusers.modular_pipelines.wan.encoders import WanImageEncoderStep, WanTextEncoderStep
from diffusers.video_processor import VideoProcessor

from ..chain import ChainState
from ..clip_steps import carried_on, decoded, finished, trimmed
from ..clips import Clip
from ..lora_layers import experts_of
from .underway import clip_input


class SVITextEncoderStep(WanTextEncoderStep):
    """Wan's text block, for the texts of a clip. What was encoded before in this film is not encoded again."""

    @property
    def description(self) -> str:
        return "Encodes the prompts of the clip, unless embeddings are given."

    @property
    def inputs(self) -> list[InputParam]:
        return [clip_input()]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given = self.get_block_state(state)
        texts = given.clip.direction.positive, given.clip.direction.negative
        dtype, device = _transformer_dtype(components), components._execution_device
        # Wan's blocks need the negative ones even where a guider does not.
        given.prompt_embeds, given.negative_prompt_embeds = (
            (given.clip.encode(text) if isinstance(text, str) else text).to(device=device, dtype=dtype)
            for text in texts
        )
        self.set_block_state(state, given)
        return components, state


class SVIImageEncoderStep(WanImageEncoderStep):
    """What CLIP sees of the frame that a clip begins with; nothing for models without it."""

    @property
    def description(self) -> str:
        return "Encodes the frame that the clip begins with, for models with an image encoder."

    @property
    def inputs(self) -> list[InputParam]:
        return [clip_input()]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given = self.get_block_state(state)
        given.image_embeds, pipe = None, given.clip.pipe
        if pipe.transformer is not None and pipe.transformer.config.image_dim is not None:
            shown = pipe._shown(given.clip.begun, given.clip.last, given.clip.film.clip_resize)
            embeds = pipe.encode_image(shown, components._execution_device)
            given.image_embeds = embeds.to(_transformer_dtype(components))
        self.set_block_state(state, given)
        return components, state


class SVIPrepareLatentsStep(ModularPipelineBlocks):
    """The noise of a clip, and its condition as the scheme lays it out."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Draws the noise of the clip, and lays out its condition: what is carried over from the clip before."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        return [clip_input()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", type_hint=torch.Tensor, description="Noise."),
            OutputParam(
                "image_condition_latents",
                type_hint=torch.Tensor,
                description="Mask and condition on channels, or the latents that are held, zeros between.",
            ),
            OutputParam("held_mask", type_hint=torch.Tensor, description="0 on latents that are held; or `None`."),
            OutputParam("has_experts", type_hint=bool, description="True where the model has two; or `None`."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given = self.get_block_state(state)
        clip, pipe = given.clip, given.clip.pipe
        options = clip.direction.options
        # Wan's own, with the factors of this pipeline: the modular one counts 8 pixels a latent on TI2V-5B too.
        given.latents = WanPrepareLatentsStep.prepare_latents(
            pipe,
            num_channels_latents=pipe.vae.config.z_dim,
            batch_size=1,
            **{name: options[name] for name in ("height", "width", "num_frames")},
            dtype=torch.float32,
            device=components._execution_device,
            generator=options.get("generator"),
            latents=options.get("latents"),
        )
        given.image_condition_latents, *masks = pipe._condition(clip.begun, clip.last, given.latents)
        given.held_mask = masks[0] if masks else None
        given.has_experts = True if pipe.config.boundary_ratio is not None else None
        self.set_block_state(state, given)
        return components, state


class SVIDecodeStep(ModularPipelineBlocks):
    """The pixels of a clip."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Decodes the clip, where its pixels are seen or carried on."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        return [clip_input(), InputParam("latents", type_hint=torch.Tensor, required=True, description="Denoised.")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("clip_video", type_hint=torch.Tensor, description="All frames of the clip, in [-1, 1].")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given = self.get_block_state(state)
        given.clip_video = decoded(given.clip.pipe, given.latents, given.clip.begun, given.clip.film)
        self.set_block_state(state, given)
        return components, state


class SVITrimStep(ModularPipelineBlocks):
    """What a clip adds to the film: frames that a neighbour tells too are cut off."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Cuts off what the clip shares with its neighbours, and brings it to the `output_type`."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        config = FrozenDict({"vae_scale_factor": 8})
        return [ComponentSpec("video_processor", VideoProcessor, config=config, default_creation_method="from_config")]

    @property
    def inputs(self) -> list[InputParam]:
        return [clip_input(), InputParam("latents", required=True), InputParam("clip_video")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("frames", description="What the clip adds to the film."),
            OutputParam("tail", description="Its last frames, where the next clip is to tell them again."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given = self.get_block_state(state)
        clip = given.clip
        given.frames, given.tail = trimmed(
            clip.pipe, given.latents, given.clip_video, clip.before, clip.begun, clip.film
        )
        self.set_block_state(state, given)
        return components, state


class SVICarryStep(ModularPipelineBlocks):
    """The state that the next clip goes on from."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Keeps what the next clip begins with: last frames, or last latents."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            clip_input(),
            InputParam("latents", required=True),
            InputParam("clip_video"),
            InputParam("frames", required=True),
            InputParam("tail", required=True),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("chain_end", type_hint=ChainState, description="What the next clip goes on from."),
            OutputParam("finished", type_hint=Clip, description="The clip, as `SVIPipeline.stream` yields it."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given = self.get_block_state(state)
        clip = given.clip
        given.chain_end = carried_on(clip.pipe, given.latents, given.clip_video, clip.begun, clip.film, clip.direction)
        given.finished = finished(given.frames, given.tail, clip.before, given.chain_end, clip.direction, {})
        self.set_block_state(state, given)
        return components, state


def _transformer_dtype(components: Any) -> torch.dtype:
    return next(iter(experts_of(components).values())).dtype
