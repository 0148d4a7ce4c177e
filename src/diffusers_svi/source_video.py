"""A video that a film goes on from: its frames, at the film's size and rate."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from .checks import check_count
from .frames import open_video
from .video import to_8_bits


# Frames that are decoded at a time.
CHUNK = 16
# What height and width of a film are multiples of.
MULTIPLE = 16

VideoLike = str | os.PathLike | np.ndarray | torch.Tensor | Sequence[PIL.Image.Image]


@dataclass(frozen=True)
class SourceVideo:
    """A video as a film goes on from it.

    Args:
        num_frames, height, width (`int`): Of the film's frames.
        read (`Callable`): From a list of numbers to these frames, `(n, height, width, 3)` uint8, of any size.
    """

    num_frames: int
    height: int
    width: int
    read: Callable[[list[int]], Any]

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        """Its frames from `start` on, `(height, width, 3)` uint8, a few of them in memory at a time."""
        for first in range(start, self.num_frames, CHUNK):
            for frame in self.read(list(range(first, min(first + CHUNK, self.num_frames)))):
                yield self._of_size(frame)

    def _of_size(self, frame: np.ndarray) -> np.ndarray:
        if frame.shape[:2] == (self.height, self.width):
            return frame
        fitted = PIL.ImageOps.fit(
            PIL.Image.fromarray(frame), (self.width, self.height), method=PIL.Image.Resampling.LANCZOS
        )
        return np.asarray(fitted)


def open_source_video(
    video: "VideoLike | SourceVideo", height: int | None = None, width: int | None = None, fps: int | None = None
) -> SourceVideo:
    """A video that a film can go on from.

    Args:
        video: A file, or frames as a film has them: `(n, height, width, 3)`, `(n, 3, height, width)` as a tensor, or
            images.
        height, width (`int`, *optional*):
            Of the film; by default the video's own, rounded down to multiples of 16. What does not fit is scaled, and
            cut at the sides.
        fps (`int`, *optional*): Of the film, for a file of another rate; its own frames if not given.

    A video that was opened before is handed back.

    Raises:
        ValueError: if it cannot be read, is damaged, has no frames or too small ones.
    """
    if isinstance(video, SourceVideo):
        return video
    if isinstance(video, (str, os.PathLike)):
        source = open_video(video, "").resampled(fps)
        num_frames, read = source.num_frames, source.read
    else:
        given = video
        num_frames = len(given)

        def read(numbers: list[int]) -> Any:
            return [to_8_bits(given[number]) for number in numbers]

    first = read([0])[0] if num_frames else np.zeros((0, 0, 3), np.uint8)
    sizes = {"height": (height, first.shape[0]), "width": (width, first.shape[1])}
    if first.shape[-1] != 3 or min(first.shape[:2]) < MULTIPLE:
        raise ValueError(
            f"`video` must have frames of at least {MULTIPLE} x {MULTIPLE} pixels, got {num_frames} of {first.shape} "
            "(height, width, channels)."
        )
    height, width = (
        own // MULTIPLE * MULTIPLE if wanted is None else check_count(name, wanted, MULTIPLE)
        for name, (wanted, own) in sizes.items()
    )
    return SourceVideo(num_frames, height, width, read)
