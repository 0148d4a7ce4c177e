"""The loop over the clips of a film."""

import inspect
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, InsertableDict, OutputParam
from diffusers.modular_pipelines.wan.before_denoise import WanSetTimestepsStep, WanTextInputStep

from ..chain import ChainState, joined
from ..clip_steps import clips_due, film_parts, picture_of, prompt_encoder, taken_up
from ..clips import Clip
from ..inputs import Film
from ..progress import Progress
from ..recipe import film_recipe
from .denoise import SVIDenoiseStep
from .inputs import refuse_guidance
from .steps import (
    SVICarryStep,
    SVIDecodeStep,
    SVIImageEncoderStep,
    SVIPrepareLatentsStep,
    SVITextEncoderStep,
    SVITrimStep,
)
from .underway import ClipUnderway, pipeline_of


class SVIClipLoop(LoopSequentialPipelineBlocks):
    """Makes the clips of a film one after the other, each from the end of the one before, and joins them.

    Its sub-blocks are those of any pipeline, not the leaves of other loops: each takes a [`PipelineState`] that is the
    clip's alone. From clip to clip only a [`ChainState`] is handed on.
    """

    model_name = "wan"
    block_classes = (
        SVITextEncoderStep,
        SVIImageEncoderStep,
        WanTextInputStep,
        WanSetTimestepsStep,
        SVIPrepareLatentsStep,
        SVIDenoiseStep,
        SVIDecodeStep,
        SVITrimStep,
        SVICarryStep,
    )
    block_names = (
        "text_encoder",
        "image_encoder",
        "input",
        "set_timesteps",
        "prepare_latents",
        "denoise",
        "decode",
        "trim",
        "carry",
    )

    def __init__(self) -> None:
        blocks = zip(self.block_names, self.block_classes, strict=True)
        self.sub_blocks = InsertableDict(
            (name, block() if inspect.isclass(block) else block) for name, block in blocks
        )

    @property
    def description(self) -> str:
        return "Makes the clips of the film one after the other, each from the end of the one before, and joins them."

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [InputParam("film", type_hint=Film, required=True, description="As `SVIInputsStep` gives it.")]

    @property
    def inputs(self) -> list[InputParam]:
        # What a step needs, no step before gives, and neither does the loop.
        of_steps = SequentialPipelineBlocks._get_inputs(self)
        return [*self.loop_inputs, *(of_step for of_step in of_steps if of_step.name != "clip")]

    @property
    def required_inputs(self) -> list[str]:
        return [needed.name for needed in self.inputs if needed.required]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam.template("videos"),
            OutputParam("chain_end", type_hint=ChainState, description="What a film that goes on begins with."),
        ]

    @property
    def outputs(self) -> list[OutputParam]:
        return self.intermediate_outputs

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        film = state.get("film")
        state.set("chain_end", film.state)
        frames = joined(film_parts(self._clips(components, state)), film.output_type, film.shape)
        state.set("videos", [frames] if isinstance(frames, list) else frames[None])
        return components, state

    def _clips(self, components: Any, state: PipelineState) -> Iterator[Clip]:
        film, pipe = state.get("film"), pipeline_of(components)
        chain: ChainState = film.state
        encode = prompt_encoder(pipe, film, components._execution_device)
        recipe = film_recipe(pipe, film.settings, chain.image, chain.conditioning)
        progress = Progress(film.num_clips, chain.num_clips, getattr(self, "_progress_bar_config", {}))
        try:
            with closing(clips_due(pipe, film)) as due:
                for direction in due:
                    refuse_guidance(direction.spec, chain.num_clips)
                    clip = ClipUnderway(
                        pipe=pipe,
                        film=film,
                        direction=direction,
                        before=chain,
                        begun=taken_up(pipe, chain, direction.spec, film),
                        last=picture_of(pipe, "last_image", direction.spec, film),
                        encode=encode,
                    )
                    self._tell(**{"desc": f"Clip {chain.num_clips + 1}", "leave": False, **progress.config})
                    of_clip = PipelineState(
                        {**state.values, "clip": clip},
                        {kind: list(names) for kind, names in state.kwargs_mapping.items()},
                    )
                    self.loop_step(components, of_clip)
                    made = replace(of_clip.get("finished"), recipe=recipe)
                    chain = made.state
                    state.set("chain_end", chain)
                    progress.clip_done()
                    if film.callback_on_clip_end is not None:
                        film.callback_on_clip_end(components, made)
                    del clip, of_clip  # the next clip is made without them
                    yield made
        finally:
            progress.close()

    def _tell(self, **config: Any) -> None:
        """How the bars of the steps look."""
        for block in self.sub_blocks.values():
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**config)
