"""Pose pictures of a film, one a frame: out of a video, pictures, arrays, or drawn from keypoints, when asked for.

They are not fitted to the person in the start image: let the pose begin as the image shows them. UniAnimate's script
`run_align_pose.py` scales limbs to that end.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import logging

from ..checks import check_choice, check_count
from ..frames import open_video
from ..start_image import OVERSHOOT, RESIZE_MODES, SEEN_CHANGE
from ..video import to_8_bits
from .keypoints import Keypoints, read_json, read_json_list, read_npz
from .rows import ROW_FILES, bounds, read_rows
from .skeleton import COLORS, draw_skeleton


logger = logging.get_logger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KEYPOINTS = (".json", ".npz")

PoseLike = str | os.PathLike | np.ndarray | torch.Tensor | Sequence[PIL.Image.Image]
# From numbers of frames to these frames, `(height, width, 3)` uint8.
Read = Callable[[list[int]], Sequence[np.ndarray] | np.ndarray]


class Poses:
    """Pose pictures: `len(...)` of them, and `[start:stop]` as `(n, height, width, 3)` uint8.

    Args:
        num_frames (`int`): How many there are.
        read (`Callable`): From numbers of frames to these frames, of the film's size.
        size (`tuple[int, int]`): Height and width of the film.
        fingerprint (`str`): SHA-256 of what they are made of.
    """

    def __init__(self, num_frames: int, read: Read, size: tuple[int, int], fingerprint: str):
        self._num_frames, self._read, self._size, self.fingerprint = num_frames, read, size, fingerprint

    def __len__(self) -> int:
        return self._num_frames

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last = bounds(rows, len(self))
        frames = self._read(list(range(first, last))) if first < last else []
        return np.stack([*frames]) if len(frames) else np.zeros((0, *self._size, 3), np.uint8)


def open_pose(
    pose: PoseLike | Poses,
    height: int,
    width: int,
    fps: int | None = None,
    resize_mode: str = "pad",
    keypoint_size: tuple[int, int] | None = None,
    colors: str = COLORS[0],
) -> Poses:
    """What a film follows of a pose: `len(...)` pictures, one a film frame, and `[start:stop]` of them.

    Args:
        pose: One of
            - a video file of finished pose pictures;
            - a folder of pictures, or of OpenPose's JSON files, one a frame, with consecutive numbers in their names;
            - a JSON file with a list of frames, or an .npz file, see `keypoints.py`;
            - an .npy or safetensors file with frames, see [`read_rows`];
            - frames: `(n, height, width, 3)`, `(n, 3, height, width)` as a tensor, in [0, 1] or uint8, or images.

            What was opened before is handed back.
        height, width (`int`): Of the film.
        fps (`int`, *optional*): Of the film, for a video file of another rate; its own frames if not given. Pictures
            and keypoints are always one a film frame.
        resize_mode (`str`, defaults to `"pad"`):
            What happens to poses of another aspect than the film's, which is told: `"pad"` adds black, as published,
            `"crop"` cuts off what does not fit, on both sides, `"stretch"` distorts.
        keypoint_size (`tuple[int, int]`, *optional*):
            Height and width of the pictures in which keypoints were found, where their file does not say; `(1, 1)` if
            they are shares, which are stretched over the film.
        colors (`str`, defaults to `"published"`): Of skeletons, see [`draw_skeleton`].

    Raises:
        ValueError: if it cannot be read, holds nothing, or cannot be what it is taken for; the message says what to
            do.
    """
    if isinstance(pose, Poses):
        return pose
    size = check_count("height", height, 1), check_count("width", width, 1)
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    check_choice("colors", colors, COLORS)
    fps = None if fps is None else check_count("fps", fps, 1)
    if keypoint_size is not None:
        if not isinstance(keypoint_size, (tuple, list)) or len(keypoint_size) != 2:
            raise ValueError(f"`keypoint_size` must be `(height, width)`, got {keypoint_size!r}.")
        rows, columns = keypoint_size
        keypoint_size = check_count("keypoint_size[0]", rows, 1), check_count("keypoint_size[1]", columns, 1)
    if not isinstance(pose, (str, os.PathLike)):
        return _resized(*_from_frames(pose), size, resize_mode)
    path = Path(pose)
    suffix = path.suffix.lower()
    paths = _numbered(path) if path.is_dir() else []
    if paths and paths[0].suffix.lower() in PICTURES:
        return _resized(*_from_pictures(paths), size, resize_mode)
    if suffix in ROW_FILES and not paths:
        return _resized(*_from_frames(read_rows(path, "pose")), size, resize_mode)
    if paths or suffix in KEYPOINTS:
        points = read_json(paths, keypoint_size) if paths else KEYPOINT_READERS[suffix](path, keypoint_size)
        return _drawn(points, size, resize_mode, colors)
    video = open_video(path, "").resampled(fps)
    (first,) = video.read([0])
    return _resized(video.num_frames, video.read, first.shape[:2], f"{video.fingerprint} {fps}", size, resize_mode)


KEYPOINT_READERS = {".json": read_json_list, ".npz": read_npz}


def _from_frames(frames: Sequence | np.ndarray | torch.Tensor) -> tuple[int, Read, tuple[int, int], str]:
    """Number, reader, size and fingerprint of frames in memory, or mapped into it."""
    if not isinstance(frames, (np.ndarray, torch.Tensor, list, tuple)) or not len(frames):
        raise ValueError(
            "`pose` must be a path, frames (n, height, width, 3), a tensor (n, 3, height, width), or images, at least "
            f"one, got {type(frames).__name__}."
        )
    digest, shape = hashlib.sha256(), None
    for number, frame in enumerate(frames):
        floats = isinstance(frame, torch.Tensor) and frame.is_floating_point()
        if floats or (isinstance(frame, np.ndarray) and np.issubdtype(frame.dtype, np.floating)):
            least, most = float(frame.min()), float(frame.max())
            if not -OVERSHOOT <= least <= most <= 1 + OVERSHOOT:
                raise ValueError(f"`pose` has values from {least:g} to {most:g} in frame {number}, not in [0, 1].")
        pixels = to_8_bits(frame)
        shape = pixels.shape if shape is None else shape
        if pixels.shape != shape or pixels.shape[-1] != 3 or not pixels.size:
            raise ValueError(
                f"`pose` must be RGB pictures of one size, but frame {number} is {np.shape(frame)}, or of a type that "
                "is none of a picture."
            )
        digest.update(pixels.tobytes())
    assert shape is not None
    digest.update(str(shape).encode())
    return (
        len(frames),
        lambda numbers: [to_8_bits(frames[number]) for number in numbers],
        (shape[0], shape[1]),
        digest.hexdigest(),
    )


def _from_pictures(paths: list[Path]) -> tuple[int, Read, tuple[int, int], str]:
    """The same of files of pictures, of which only the sizes are read at first."""
    digest = hashlib.sha256()
    sizes: dict[tuple[int, int], str] = {}
    for path in paths:
        digest.update(path.read_bytes())
        try:
            with PIL.Image.open(path) as image:
                sizes.setdefault((image.height, image.width), path.name)
                transparent = image.has_transparency_data
        except OSError as error:
            raise ValueError(f"`pose`: {path} cannot be read as a picture: {error}") from error
        if transparent:
            raise ValueError(f"`pose`: {path} has transparent pixels, which have no colour. Lay it on black.")
    if len(sizes) > 1:
        raise ValueError(f"`pose`: its pictures are of several sizes (height, width), first seen in {sizes}.")
    return len(paths), partial(_read_pictures, paths), next(iter(sizes)), digest.hexdigest()


def _read_pictures(paths: list[Path], numbers: list[int]) -> list[np.ndarray]:
    frames = []
    for number in numbers:
        try:
            with PIL.Image.open(paths[number]) as image:
                frames.append(to_8_bits(image))
        except OSError as error:
            raise ValueError(f"`pose`: {paths[number]} cannot be read as a picture: {error}") from error
    return frames


def _numbered(folder: Path) -> list[Path]:
    """Files of a folder by the last number in their names; all are pictures, or all are JSON."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    kinds = {"picture" if path.suffix.lower() in PICTURES else path.suffix.lower() for path in files}
    if kinds not in ({"picture"}, {".json"}):
        names = ", ".join(path.name for path in files[:3]) or "nothing"
        raise ValueError(
            f"`pose`: the folder {folder} must hold pictures ({', '.join(PICTURES)}) or OpenPose's .json files and "
            f"nothing else, but holds {names}{', ...' if len(files) > 3 else ''}."
        )
    numbers = {path: [int(digits) for digits in re.findall(r"\d+", path.stem)][-1:] for path in files}
    ordered = sorted(files, key=lambda path: numbers[path])
    for before, after in pairwise(ordered):
        if not numbers[before] or numbers[after][0] != numbers[before][0] + 1:
            raise ValueError(
                f"`pose`: names in {folder} must tell the numbers of frames, each one more than that before, but "
                f"{after.name} comes after {before.name}."
            )
    return ordered


