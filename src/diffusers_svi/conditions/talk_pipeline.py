"""`SVITalkPipeline`: films that follow speech."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Unpack

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    UMT5EncoderModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from ..caches import check_caches
from ..chain import ChainState
from ..checks import check_number
from ..clips import Clip, ClipSpec
from ..inputs import Film
from ..lora_file import LoraFile
from ..lora_layers import experts_of
from ..options import FilmOptions
from ..pipeline import with_film_options
from ..weights_file import fetch_weights
from .audio import AudioLike, open_audio
from .condition_pipeline import ConditionPipeline
from .guidance import AudioGuidance
from .rows import Rows
from .talk_transformer import SVITalkTransformer3DModel
from .windows import audio_windows, first_frame


# Where the audio modules were published that SVI-Talk was trained with.
MULTITALK = "MeiGen-AI/MeiGen-MultiTalk"
MULTITALK_FILE = "multitalk.safetensors"
# source: the authors' script for SVI-Talk
GUIDANCE, AUDIO_GUIDANCE = 2.0, 5.0


class SVITalkPipeline(ConditionPipeline):
    r"""SVI-Talk: Wan 2.1 I2V with the audio modules of MultiTalk and a LoRA; frame n of the film hears row n of audio.

    Components and `from_pretrained` are those of [`SVIPipeline`], with a [`SVITalkTransformer3DModel`] once the audio
    modules are loaded: with the LoRA, by `load_lora_weights`, or by `load_audio_modules`. A saved pipeline has them.

    Args:
        audio_encoder (`Wav2Vec2Model`, *optional*):
            Of `TencentGameMate/chinese-wav2vec2-base`, for the published modules. Features of a sound that were
            computed before need none.
        audio_feature_extractor (`Wav2Vec2FeatureExtractor`, *optional*): Its own.
    """

    _optional_components: ClassVar[list[str]] = [
        *ConditionPipeline._optional_components,
        "audio_encoder",
        "audio_feature_extractor",
    ]

    _follows = "audio"
    _kind = SVITalkTransformer3DModel
    _guidance_scale = GUIDANCE
    _longer = "The film ends with its audio: leave `num_clips` out, or lengthen the sound by silence."

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        image_processor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModel | None = None,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        audio_encoder: Wav2Vec2Model | None = None,
        audio_feature_extractor: Wav2Vec2FeatureExtractor | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            text_encoder,
            vae,
            scheduler,
            image_processor,
            image_encoder,
            transformer,
            transformer_2,
            boundary_ratio,
            expand_timesteps,
        )
        self.register_modules(audio_encoder=audio_encoder, audio_feature_extractor=audio_feature_extractor)

    @with_film_options(guidance_scale=GUIDANCE)
    def __call__(
        self,
        image: PipelineImageInput | None = None,
        prompts: str | ClipSpec | Iterable[str | ClipSpec] | None = None,
        *,
        audio: AudioLike | Rows | None = None,
        audio_guidance_scale: float = AUDIO_GUIDANCE,
        return_dict: bool = True,
        **options: Unpack[FilmOptions],
    ) -> WanPipelineOutput | tuple:
        r"""
        Generate a film that follows speech: the clips of [`~SVITalkPipeline.stream`], joined.

        Args:
            image, prompts, return_dict, options:
                As in [`SVIPipeline`]. `guidance_scale`, that of the prompt, defaults to 2.0. `num_clips` defaults to
                as many as the audio is long, for which the last prompt holds; the last clip runs on to its end, where
                the last row of audio holds. More clips are refused.
            audio (`str`, `tuple`, `np.ndarray`, `torch.Tensor` or what `open_audio` gave):
                A sound, which needs the `audio_encoder`: a file, or `(array, rate)`, heard at 25 film frames a second;
                or its features, a row a film frame, `(frames, 12, 768)`. For another rate of frames, open it by
                `open_audio`. Row n belongs to frame n of the film, also where the film goes on from a `state` or began
                with a video.
            audio_guidance_scale (`float`, defaults to 5.0):
                Weight of the audio, see [`AudioGuidance`]. Where it is not 1, each step takes a pass more: three with
                guidance by the prompt, two without.

        Returns and raises as [`SVIPipeline`].
        """
        given: Any = {**options, "audio": audio, "audio_guidance_scale": audio_guidance_scale}
        return super().__call__(image, prompts, return_dict=return_dict, **given)

    @with_film_options(guidance_scale=GUIDANCE)
    def stream(
        self,
        image: PipelineImageInput | None = None,
        prompts: str | ClipSpec | Iterable[str | ClipSpec] | None = None,
        *,
        audio: AudioLike | Rows | None = None,
        audio_guidance_scale: float = AUDIO_GUIDANCE,
        **options: Unpack[FilmOptions],
    ) -> Iterator[Clip]:
        r"""Generate a film that follows speech clip by clip: as [`SVIPipeline`], with the audio of a call."""
        given: Any = {**options, "audio": audio, "audio_guidance_scale": audio_guidance_scale}
        return super().stream(image, prompts, **given)

    def load_audio_modules(
        self,
        source: str | os.PathLike | dict[str, torch.Tensor] = MULTITALK,
        weight_name: str | None = None,
        **hub_options: Any,
    ) -> None:
        """Load the audio modules of MultiTalk into the transformer: before it is compiled, offloaded or cached.

        Args:
            source: Hub repository, folder, safetensors file, or state dict.
            weight_name (`str`, *optional*): The file in it; `multitalk.safetensors` in the published repository.
            hub_options: As in [`fetch_weights`].

        Raises:
            ValueError: if the file cannot be read, does not hold these modules, or they do not fit.
        """
        if source == MULTITALK and weight_name is None:
            weight_name = MULTITALK_FILE
        self._put_modules(
            "transformer", fetch_weights(source, weight_name, what="audio module", **hub_options).state_dict
        )

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        audio_modules: str | os.PathLike | dict[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        r"""
        Load a LoRA, that of SVI-Talk with the audio modules it needs.

        Args:
            pretrained_model_name_or_path_or_dict, adapter_name, hotswap, options: As in [`SVIPipeline`].
            audio_modules (*optional*):
                Where the modules are: Hub repository, folder, safetensors file, or state dict. If not given, those in
                the file of the LoRA; where it is of SVI-Talk and has none, and the transformer neither, those
                published as `MeiGen-AI/MeiGen-MultiTalk`.

        Raises:
            ValueError: as in [`SVIPipeline`] and `load_audio_modules`. Nothing has been loaded then.
        """
        self._modules_are_chosen = audio_modules is not None
        with self._back_if_it_fails():
            if audio_modules is not None:
                self.load_audio_modules(audio_modules)
            super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **options)

    def _load_modules(self, component: str, lora: LoraFile) -> None:
        if lora.modules and not self._modules_are_chosen:
            self._put_modules(component, lora.modules)
        elif lora.condition is not None and not self.has_modules:
            self.load_audio_modules()

    def _opened(self, condition: Any, height: int, width: int) -> Rows:
        features = open_audio(condition, self.audio_encoder, feature_extractor=self.audio_feature_extractor)
        audio_dim = self._bare_transformer.config.audio_dim
        _, layers, channels = features.shape
        if layers * channels != audio_dim:
            raise ValueError(
                f"`audio` has {layers} layers of {channels} channels a row, but this model hears {audio_dim} values: "
                "12 x 768 of `TencentGameMate/chinese-wav2vec2-base`, for the published one."
            )
        return features

    def _check_film(
        self,
        image: PipelineImageInput | None,
        prompts: str | ClipSpec | Iterable[str | ClipSpec] | None,
        options: FilmOptions,
    ) -> Film:
        given: Any = {"audio": None, "audio_guidance_scale": AUDIO_GUIDANCE, **options}
        audio = given.pop("audio")
        own = {"audio_guidance_scale": check_number("audio_guidance_scale", given.pop("audio_guidance_scale"))}
        film = self._following(image, prompts, given, audio, False, own)
        if own["audio_guidance_scale"] != 1:
            # Two passes at least, whatever the prompt's guidance is.
            check_caches(experts_of(self).values(), guidance_scale=2.0)
        return film

    def _generate(
        self,
        state: ChainState,
        last: torch.Tensor | None,
        clip_resize: str,
        bar_config: dict[str, Any],
        **options: Any,
    ) -> torch.Tensor:
        given = dict(options.pop("attention_kwargs"))
        heard = audio_windows(
            given.pop("audio"), first_frame(state), state.num_frames, self._bare_transformer.config.audio_window
        )
        given["audio"] = heard[None].to(self._execution_device)
        given["audio_guidance"] = AudioGuidance(options["guidance_scale"], given.pop("audio_guidance_scale"))
        return super()._generate(state, last, clip_resize, bar_config, attention_kwargs=given, **options)
