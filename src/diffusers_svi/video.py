"""Videos on disk."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from .checks import check_choice, check_number
from .files import written_whole


# Containers that H.264 goes into, by suffix, as FFmpeg calls them.
FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# Of H.264: hardly to be told from the frames.
CONSTANT_RATE_FACTOR = 18


def save_video(
    path: str | os.PathLike, frames: np.ndarray | torch.Tensor | Sequence[PIL.Image.Image], fps: float = 16
) -> None:
    """Write frames to a video file (H.264), whole or not at all: an error, a full disk say, leaves what was there.

    Args:
        path: Where to, `*.mp4`, `*.mov` or `*.mkv`.
        frames: As a film or a `Clip` has them: `np.ndarray` `(n, height, width, 3)` or `torch.Tensor` `(n, 3, height,
            width)`, both in [0, 1], or a list of `PIL.Image.Image`. Height and width are even.
        fps (`float`, defaults to 16): Frames a second.

    Raises:
        ValueError: for another suffix, other frames, or none, and an `fps` that is not above 0.
        OSError: if it cannot be written.
    """
    import av

    path = Path(path)
    check_choice("suffix of `path`", path.suffix, tuple(FORMATS))
    if check_number("fps", fps) <= 0:
        raise ValueError(f"`fps` must be above 0, got {fps!r}.")
    pixels = [_to_8_bits(frame) for frame in frames]
    shapes = {frame.shape for frame in pixels}
    height, width, channels = next(iter(shapes)) if len(shapes) == 1 else (0, 0, 0)
    if channels != 3 or height % 2 or width % 2 or not height * width:
        raise ValueError(
            "`frames` must be RGB pictures in [0, 1], of one size, of even height and width, and at least one, got "
            f"{len(pixels)} of {sorted(shapes)} (height, width, channels). For latents see `decode_latents`."
        )
    with written_whole(path) as unfinished, av.open(str(unfinished), "w", format=FORMATS[path.suffix]) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(CONSTANT_RATE_FACTOR)}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _to_8_bits(frame: np.ndarray | torch.Tensor | PIL.Image.Image) -> np.ndarray:
    """A frame as `(height, width, 3)` uint8; what is none has another shape then."""
    if isinstance(frame, PIL.Image.Image):
        return np.asarray(frame.convert("RGB"))
    array = frame.float().cpu().movedim(0, -1).numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        return np.zeros((0, 0, 0), np.uint8)
    return np.ascontiguousarray((array.clip(0, 1) * 255).round().astype(np.uint8))