def _resized(
    num_frames: int, read: Read, own: tuple[int, ...], fingerprint: str, size: tuple[int, int], resize_mode: str
) -> Poses:
    """Pictures of the size `own`, brought to the film's."""
    _tell_of_aspect((own[0], own[1]), size, resize_mode)
    resizes: dict[str, Callable[..., PIL.Image.Image]] = {
        "pad": PIL.ImageOps.pad,
        "crop": PIL.ImageOps.fit,
        "stretch": PIL.Image.Image.resize,
    }
    resize = resizes[resize_mode]

    def fitted(numbers: list[int]) -> list[np.ndarray]:
        frames = [np.asarray(frame) for frame in read(numbers)]
        if own[:2] == size:
            return frames
        images = map(PIL.Image.fromarray, frames)
        return [np.asarray(resize(image, size[::-1], PIL.Image.Resampling.BILINEAR)) for image in images]

    return Poses(num_frames, fitted, size, _digest(fingerprint, size, resize_mode))


def _drawn(points: Keypoints, size: tuple[int, int], resize_mode: str, colors: str) -> Poses:
    """Skeletons, drawn at the film's size."""
    if points.size == (1, 1):
        resize_mode = "stretch"
    _tell_of_aspect(points.size, size, resize_mode)
    scales = size[1] / points.size[1], size[0] / points.size[0]
    if resize_mode != "stretch":
        scales = ((min if resize_mode == "pad" else max)(scales),) * 2
    scale = np.array([*scales, 1.0])
    margin = np.array([(size[1] - scales[0] * points.size[1]) / 2, (size[0] - scales[1] * points.size[0]) / 2, 0])

    def draw(numbers: list[int]) -> list[np.ndarray]:
        people = (points.read(number) for number in numbers)
        return [draw_skeleton(body * scale + margin, hands * scale + margin, *size, colors) for body, hands in people]

    return Poses(points.num_frames, draw, size, _digest(points.fingerprint, points.size, size, resize_mode, colors))


def _tell_of_aspect(own: tuple[int, int], size: tuple[int, int], resize_mode: str) -> None:
    change = (own[0] * size[1]) / (own[1] * size[0])
    if own != (1, 1) and max(change, 1 / change) > 1 + SEEN_CHANGE:
        done = {"pad": "black is added", "crop": "their sides are cut off", "stretch": "they are distorted"}
        logger.warning(
            f"`pose` has pictures of {own[0]} x {own[1]}, the film {size[0]} x {size[1]} (height x width): "
            f"{done[resize_mode]}, as `resize_mode`={resize_mode!r} says."
        )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
