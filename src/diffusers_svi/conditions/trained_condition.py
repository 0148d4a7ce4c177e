"""`TrainedCondition`: what the films of a training run follow beside text, from its data to the modules for it."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..conditioning import Scheme
from ..training.cache import CachedSamples, TensorCache
from ..training.samples import Samples
from .audio import open_audio
from .audio_encoder import AudioEncoder, hear
from .clip_conditions import ClipAudio, ClipConditions, ClipPoses, encode_conditions
from .converters import modules_of
from .following import Following
from .pose import open_pose
from .rows import Rows
from .trained_modules import INIT, TrainedModules
from .windows import clips_to_cover


class TrainedCondition:
    """Audio or poses, the modules for them, and how both are used in training.

    Args:
        kind (`str`): "audio" or "pose".
        base (`Mapping[str, Any]`): The config of the transformer that is trained, with its `_class_name`.
        fps (`int`, *optional*): Frames a second of the clips; their videos' own if not given, for poses alone.
        audio_encoder (*optional*): The folder of a Wav2Vec2 model; features that were computed before need none.
        device (`torch.device`, *optional*): Where it computes.
        source (`str`, *optional*), sizes, in_lora, cache_dir: Of modules, as in [`TrainedModules`].
        train_modules (`bool`, defaults to `False`): Whether they are trained, beside the LoRA.
        p_no_condition, p_no_image (`float`, default to 0.0): As in [`Following`].

    Raises:
        ValueError: as [`TrainedModules`], [`AudioEncoder`] and [`Following`]; for fresh modules that are not trained.
    """

    def __init__(
        self,
        kind: str,
        base: Mapping[str, Any],
        *,
        fps: int | None,
        audio_encoder: str | os.PathLike | None = None,
        device: torch.device | None = None,
        source: str | None = None,
        sizes: Mapping[str, int] | None = None,
        in_lora: dict[str, torch.Tensor] | None = None,
        cache_dir: str | None = None,
        train_modules: bool = False,
        p_no_condition: float = 0.0,
        p_no_image: float = 0.0,
    ):
        if source == INIT and not train_modules:
            raise ValueError(
                f"`--condition_modules {INIT}`: fresh modules do nothing. Give `--train_condition_modules` too."
            )
        self.kind, self.fps, self._train_modules = kind, fps, train_modules
        self.modules = TrainedModules(kind, base, source, sizes, in_lora, cache_dir)
        self._encoder = None if audio_encoder is None else AudioEncoder(audio_encoder, device)
        self._clips: ClipConditions = ClipPoses(fps)
        if kind == "audio":
            assert fps is not None
            self._clips = ClipAudio(fps, self.modules.window, self._encoder)
        self.following = Following(
            kind=kind, window=self.modules.window, p_no_condition=p_no_condition, p_no_image=p_no_image
        )

    def open_film(
        self, source: str | os.PathLike, num_clips: int, scheme: Scheme, height: int, width: int, num_frames: int
    ) -> dict[str, Rows]:
        """What a film is to follow, by the name that the pipeline has for it.

        Args:
            source: A sound or poses, in any form that data may have them.
            num_clips (`int`): Of the film.
            scheme (`Scheme`), height, width, num_frames (`int`): Of its clips.

        Raises:
            ValueError: if it cannot be read, or ends before the film.
        """
        if self.kind == "pose":
            rows: Rows = open_pose(source, height, width, self.fps)
        else:
            assert self.fps is not None
            # Computed now: the encoder leaves the memory.
            rows = open_audio(hear(source, self._encoder, self.fps)[:])
        most = clips_to_cover(len(rows), scheme, num_frames)
        if num_clips > most:
            raise ValueError(
                f"`--validation_condition` has {len(rows)} frames, which make {most} clips, but {num_clips} are asked "
                "for: lengthen it, or give `--num_validation_clips`."
            )
        return {self.kind: rows}

    def encode(self, samples: Samples, cache: TensorCache, num_workers: int = 0) -> list[str]:
        """Keys of what all samples hear or see, in the cache: as [`encode_conditions`]. The encoder is let go of."""
        keys = encode_conditions(samples, self._clips, cache, num_workers, self.modules.row_values)
        if self._encoder is not None:
            self._encoder.forget()
        return keys

    def beside_lora(self, dataset: CachedSamples) -> dict[str, Any]:
        """What `load_transformer` is to know, for samples such as those of `dataset`."""
        row_values = dataset[0]["audio"][0].numel() if self.kind == "audio" else None
        return {
            "kind": self.modules.base_kind,
            "with_modules": lambda transformer: self.modules.put_on(transformer, row_values),
            "trained": lambda transformer: modules_of(transformer).values() if self._train_modules else (),
        }
