"""A film that a run makes to be looked at: the video, the last frames of its clips side by side, and how it drifts."""

import json
import os
from pathlib import Path

import numpy as np
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid

from ..video import save_video
from .quality import drift_figures


def save_film(
    path: str | os.PathLike, clips: list[np.ndarray], fps: int = 16, audio: str | os.PathLike | None = None
) -> dict[str, list[float]]:
    """Write a film, and beside it, with the suffixes `.png` and `.json`, a strip of last frames and its figures.

    Args:
        path: Of the video; its folder is made if need be.
        clips (`list[np.ndarray]` of shape `(frames, height, width, 3)` in [0, 1]): The film, clip by clip.
        fps (`int`, defaults to 16): Frames a second.
        audio (*optional*): A sound file, whose beginning goes along.

    Returns:
        `drift_figures` of the clips: lists with one number a clip.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_video(path, np.concatenate(clips), fps, audio)
    # To be looked at where no video plays.
    last = VaeImageProcessor.numpy_to_pil(np.stack([clip[-1] for clip in clips]))
    make_image_grid(last, rows=1, cols=len(last)).save(path.with_suffix(".png"))
    figures = drift_figures(clips)
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures
