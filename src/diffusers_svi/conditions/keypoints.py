"""Keypoints of a person in every frame, out of OpenPose's JSON or an .npz file, in one order.

OpenPose writes one JSON file a frame; other programs one with a list of frames. A frame is `{"people": [...]}`. Of the
first of its people these are read, each point as x, y, score:

- `pose_keypoints_2d`: 18 points (COCO), 20 (18 and two toes), 24 (18 and six points of the feet) or 25 (BODY_25);
- `foot_keypoints_2d`: six points of the feet, where there are 18 of the body;
- `hand_left_keypoints_2d`, `hand_right_keypoints_2d`: 21.

Faces are not drawn. Where `canvas_height` and `canvas_width` are given, points are in pixels of that canvas.

An .npz file has `body`, `(frames, 18, 20, 24 or 25, 3)`, and may have `hands`, `(frames, 2, 21, 3)`, the left one
first, and `size`, the height and width of the pictures that the points were found in. Nothing in it is unpickled.

With `rtmlib` (`pip install rtmlib onnxruntime`; it fetches its models itself) such a file comes out of a video thus:

    import av, numpy as np, rtmlib

    find, body, hands = rtmlib.Wholebody(to_openpose=True, backend="onnxruntime", device="cpu"), [], []
    for frame in av.open("dance.mp4").decode(video=0):
        points, scores = find(frame.to_ndarray(format="bgr24"))
        person = np.concatenate([points[0], scores[0][:, None]], 1) if len(points) else np.zeros((134, 3))
        body.append(person[:24])
        hands.append(person[92:134].reshape(2, 21, 3))
    np.savez("dance.npz", body=body, hands=hands, size=(frame.height, frame.width))
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import logging

from ..checks import check_count
from .skeleton import BODY, HAND, SEEN


logger = logging.get_logger(__name__)

# By how many points there are of a body: where those of OpenPose's order of 18 are, and the two of the toes of either
# foot; one that stands for both where there is only one.
LAYOUTS: dict[int, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = {
    18: (tuple(range(18)), ()),
    20: (tuple(range(18)), ((18, 18), (19, 19))),
    24: (tuple(range(18)), ((18, 19), (21, 22))),
    25: ((*range(8), *range(9, 19)), ((19, 20), (22, 23))),
}
ARRAYS = ("body", "hands", "size")


@dataclass(frozen=True)
class Keypoints:
    """Where the joints of a person are.

    Args:
        num_frames (`int`): How many frames there are.
        size (`tuple[int, int]`): Height and width of the pictures that they were found in.
        read (`Callable`):
            From the number of a frame to `body`, `(20, 3)`, and `hands`, `(2, 21, 3)`, x, y and score.
        fingerprint (`str`): SHA-256 of the files.
    """

    num_frames: int
    size: tuple[int, int]
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    fingerprint: str


def read_json(paths: list[Path], size: tuple[int, int] | None) -> Keypoints:
    """Keypoints of one file a frame, which are read again when they are asked for.

    Args:
        paths (`list[Path]`): Of the frames, in their order.
        size (`tuple[int, int]`, *optional*):
            Height and width of the pictures; `(1, 1)` if points count from 0 to 1. By default that of the canvas.

    Raises:
        ValueError: if one is no frame of OpenPose, or the size is not known or differs.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    size = _check_frames(((_parse(path), str(path)) for path in paths), size)

    def read(number: int) -> tuple[np.ndarray, np.ndarray]:
        return _person(_parse(paths[number]), str(paths[number]))

    return Keypoints(len(paths), size, read, digest.hexdigest())


def read_json_list(path: Path, size: tuple[int, int] | None) -> Keypoints:
    """Keypoints of one file with a list of frames, as [`read_json`]. All of it is in memory while it is opened."""
    frames = _parse(path)
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"`pose`={str(path)!r} must hold a list of OpenPose's frames, at least one.")
    named = [(frame, f"frame {number} of {path}") for number, frame in enumerate(frames)]
    size = _check_frames(named, size)
    people = [_person(frame, name) for frame, name in named]
    body, hands = (np.stack(arrays) for arrays in zip(*people, strict=True))
    return Keypoints(len(frames), size, lambda n: (body[n], hands[n]), hashlib.sha256(path.read_bytes()).hexdigest())


