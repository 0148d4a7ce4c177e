"""The encoder that hears for the audio modules: out of safetensors, and in float32 whatever the rest is in."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model


# As published for MultiTalk, and where its repository has the weights as safetensors.
# source: MultiTalk's README
ENCODER, REVISION = "TencentGameMate/chinese-wav2vec2-base", "refs/pr/1"


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
    name, revision = (ENCODER, REVISION) if source is None else (os.fspath(source), "main")
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
