"""`AudioEncoder`: a Wav2Vec2 model in a folder, which is loaded when a sound is to be encoded."""

import os
from functools import cached_property
from pathlib import Path

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from ..training.run_arguments import fingerprint_model
from .audio import AudioFeatures, GivenFeatures, open_audio
from .rows import ROW_FILES


def hear(audio: str | os.PathLike, encoder: "AudioEncoder | None", fps: float) -> AudioFeatures | GivenFeatures:
    """The rows of a sound, or of a file of features, at `fps` a second: as [`open_audio`], which see."""
    if encoder is None or Path(audio).suffix.lower() in ROW_FILES:
        return open_audio(audio)
    return open_audio(audio, encoder.model, fps, encoder.feature_extractor)


class AudioEncoder:
    """A Wav2Vec2 model and its feature extractor, if it has one.

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

    @cached_property
    def model(self) -> Wav2Vec2Model:
        """Raises a `ValueError` if its weights are not in safetensors."""
        try:
            model = Wav2Vec2Model.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
        except OSError as error:
            raise ValueError(
                f"`--audio_encoder`={os.fspath(self.folder)!r} cannot be loaded: {error} Weights in other formats "
                "than safetensors are not read: load them where you trust them, and write them by `save_pretrained`."
            ) from error
        return model.to(self._device).eval()

    def forget(self) -> None:
        """Let go of the model; it is loaded again when it is asked for."""
        self.__dict__.pop("model", None)

    @cached_property
    def feature_extractor(self) -> Wav2Vec2FeatureExtractor | None:
        if not (self.folder / "preprocessor_config.json").is_file():
            return None
        return Wav2Vec2FeatureExtractor.from_pretrained(self.folder, local_files_only=True)