def read_npz(path: Path, size: tuple[int, int] | None) -> Keypoints:
    """Keypoints of an .npz file, as [`read_json`]; 70 MB of memory for an hour of 25 frames a second."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"`pose`={str(path)!r} cannot be read as keypoints: {error}") from error
    unknown = sorted(arrays.keys() - set(ARRAYS))
    if unknown or "body" not in arrays:
        raise ValueError(f"`pose`={str(path)!r} must hold `body`, and may hold `hands` and `size`, got {[*arrays]}.")
    body = arrays["body"]
    if body.ndim != 3 or not len(body) or body.shape[1] not in LAYOUTS or body.shape[2] != 3:
        raise ValueError(
            f"`body` in {path} must be (frames, points, 3), {[*LAYOUTS]} points with x, y and score, got {body.shape}."
        )
    hands = arrays.get("hands", np.zeros((len(body), 2, HAND, 3), np.float32))
    if hands.shape != (len(body), 2, HAND, 3):
        raise ValueError(f"`hands` in {path} must be {(len(body), 2, HAND, 3)}, got {hands.shape}.")
    if "size" in arrays:
        told = arrays["size"]
        if told.shape != (2,) or not (told >= 1).all():
            raise ValueError(f"`size` in {path} must be height and width, got {told!r}.")
        size = size or (int(told[0]), int(told[1]))
    body, hands = _in_order(body), hands.astype(np.float32)
    for number in range(len(body)):
        _check_points(body[number], hands[number], _known(size, str(path)), f"frame {number} of {path}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Keypoints(len(body), _known(size, str(path)), lambda n: (body[n], hands[n]), digest)


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`pose`: {path} cannot be read as JSON: {error}") from error


def _known(size: tuple[int, int] | None, name: str) -> tuple[int, int]:
    if size is None:
        raise ValueError(
            f"`pose`: {name} does not say how large the pictures were in which its keypoints were found. Pass "
            "`keypoint_size=(height, width)`, or `(1, 1)` if they count from 0 to 1."
        )
    return size


def _check_frames(frames: Iterable[tuple[Any, str]], size: tuple[int, int] | None) -> tuple[int, int]:
    """Size of the pictures, once every frame is known to be right."""
    told, crowded = size, []
    for frame, name in frames:
        if not isinstance(frame, dict) or not isinstance(frame.get("people"), list):
            raise ValueError(f'`pose`: {name} is no frame of OpenPose, which is `{{"people": [...]}}`.')
        if size is None:
            own = None
            if "canvas_height" in frame and "canvas_width" in frame:
                own = (
                    check_count(f"canvas_height of {name}", frame["canvas_height"], 1),
                    check_count(f"canvas_width of {name}", frame["canvas_width"], 1),
                )
            if told not in (None, own):
                raise ValueError(f"`pose`: {name} has a canvas of {own} (height, width), those before of {told}.")
            told = own
        _check_points(*_person(frame, name), _known(told, name), name)
        if len(frame["people"]) > 1:
            crowded.append(name)
    if crowded:
        logger.warning(f"`pose`: {len(crowded)} frames show several people, {crowded[0]} first. The first is drawn.")
    return _known(told, "it")


def _check_points(body: np.ndarray, hands: np.ndarray, size: tuple[int, int], name: str) -> None:
    points = np.concatenate([body, hands.reshape(-1, 3)])
    if not np.isfinite(points).all():
        raise ValueError(f"`pose`: {name} has keypoints that are no numbers. Give what is not seen a score of 0.")
    seen = points[points[:, 2] > SEEN]
    if len(seen) > 1 and seen[:, :2].max() <= 1 < max(size):
        raise ValueError(
            f"`pose`: all keypoints of {name} lie between 0 and 1, in a picture of {size} (height, width). Pass "
            "`keypoint_size=(1, 1)` if they are shares of it."
        )


def _person(frame: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Body and hands of the first of the people; zeros, which are not seen, if there is none."""
    person = frame["people"][0] if frame["people"] else {}
    body = _points(person, "pose_keypoints_2d", name)
    feet = _points(person, "foot_keypoints_2d", name)
    if len(body) == 18 and len(feet) == 6:
        body = np.concatenate([body, feet])
    if len(body) not in (0, *LAYOUTS):
        raise ValueError(f"`pose`: {name} has {len(body)} points of a body; there are layouts of {[*LAYOUTS]}.")
    hands = np.zeros((2, HAND, 3), np.float32)
    for number, side in enumerate(("left", "right")):
        points = _points(person, f"hand_{side}_keypoints_2d", name)
        if len(points) not in (0, HAND):
            raise ValueError(f"`pose`: {name} has {len(points)} points of the {side} hand, not {HAND}.")
        hands[number, : len(points)] = points
    return (_in_order(body[None])[0] if len(body) else np.zeros((BODY, 3), np.float32)), hands


def _points(person: Any, key: str, name: str) -> np.ndarray:
    try:
        return np.array(person.get(key) or [], np.float32).reshape(-1, 3)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`pose`: `{key}` of {name} is no list of x, y and score: {error}") from error


def _in_order(body: np.ndarray) -> np.ndarray:
    """`(frames, 18, 20, 24 or 25, 3)` as `(frames, 20, 3)`: toes are the middle of both, and seen if both are."""
    places, toes = LAYOUTS[body.shape[1]]
    ordered = np.zeros((len(body), BODY, 3), np.float32)
    ordered[:, :18] = body[:, list(places)]
    for foot, (big, small) in enumerate(toes):
        ordered[:, 18 + foot, :2] = (body[:, big, :2] + body[:, small, :2]) / 2
        ordered[:, 18 + foot, 2] = np.minimum(body[:, big, 2], body[:, small, 2])
    return ordered
