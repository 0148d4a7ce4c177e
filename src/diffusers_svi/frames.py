"""`Video`: a video file, how many frames it has, and any of these, read from near where they are.

All of it is decoded once when it is opened, so that one which is damaged is known before anything is made of it.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np


# What FFmpeg may open: containers that hold their frames themselves. A playlist names files and addresses.
CONTAINERS = ("mov", "matroska", "avi", "mpeg", "mpegts", "ogg", "flv", "asf", "gif", "h264", "hevc")

# Matroska and AVI tell how long a film is; so many seconds less are taken for a tail that was cut off.
LONGEST_MISSING = Fraction(1, 2)

# Pixels of real videos are up to twice as wide as they are high.
MOST_STRETCHED = 4

# A transport stream consists of packets that begin with this byte, at one of these distances from its end.
SYNC_BYTE, PACKET_SIZES = 0x47, (188, 204)


class Times(NamedTuple):
    """When the frames of a video are shown, and when the last one ends: one more than there are frames, in `unit`s."""

    ticks: np.ndarray
    unit: Fraction


@dataclass(frozen=True)
class Video:
    """One video that can be trained on.

    Args:
        name (`str`): For messages.
        caption (`str`): Its prompt.
        num_frames (`int`): How many frames it has.
        fingerprint (`str`): SHA-256 of its content, part of the keys of its samples.
        read (`Callable`):
            From any list of frame numbers to these frames, `(n, height, width, 3)` uint8, upright and with square
            pixels.
        times (`Times`, *optional*): When its frames are shown.
        fps (`int`, *optional*): What it was resampled to, in frames a second; its own frames if not given.
        size (`tuple[int, int]`, *optional*): Height and width of its frames, as `read` gives them.
        beside (`Path`, *optional*): A file, or a folder, of what it follows: its sound, or its poses.
    """

    name: str
    caption: str
    num_frames: int
    fingerprint: str
    read: Callable[[list[int]], np.ndarray]
    times: Times | None = field(default=None, repr=False, compare=False)
    fps: int | None = None
    size: tuple[int, int] | None = None
    beside: Path | None = None

    def describe_length(self) -> str:
        """For messages: how many frames it has, and at what rate if it was resampled."""
        return f"{self.num_frames} frames" + (f" at {self.fps} a second" if self.fps else "")

    def resampled(self, fps: int | None) -> "Video":
        """The same video at `fps` frames a second; as it is for `None`.

        Its frames are those that FFmpeg's filter `fps` gives: each is shown from the tick nearest to its time until
        that of the next one, so some are repeated, or left out.

        Raises:
            ValueError: if it is not known when its frames are shown.
        """
        if fps == self.fps or fps is None:
            return self
        if self.times is None:
            raise ValueError(f"{self.name} cannot be resampled to {fps} frames a second: its frames have no times.")
        ticks, scale = self.times.ticks - self.times.ticks[0], 2 * self.times.unit * fps
        # Rounded, and halves up, in whole numbers.
        starts = (ticks * scale.numerator + scale.denominator) // (2 * scale.denominator)
        num_frames = max(1, int(starts[-1]))
        read = partial(_read_resampled, self.read, starts[:-1], num_frames, self.name)
        return replace(self, num_frames=num_frames, read=read, times=None, fps=fps)


def open_video(path: str | os.PathLike, caption: str) -> Video:
    """The video in a file. Raises a `ValueError` if it cannot be read, or is damaged."""
    return open_source(partial(_open_file, path), str(path), caption)


def open_source(source: Callable[[], BinaryIO], name: str, caption: str) -> Video:
    """The video in what `source` opens; `source` can be pickled, so that worker processes can read it too.

    All of it is decoded. It counts as damaged if the decoder says so of any frame, if it conceals an error in one, or
    if the file is shorter than it tells.

    Raises:
        ValueError: if it cannot be read, is damaged, is in none of the `CONTAINERS`, or if the size of its frames
            changes.
    """
    digest, tail = hashlib.sha256(), b""
    try:
        with source() as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
                tail = (tail + chunk)[-max(PACKET_SIZES) :]
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    times, index, size = _decode_all(source, name, tail)
    num_frames, read = len(times.ticks) - 1, partial(_read_frames, source, name, index)
    return Video(name, caption, num_frames, digest.hexdigest(), read, times, size=size)


def _open_file(path: str | os.PathLike) -> BinaryIO:
    return open(path, "rb")


class _Index(NamedTuple):
    """Where the frames of a file are: their timestamps, in the order they are shown in, and which are keyframes."""

    timestamps: np.ndarray
    keys: np.ndarray

    def number(self, frame: av.VideoFrame) -> int:
        """Of a frame, by its timestamp; -1 if no frame has it."""
        places = np.flatnonzero(self.timestamps == frame.pts)
        return int(places[0]) if len(places) else -1


@contextmanager
def _open_stream(source: Callable[[], BinaryIO], name: str) -> Iterator[tuple[Any, Any]]:
    # The file is opened here rather than by FFmpeg, which may open nothing itself: neither files nor addresses.
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": ""}
    try:
        with source() as file, av.open(file, container_options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError(f"{name} holds no video.")
            if stream.codec_context is None:
                raise ValueError(f"{name} holds a video of a kind that FFmpeg has no decoder for.")
            yield container, stream
    except av.ArgumentError as error:
        # What FFmpeg says of a container that is not on the list.
        kinds = ", ".join(CONTAINERS)
        raise ValueError(f"{name} cannot be read as a video: it is none of {kinds} ({error}).") from error
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"{name} cannot be read as a video: {error}") from error


def _decode_all(
    source: Callable[[], BinaryIO], name: str, tail: bytes
) -> tuple[Times, _Index | None, tuple[int, int]]:
    """When all frames are shown; where they are, `None` if the file does not tell; their height and width.

    The file ends with `tail`.
    """
    places, frames, sizes, end = [], [], set(), Fraction(0)
    with _open_stream(source, name) as (container, stream):
        _be_strict(stream)
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None:
                end = max(end, (time + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index != stream.index:
                continue
            if packet.size:
                places.append(packet.pos)
            decoded = packet.decode()
            for frame in decoded:
                shown = frame
                frames.append((frame.pts, frame.key_frame, frame.duration))
                sizes.add((frame.width, frame.height))
            if packet.is_corrupt or any(frame.is_corrupt for frame in decoded):
                raise ValueError(f"{name} is damaged: about frame {len(frames)} something is missing or wrong.")
        aspect = stream.sample_aspect_ratio or 1
        if not 1 / MOST_STRETCHED <= aspect <= MOST_STRETCHED:
            raise ValueError(f"{name} tells of pixels {aspect} times as wide as they are high: that is no video.")
        if not frames:
            raise ValueError(f"{name} holds no frame that can be decoded.")
        if len(sizes) > 1:
            raise ValueError(f"{name} has frames of several sizes, {sorted(sizes)} (width, height).")
        size = _shown_size(shown, stream)
        lengths = {
            "matroska,webm": Fraction(container.duration or 0, av.time_base),
            "avi": stream.frames * stream.time_base,
        }
        stated = lengths.get(container.format.name, 0)
        if end + LONGEST_MISSING < stated:
            raise ValueError(f"{name} is damaged: it ends after {float(end):.1f} of {float(stated):.1f} seconds.")
        starts = {tail[-size] for size in PACKET_SIZES if size <= len(tail)}
        if container.format.name == "mpegts" and SYNC_BYTE not in starts:
            raise ValueError(f"{name} is damaged: its last packet is not whole.")
        # What is shown for how long where the file does not say.
        unit, rate = stream.time_base, stream.guessed_rate or Fraction(25)

    # None becomes a number that is neither above nor below another.
    timestamps = np.array([pts for pts, _, _ in frames], dtype=float)
    if np.isnan(timestamps).any() or (np.diff(timestamps) < 0).any():
        return Times(np.arange(len(frames) + 1), 1 / rate), None, size
    ticks = timestamps.astype(np.int64)
    times = Times(np.append(ticks, ticks[-1] + (frames[-1][2] or round(1 / (rate * unit)))), unit)
    if (np.diff(ticks) == 0).any():
        return times, None, size
    # Frames that share a place in the file (MPEG-PS) have timestamps that are guessed, and differently after seeking.
    if len({*places} - {None}) < len(places):
        return times, None, size
    return times, _Index(ticks, np.flatnonzero([is_key for _, is_key, _ in frames])), size


def _be_strict(stream: Any) -> None:
    """Let the decoder of a stream tell of all damage that it sees."""
    # With several frames at once, what is seen of one may come too late for it.
    stream.thread_type = "NONE"
    # Frames that lack what they refer to are marked as corrupt instead of left out.
    stream.codec_context.flags |= av.codec.context.Flags.output_corrupt
    if stream.codec_context.name == "hevc":
        # This decoder keeps its errors to itself. The others' checks go too far: a comment in a wrong form is one.
        stream.codec_context.options = {"err_detect": "explode"}


def _read_frames(source: Callable[[], BinaryIO], name: str, index: _Index | None, numbers: list[int]) -> np.ndarray:
    wanted = sorted(set(numbers))
    frames = {} if index is None else _read_by_index(source, name, index, wanted)
    missing = [number for number in wanted if number not in frames]
    if missing:
        with _open_stream(source, name) as (container, stream):
            number = -1
            for number, frame in enumerate(container.decode(stream)):
                if number in missing:
                    frames[number] = _pixels(frame, stream)
                if number == missing[-1]:
                    break
        missing = [number for number in wanted if number not in frames]
        if missing:
            raise ValueError(f"{name} has no frames {missing}; only {number + 1} can be decoded.")
    return np.stack([frames[number] for number in numbers])


def _read_by_index(
    source: Callable[[], BinaryIO], name: str, index: _Index, wanted: list[int]
) -> dict[int, np.ndarray]:
    """The frames of `wanted`, in ascending order, as far as they are found where the index has them."""
    found: dict[int, np.ndarray] = {}
    decoded: Iterator[tuple[int, av.VideoFrame]] = iter(())
    number = -1
    with _open_stream(source, name) as (container, stream):
        for target in wanted:
            keys = index.keys[index.keys <= target]
            # Going on is as good as seeking until there is a keyframe on the way.
            if keys.max(initial=-1) > number:
                decoded = _decode_from(container, stream, index, keys)
            for number, frame in decoded:
                if number == target:
                    found[target] = _pixels(frame, stream)
                if number >= target:
                    break
            if target not in found:
                break
    return found


def _decode_from(container: Any, stream: Any, index: _Index, keys: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
    """Numbered frames from the last of `keys` on, or the one before; none where seeking does not lead there."""
    # Where packets are found by the time they are decoded at, seeking the keyframe before leads to the one wanted.
    for key in keys[:-3:-1]:
        if len(keys) > 1:
            container.seek(int(index.timestamps[key]), stream=stream)
        frames = ((index.number(frame), frame) for frame in container.decode(stream))
        first = next(frames, None)
        if first is not None and first[0] in keys:
            return chain([first], frames)
    return iter(())


def _pixels(frame: av.VideoFrame, stream: Any) -> np.ndarray:
    """Upright, and as wide as it is shown where pixels are not square."""
    width = _shown_width(frame, stream)
    return np.rot90(frame.to_ndarray(format="rgb24", width=width), round(frame.rotation / 90))


def _shown_size(frame: av.VideoFrame, stream: Any) -> tuple[int, int]:
    """Height and width of its `_pixels`."""
    size = frame.height, _shown_width(frame, stream)
    return size[::-1] if round(frame.rotation / 90) % 2 else size


def _shown_width(frame: av.VideoFrame, stream: Any) -> int:
    return max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))


def _read_resampled(
    read: Callable[[list[int]], np.ndarray], starts: np.ndarray, num_frames: int, name: str, numbers: list[int]
) -> np.ndarray:
    missing = sorted(number for number in {*numbers} if not 0 <= number < num_frames)
    if missing:
        raise ValueError(f"{name} has no frames {missing}; resampled it has only {num_frames}.")
    return read((np.searchsorted(starts, numbers, side="right") - 1).tolist())
