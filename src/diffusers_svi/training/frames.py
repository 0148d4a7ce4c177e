"""`Video`: a video file, how many frames it has, and any of these, read from near where they are."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np


@dataclass(frozen=True)
class Video:
    """One video that can be trained on.

    Args:
        name (`str`): For messages.
        caption (`str`): Its prompt.
        num_frames (`int`): How many frames it has.
        fingerprint (`str`): SHA-256 of its content, part of the keys of its samples.
        read (`Callable`): From any list of frame numbers to these frames, `(n, height, width, 3)` uint8.
    """

    name: str
    caption: str
    num_frames: int
    fingerprint: str
    read: Callable[[list[int]], np.ndarray]


def open_video(path: str | os.PathLike, caption: str) -> Video:
    """The video in a file. Raises a `ValueError` if it cannot be read."""
    return open_source(partial(_open_file, path), str(path), caption)


def open_source(source: Callable[[], BinaryIO], name: str, caption: str) -> Video:
    """The video in what `source` opens; `source` can be pickled, so that worker processes can read it too.

    Raises:
        ValueError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with source() as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    num_frames, index = _count_frames(source, name)
    return Video(name, caption, num_frames, digest.hexdigest(), partial(_read_frames, source, name, index))


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
    # The file is opened here rather than by FFmpeg, to which a path might be an address on the network.
    try:
        with source() as file, av.open(file) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError(f"{name} holds no video.")
            yield container, stream
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"{name} cannot be read as a video: {error}") from error


def _count_frames(source: Callable[[], BinaryIO], name: str) -> tuple[int, _Index | None]:
    """How many frames there are, and where; `None` if the file does not tell reliably."""
    with _open_stream(source, name) as (container, stream):
        packets = [
            (packet.pts, packet.is_keyframe, packet.pos, packet.is_discard or packet.is_corrupt)
            for packet in container.demux(stream)
            if packet.size
        ]
        told = stream.frames
    with _open_stream(source, name) as (container, stream):
        frames = ((frame.pts, frame.key_frame) for frame in container.decode(stream))
        first = next(frames, None)
        if first is None:
            return 0, None
        # What the container tells is believed if the file has it all and every packet is shown.
        if told and len(packets) == told and not any(hidden for *_, hidden in packets):
            shown = [(pts, key) for pts, key, *_ in packets]
            order = np.argsort(np.array([pts for pts, _ in shown], dtype=float))
            shown = [shown[place] for place in order]
        else:
            shown = [first, *frames]
    # None becomes a number that is neither above nor below another.
    timestamps = np.array([pts for pts, _ in shown], dtype=float)
    in_order = timestamps[0] == first[0] and bool((np.diff(timestamps) > 0).all())
    # Frames that share a place in the file (MPEG-PS) have timestamps that are guessed, and differently after seeking.
    places = {place for _, _, place, _ in packets} - {None}
    if not in_order or len(places) < len(packets):
        return len(shown), None
    return len(shown), _Index(timestamps.astype(np.int64), np.flatnonzero([key for _, key in shown]))


def _read_frames(source: Callable[[], BinaryIO], name: str, index: _Index | None, numbers: list[int]) -> np.ndarray:
    wanted = sorted(set(numbers))
    frames = {} if index is None else _read_by_index(source, name, index, wanted)
    missing = [number for number in wanted if number not in frames]
    if missing:
        with _open_stream(source, name) as (container, stream):
            number = -1
            for number, frame in enumerate(container.decode(stream)):
                if number in missing:
                    frames[number] = _pixels(frame)
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
                    found[target] = _pixels(frame)
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


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
