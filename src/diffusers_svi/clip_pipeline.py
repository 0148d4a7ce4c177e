"""`ClipPipeline`: one clip by diffusers' Wan pipeline, conditioned as a chain asks for."""

import json
import threading
from dataclasses import replace
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import WanImageToVideoPipeline
from diffusers.utils.torch_utils import randn_tensor

from .caches import check_caches, steps_told
from .chain import ChainState
from .inputs import latent_shape
from .lora_layers import experts_of
from .pixels import squash, to_pil, to_uint8
from .wan import MAX_TOKENS, encode_video, pipeline_condition


# Held while a pipeline is asked whether it is at work.
_ONE_AT_A_TIME = threading.Lock()


class ClipPipeline(WanImageToVideoPipeline):
    """The parent, whose one step that lays out the condition is replaced while a clip of a chain is made."""

    # What `prepare_latents` is to condition the clip on; set while the parent generates one.
    _state: ChainState | None = None
    # What that clip is to end with.
    _last: torch.Tensor | None = None
    # An anchor and its latent, encoded once.
    _anchor: tuple[torch.Tensor, torch.Tensor] | None = None
    _interrupt = _interrupted = False

    def _generate(
        self,
        state: ChainState,
        last: torch.Tensor | None,
        clip_resize: str,
        bar_config: dict[str, Any],
        **options: Any,
    ) -> torch.Tensor:
        """The latents of the clip after `state`, by the parent's `__call__`.

        Args:
            state (`ChainState`): What it goes on from.
            last (`torch.Tensor` of shape `(1, 3, height, width)`, *optional*): What it is to end with, in [-1, 1].
            clip_resize (`str`): What the image encoder sees of a frame, one of `CLIP_RESIZES`.
            bar_config (`dict`): Of the bar over its steps.
            options: Of the parent.
        """
        seen = dict(zip(("image", "last_image"), self._shown(state, last, clip_resize), strict=False))
        before = self._bar_config
        with _ONE_AT_A_TIME:
            if self._state is not None:
                raise RuntimeError(
                    "This pipeline is generating a clip already, in another thread or a callback. Wait until it is "
                    "done, or make a second pipeline out of its `components`."
                )
            self._state, self._last = state, last
        self.set_progress_bar_config(**{"desc": f"Clip {state.num_clips + 1}", "leave": False, **bar_config})
        try:
            check_caches(experts_of(self).values(), options["guidance_scale"])
            with steps_told(experts_of(self).values(), self.scheduler):
                return super().__call__(output_type="latent", return_dict=False, **seen, **options)[0]
        finally:
            self._state = self._last = None
            self.set_progress_bar_config(**before)
            # The parent does so only where nothing goes wrong: caches would go on in the next clip.
            for transformer in self._transformers:
                transformer._reset_stateful_cache()

    def _shown(self, state: ChainState, last: torch.Tensor | None, clip_resize: str) -> list[PIL.Image.Image]:
        """What the image encoder is shown: the picture that the clip begins with, and the one that it ends with."""
        image = to_pil(state.shown[0])
        if clip_resize == "squash" and self.image_encoder is not None:
            image = squash(image, self.image_encoder.config.image_size)
        if last is None or self._transformers[0].config.pos_embed_seq_len is None:
            # The end is only shown where the model was trained to see both.
            return [image]
        return [image, to_pil(to_uint8(last)[0])]

    @property
    def interrupt(self) -> bool:
        """Whether the film is to end: set to `True`, from a callback or another thread, it does after this step.

        The clip under way is dropped.
        """
        return self._interrupt or self._interrupted

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        # The parent takes back its own at the beginning of every clip.
        self._interrupted = self._interrupt = value

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in the parent; where the model has image embeddings beside them, always of 512 tokens.

        Such a model (Wan 2.1) counts the image's tokens from the 513th on, whatever `max_sequence_length` is: shorter
        embeddings are filled up with zeros, as those of short prompts are.
        """
        positive, negative = super().encode_prompt(*args, **kwargs)
        if self.image_encoder is None:
            return positive, negative
        padding = (0, 0, 0, max(0, MAX_TOKENS - positive.shape[1]))
        return F.pad(positive, padding), None if negative is None else F.pad(negative, padding)

    def prepare_latents(
        self,
        image: torch.Tensor,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        last_image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The noise of a clip and its condition, as the scheme lays it out: the one step of the parent replaced.

        Called from outside, when no film is being made, it is the parent's.
        """
        if self._state is None:
            return super().prepare_latents(
                image,
                batch_size,
                num_channels_latents,
                height,
                width,
                num_frames,
                dtype,
                device,
                generator,
                latents,
                last_image,
            )
        shape = (batch_size, *latent_shape(self, num_frames, height, width))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            latents = latents.to(device=device, dtype=dtype)
        return latents, *self._condition(self._state, self._last, latents)

    def _condition(
        self, state: ChainState, last: torch.Tensor | None, latents: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """What [`pipeline_condition`] gives for the clip after `state` that is to end with `last`."""
        expand_timesteps = self.config.expand_timesteps
        carried = replace(
            state.carried(latents.device, latents.dtype),
            last=None if last is None else last.to(latents.device, latents.dtype),
        )
        if state.conditioning.carried_latents:
            if self._anchor is None or self._anchor[0] is not state.reference:
                self._anchor = state.reference, encode_video(self.vae, carried.image.unsqueeze(2))
            carried = replace(carried, anchor=self._anchor[1])
        condition = state.conditioning.condition(self.vae, carried, state.num_frames, expand_timesteps)
        known_frames = state.conditioning.known_frames(is_first=carried.frames is None)
        return pipeline_condition(condition, latents.shape[2], expand_timesteps, known_frames, last is not None)

    def to_json_string(self) -> str:
        """The text of `model_index.json`, under the parent's name: diffusers by itself loads the folder too."""
        index = {**json.loads(super().to_json_string()), "_class_name": WanImageToVideoPipeline.__name__}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def _bar_config(self) -> dict[str, Any]:
        return getattr(self, "_progress_bar_config", {})
