"""Videos on disk."""

import itertools
import os
from collections.abc import Iterable
from contextlib import closing, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
import torch

from .checks import check_choice, check_number
from .files import written_whole
from .sound import Sound, Stretch


# Containers that H.264 goes into, by suffix, as FFmpeg calls them.
FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# What makes FFmpeg write the index before the frames.
INDEX_FIRST = {".mp4": {"movflags": "faststart"}, ".mkv": {"cues_to_front": "1"}}
# Frames from one that stands by itself to the next: what a player must read to begin in the middle.
LONGEST_GROUP = "250"
# What encoders need to write the same bytes in every run. Some have threads of their own, whatever FFmpeg is told; and
# where there is AVX-512, what x264's macroblock tree decides depends on where its buffers happen to lie.
REPRODUCIBLE = {
    "libx264": {"mbtree": "0"},
    "libx265": {"x265-params": "pools=none:frame-threads=1:log-level=error"},
    "libsvtav1": {"svtav1-params": "lp=1"},
}
# Of H.264: hardly to be told from the frames.
CONSTANT_RATE_FACTOR = 18


def save_video(
    path: str | os.PathLike,
    frames: np.ndarray | torch.Tensor | Iterable[PIL.Image.Image],
    fps: float = 16,
    audio: str | os.PathLike | None = None,
) -> None:
    """Write frames to a video file (H.264), whole or not at all: an error, a full disk say, leaves what was there.

    Args:
        path: Where to, `*.mp4`, `*.mov` or `*.mkv`.
        frames:
            As a film or a `Clip` has them: `np.ndarray` `(n, height, width, 3)`, or `torch.Tensor` `(n, 3, height,
            width)`, in [0, 1] or uint8, or any iterable of such frames or `PIL.Image.Image`s, which are asked for one
            by one. Height and width are even.
        fps (`float`, defaults to 16): Frames a second.
        audio (*optional*): A sound file, or a video with sound, whose beginning goes along.

    Raises:
        ValueError: for another suffix, other frames, or none, an `fps` that is not above 0, and a sound that cannot be
            read.
        OSError: if it cannot be written.
    """
    path = Path(path)
    check_choice("path.suffix", path.suffix, tuple(FORMATS))
    rate, form = frame_rate(fps), FORMATS[path.suffix]
    with nullcontext() if audio is None else closing(Sound(audio)) as sound, written_whole(path) as unfinished:
        encode_frames(unfinished, map(to_8_bits, frames), rate, container=form, sound=sound)


def frame_rate(fps: float) -> Fraction:
    """`fps` as video files have it. Raises a `ValueError` unless it is a finite number above 0."""
    if check_number("fps", fps) <= 0:
        raise ValueError(f"`fps` must be above 0, got {fps!r}.")
    return Fraction(fps).limit_denominator(1001)


def encode_frames(
    target: Path | BinaryIO,
    frames: Iterable[np.ndarray],
    fps: Fraction,
    codec: str = "libx264",
    crf: int | None = CONSTANT_RATE_FACTOR,
    pixel_format: str = "yuv420p",
    *,
    container: str = "mp4",
    start: int = 0,
    options: dict[str, str] | None = None,
    sound: Sound | None = None,
) -> None:
    """Encode frames by themselves: what comes out depends on them and on nothing else. One is held at a time.

    Args:
        target: Where to.
        frames (`Iterable[np.ndarray]` of shape `(height, width, 3)`, uint8): At least one.
        fps (`Fraction`): Frames a second.
        codec, crf, pixel_format, container: As FFmpeg calls them.
        start (`int`, defaults to 0): The number of the first frame, which gives it its time.
        options (`dict`, *optional*): Of the container.
        sound (`Sound`, *optional*): Of the film; what belongs to the frames goes along.

    Raises:
        ValueError: if there is none, or one is no picture of the size of the first, an even one for `yuv420p`.
    """
    import av

    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("`frames` must be RGB pictures, at least one, got none.")
    height, width, channels = first.shape
    if channels != 3 or not first.size or (pixel_format == "yuv420p" and (height % 2 or width % 2)):
        raise ValueError(
            "`frames` must be RGB pictures of even height and width, uint8 or in [0, 1], but the first is "
            f"{first.shape} (height, width, channels). For latents see `decode_latents`."
        )
    place = str(target) if isinstance(target, Path) else target
    with av.open(place, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        # With threads or frames that wait for later ones, two runs need not write the same.
        stream.options = {
            "bf": "0",
            "g": LONGEST_GROUP,
            **REPRODUCIBLE.get(codec, {}),
            **({} if crf is None else {"crf": str(crf)}),
        }
        stream.codec_context.thread_count = 1
        heard = None if sound is None else Stretch(sound, output, start / fps)
        for number, pixels in enumerate(itertools.chain([first], frames), start=start):
            if pixels.shape != first.shape:
                raise ValueError(
                    f"`frames` must be of one size, but number {number - start} is {pixels.shape} (height, width, "
                    f"channels), and the first {first.shape}."
                )
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, 1 / fps
            output.mux(stream.encode(frame))
            if heard is not None:
                for packet in heard.until((number + 1) / fps):
                    output.mux(packet)
        output.mux(stream.encode())


def remux(source: str | os.PathLike, path: str | os.PathLike, comment: str | None = None) -> None:
    """Write a video again, nothing encoded anew, with its index at the beginning; whole or not at all.

    Args:
        source: An MP4 or Matroska file.
        path: Where to; its suffix says as what.
        comment (`str`, *optional*): For its metadata.

    Raises:
        OSError: if it cannot be written.
    """
    import av

    path = Path(path)
    with (
        written_whole(path) as unfinished,
        av.open(os.fspath(source)) as film,
        av.open(str(unfinished), "w", format=FORMATS[path.suffix], options=INDEX_FIRST[path.suffix]) as output,
    ):
        if comment is not None:
            output.metadata["comment"] = comment
        streams = {stream: output.add_stream_from_template(stream) for stream in film.streams}
        for packet in film.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                output.mux(packet)


def to_8_bits(frame: np.ndarray | torch.Tensor | PIL.Image.Image) -> np.ndarray:
    """A frame as `(height, width, 3)` uint8, from floats in [0, 1] or uint8; what is none has another shape then."""
    if isinstance(frame, PIL.Image.Image):
        return np.asarray(frame.convert("RGB"))
    if isinstance(frame, torch.Tensor):
        frame = frame.cpu().movedim(0, -1) if frame.dtype == torch.uint8 else frame.float().cpu().movedim(0, -1)
    array = np.asarray(frame)
    if array.ndim != 3 or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        return np.zeros((0, 0, 0), np.uint8)
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array)
