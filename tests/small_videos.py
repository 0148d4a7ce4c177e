"""Small videos of which every frame tells its number, and every pixel its place."""

import csv
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from diffusers_svi.frames import Video
from diffusers_svi.training.cache import fingerprint


# Frames are of one grey each, brighter from one to the next, so that their number can be read from any crop.
STEP = 4


def write_numbered(
    path: Path,
    num_frames: int = 40,
    height: int = 48,
    width: int = 64,
    rate: int = 8,
    milliseconds: list[int] | None = None,
) -> Path:
    """`num_frames` at `rate` frames a second, or frames that are shown from so many `milliseconds` on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {} if path.suffix == ".mkv" else {"qp": "0"}
        if milliseconds:
            num_frames, stream.codec_context.time_base = len(milliseconds), Fraction(1, 1000)
        for index in range(num_frames):
            pixels = np.full((height, width, 3), STEP * index, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(pixels) -> list[int]:
    """The numbers of frames `(3, n, height, width)` in [-1, 1] or `(n, height, width, 3)` uint8."""
    if isinstance(pixels, torch.Tensor):
        pixels = ((pixels + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    return np.round(pixels.mean(axis=(1, 2, 3)) / STEP).astype(int).tolist()


def write_rows(path: Path, *rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path.parent


def ramp(height: int, width: int, indices: list[int]) -> np.ndarray:
    """Frames that tell of each pixel where it is: y in red, x in green, the number of the frame in blue."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([np.stack([y, x, np.full_like(x, index)], axis=-1) for index in indices]).astype(np.uint8)


def ramp_video(num_frames: int = 40, height: int = 120, width: int = 160, **fields) -> Video:
    read = partial(ramp, height, width)
    return Video(
        **{"name": "ramp", "caption": "a ramp", "fingerprint": fingerprint("ramp"), **fields},
        read=read,
        num_frames=num_frames,
    )
