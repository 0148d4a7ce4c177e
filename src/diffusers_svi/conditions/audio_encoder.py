"""The encoder that hears for the audio modules: out of safetensors, and in float32 whatever the rest is in."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from ..published import AUDIO_ENCODER, audio_encoder_revision
from ..training.run_arguments import fingerprint_model
from .audio import AudioFeatures, GivenFeatures, open_audio
from .rows import ROW_FILES


def load_audio_encoder(source: str | os.PathLike | None = None) -> dict[str, Any]:
    """The components of [`SVITalkPipeline`] that hear.

    Args:
        source (*optional*): Hub name or folder of a `Wav2Vec2Model`; the published one if not given. A folder without
            `preprocessor_config.json` normalises sounds, as the published one does.

    Returns:
        `dict`: `audio_encoder`, in evaluation mode, and `audio_feature_extractor`, or `None`.

    Raises:
        OSError, ValueError: if it cannot be read, or has no safetensors.
    """
    name = AUDIO_ENCODER if source is None else os.fspath(source)
    revision = audio_encoder_revision(name)
    has_extractor = not os.path.isdir(name) or Path(name, "preprocessor_config.json").exists()
    return {
        "audio_encoder": read_audio_encoder(name, revision=revision),
        "audio_feature_extractor": Wav2Vec2FeatureExtractor.from_pretrained(name, revision=revision)
        if has_extractor
        else None,
    }


def read_audio_encoder(name: str, **where: Any) -> Wav2Vec2Model:
    """The model in a repository or folder; `where` in it is told by `revision` and `subfolder`."""
    model = Wav2Vec2Model.from_pretrained(name, use_safetensors=True, dtype=torch.float32, **where)
    return model.eval()


def hear(audio: str | os.PathLike, encoder: "AudioEncoder | None", fps: float) -> AudioFeatures | GivenFeatures:
    """The rows of a sound, or of a file of features, at `fps` a second: as [`open_audio`], which see."""
    if encoder is None or Path(audio).suffix.lower() in ROW_FILES:
        return open_audio(audio)
    return open_audio(audio, encoder.model, fps, encoder.feature_extractor)


class AudioEncoder:
    """Such a model in a folder, for training: what it is is known before, and it is loaded when a sound is due.

    Args:
        folder: With `config.json` and weights in safetensors.
        device (`torch.device`, *optional*): Where it computes; on the CPU if not given.

    Raises:
        ValueError: if there is no such model.
    """

    def __init__(self, folder: str | os.PathLike, device: torch.device | None = None):
        self.folder, self._device = Path(folder), device
        try:
            config = Wav2Vec2Config.get_config_dict(self.folder, local_files_only=True)[0]
        except (OSError, ValueError) as error:
            raise ValueError(f"`--audio_encoder`={os.fspath(folder)!r} is no model: {error}") from error
        if config.get("model_type") != "wav2vec2":
            raise ValueError(
                f"`--audio_encoder`={os.fspath(folder)!r} must be a Wav2Vec2 model, but its config.json tells of "
                f"{config.get('model_type')!r}."
            )
        own = Wav2Vec2Config.from_dict(config)
        # Layers times channels: the numbers of a row.
        self.row_values: int = own.num_hidden_layers * own.hidden_size
        self.fingerprint = fingerprint_model(self.folder, ".")

    @property
    def model(self) -> Wav2Vec2Model:
        """Raises a `ValueError` if its weights are not in safetensors."""
        model: Wav2Vec2Model = self._loaded["audio_encoder"]
        return model

    @property
    def feature_extractor(self) -> Wav2Vec2FeatureExtractor | None:
        """`None` where the folder has none."""
        return self._loaded["audio_feature_extractor"]

    def forget(self) -> None:
        """Let go of the model; it is loaded again when it is asked for."""
        self.__dict__.pop("_loaded", None)

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        try:
            loaded = load_audio_encoder(self.folder)
        except OSError as error:
            raise ValueError(
                f"`--audio_encoder`={os.fspath(self.folder)!r} cannot be loaded: {error} Weights in other formats "
                "than safetensors are not read: load them where you trust them, and write them by `save_pretrained`."
            ) from error
        loaded["audio_encoder"].to(self._device)
        return loaded
