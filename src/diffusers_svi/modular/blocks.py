"""`SVIBlocks`, and the modular pipeline that they make."""

import json
import os
from copy import deepcopy
from typing import Any

from diffusers.modular_pipelines import (
    ComponentsManager,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ConfigSpec, OutputParam
from diffusers.modular_pipelines.wan.modular_pipeline import WanModularPipeline

from ..lora import SVILoraLoaderMixin
from .inputs import SVIInputsStep
from .loop import SVIClipLoop


class SVIBlocks(SequentialPipelineBlocks):
    """Stable Video Infinity as Modular Diffusers blocks: films of Wan 2.1 I2V, 2.2 I2V A14B and 2.2 TI2V-5B.

    Inputs are those of [`SVIPipeline`], but for guidance, which is the guider's, and `state`, which is `chain` here.
    Outputs are `videos` and `chain_end`. A film equals `SVIPipeline`'s with the same models, seeds and guidance.
    """

    block_classes = (SVIInputsStep, SVIClipLoop)
    block_names = ("inputs", "clips")

    @property
    def description(self) -> str:
        return "Stable Video Infinity: a film of any length, clip by clip, each from the end of the one before."

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        # Wan's blocks for two experts have a default for `boundary_ratio`; here it is what tells that there are two.
        first: dict[str, ConfigSpec] = {}
        for config in super().expected_configs:
            first.setdefault(config.name, config)
        return list(first.values())

    @property
    def outputs(self) -> list[OutputParam]:
        return self.sub_blocks["clips"].outputs

    def init_pipeline(
        self,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
    ) -> "SVIModularPipeline":
        """As in diffusers: a pipeline of these blocks."""
        return SVIModularPipeline(
            deepcopy(self), pretrained_model_name_or_path, components_manager=components_manager, collection=collection
        )


class SVIModularPipeline(SVILoraLoaderMixin, WanModularPipeline):
    """diffusers' modular pipeline for Wan, of [`SVIBlocks`] unless told otherwise, with SVI's loader of LoRAs."""

    def __init__(
        self,
        blocks: ModularPipelineBlocks | None = None,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        blocks = SVIBlocks() if blocks is None else blocks
        super().__init__(blocks, pretrained_model_name_or_path, **kwargs)
        for spec in self._component_specs.values():
            if spec.type_hint is None:
                # A model folder says of what it does not have that it is none: there is nothing to load.
                spec.pretrained_model_name_or_path = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any
    ) -> "SVIModularPipeline":
        """A pipeline for a model folder or a folder of blocks; the blocks are the package's, whatever code is there.

        Args:
            pretrained_model_name_or_path: Hub repository or folder with `model_index.json`, as `SVIPipeline` takes it,
                or with `modular_model_index.json`.
            kwargs: `components_manager`, `collection`, and the options of the Hub.
        """
        return cls(None, pretrained_model_name_or_path, **kwargs)

    def to_json_string(self) -> str:
        """The text of `modular_model_index.json`, under diffusers' own name, by which `ModularPipeline` loads it."""
        index = {**json.loads(super().to_json_string()), "_class_name": WanModularPipeline.__name__}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def __call__(self, state: Any = None, output: str | list[str] | None = None, **inputs: Any) -> Any:
        """As in diffusers; `state` may be a `ChainState`, as in `SVIPipeline`, which is the input `chain` then.

        Raises:
            TypeError: for an input that no block has, which diffusers would leave out.
        """
        known = self._blocks.input_names
        unknown = [name for name in inputs if name not in known]
        if unknown:
            raise TypeError(f"No block has an input {', '.join(unknown)}. There are: {', '.join(known)}.")
        if state is not None and not isinstance(state, PipelineState):
            state, inputs = None, {**inputs, "chain": state}
        return super().__call__(state, output, **inputs)
