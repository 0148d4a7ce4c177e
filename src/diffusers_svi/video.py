"""Videos on disk."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

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
    path = Path(path)
    check_choice("suffix of `path`", path.suffix, tuple(FORMATS))
    rate = frame_rate(fps)
    pixels = [to_8_bits(frame) for frame in frames]
    _check_frames(pixels)
    with written_whole(path) as unfinished:
        encode_frames(unfinished, pixels, rate, container=FORMATS[path.suffix])


def frame_rate(fps: float) -> Fraction:
    """`fps` as video files have it. Raises a `ValueError` unless it is a finite number above 0."""
    if check_number("fps", fps) <= 0:
        raise ValueError(f"`fps` must be above 0, got {fps!r}.")
    return Fraction(fps).limit_denominator(1001)


def encode_frames(
    target: Path | BinaryIO,
    frames: Sequence[np.ndarray],
    fps: Fraction,
    codec: str = "libx264",
    crf: int = CONSTANT_RATE_FACTOR,
    pixel_format: str = "yuv420p",
    *,
    container: str = "mp4",
    start: int = 0,
    options: dict[str, str] | None = None,
) -> None:
    """Encode frames by themselves: what comes out depends on them and on nothing else.

    Args:
        target: Where to.
        frames (`Sequence[np.ndarray]` of shape `(height, width, 3)`, uint8): At least one.
        fps (`Fraction`): Frames a second.
        codec, crf, pixel_format, container: As FFmpeg calls them.
        start (`int`, defaults to 0): The number of the first frame, which gives it its time.
        options (`dict`, *optional*): Of the container.
    """
    import av

    _check_frames(frames)
    height, width, _ = frames[0].shape
    place = str(target) if isinstance(target, Path) else target
    with av.open(place, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        # With threads or frames that wait for later ones, two runs need not write the same.
        stream.options = {"crf": str(crf), "bf": "0", "g": str(len(frames))}
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames, start=start):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, 1 / fps
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def remux(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Write an MP4 again, nothing encoded anew, with its index at the beginning; whole or not at all."""
    import av

    with (
        written_whole(path) as unfinished,
        av.open(os.fspath(source)) as film,
        av.open(str(unfinished), "w", format="mp4", options={"movflags": "faststart"}) as output,
    ):
        streams = {stream: output.add_stream_from_template(stream) for stream in film.streams}
        for packet in film.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                output.mux(packet)


def to_8_bits(frame: np.ndarray | torch.Tensor | PIL.Image.Image) -> np.ndarray:
    """A frame as `(height, width, 3)` uint8; what is none has another shape then."""
    if isinstance(frame, PIL.Image.Image):
        return np.asarray(frame.convert("RGB"))
    array = frame.float().cpu().movedim(0, -1).numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        return np.zeros((0, 0, 0), np.uint8)
    return np.ascontiguousarray((array.clip(0, 1) * 255).round().astype(np.uint8))


def _check_frames(frames: Sequence[np.ndarray]) -> None:
    shapes = {frame.shape for frame in frames}
    height, width, channels = next(iter(shapes)) if len(shapes) == 1 else (0, 0, 0)
    if channels != 3 or height % 2 or width % 2 or not height * width:
        raise ValueError(
            "`frames` must be RGB pictures in [0, 1], of one size, of even height and width, and at least one, got "
            f"{len(frames)} of {sorted(shapes)} (height, width, channels). For latents see `decode_latents`."
        )
