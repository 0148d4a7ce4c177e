"""What is trained on: videos with captions, the samples cut from them, and a cache of what encoders make of these.

A `Video` says how many frames it has and reads those it is asked for. A `SampleLayout` says which frames a sample
takes: a *clip*, the *history* just before it, and one *reference* frame. `Samples` cuts them, at random but always the
same: a sample depends on its video, the layout, the seed and its number, and on nothing else.
"""

import csv
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFilter
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .checks import check_count


# Names of columns that are understood, in lower case; the first of both are those of the authors' CSV files.
VIDEO_COLUMNS = ("filename", "file_name", "video", "video_path", "path")
CAPTION_COLUMNS = ("video description", "text", "caption", "prompt")

# Part of every key: to be raised whenever the same sample would come out differently.
VERSION = 1

# source: the limiting side of the authors' random crop, as a share of the largest that fits
SMALLEST_CROP = 13 / 14


@dataclass(frozen=True)
class Video:
    """One video that can be trained on.

    Args:
        name (`str`): For messages.
        caption (`str`): Its prompt.
        num_frames (`int`): How many frames it has.
        fingerprint (`str`): SHA-256 of its content, part of the keys of its samples.
        read (`Callable`): From any list of frame numbers to these frames, `(n, height, width, 3)` uint8.
        starts (`tuple[int, ...]`, *optional*): Frames at which a clip may begin; anywhere if not given.
        history_caption (`str`, *optional*): Prompt of what comes before the clip; its own if not given.
        first_start (`int`, *optional*):
            Frame at which the first clip of a film begins, if elsewhere than a clip that goes on: where that re-tells
            frames that its caption does not tell.
    """

    name: str
    caption: str
    num_frames: int
    fingerprint: str
    read: Callable[[list[int]], np.ndarray]
    starts: tuple[int, ...] | None = None
    history_caption: str | None = None
    first_start: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampleLayout:
    """Which frames a sample takes from a video, and their size.

    Args:
        num_frames (`int`): Frames of the clip, 1 + 4n.
        height, width (`int`): Size of all frames in pixels.
        history (`int`, defaults to 0): Frames just before the clip that are needed as well.
        reference (`str`, defaults to `"inside"`):
            Where the reference frame comes from: `"inside"` the clip, `"outside"` of clip and history, or `"before"`
            both.
        augment (`bool`, defaults to `False`): Whether the condition frames are strongly augmented.
        condition_frames (`int`, defaults to 1): Frames at the start of the clip that become the condition.
        crop (`bool`, defaults to `True`):
            Whether crops are random; else the largest that fits is taken from the middle, which is the whole frame if
            that has the wanted aspect.

    Raises:
        ValueError: for a value out of its range.
    """

    num_frames: int
    height: int
    width: int
    history: int = 0
    reference: str = "inside"
    augment: bool = False
    condition_frames: int = 1
    crop: bool = True

    def __post_init__(self):
        check_count("num_frames", self.num_frames, 1)
        if self.num_frames % 4 != 1:
            raise ValueError(f"`num_frames` must be 1, 5, 9, ..., got {self.num_frames}.")
        for name, least in (("height", 1), ("width", 1), ("history", 0), ("condition_frames", 1)):
            check_count(name, getattr(self, name), least)
        if self.condition_frames > self.num_frames:
            raise ValueError(
                f"`condition_frames`={self.condition_frames} must not exceed `num_frames`={self.num_frames}."
            )
        if self.reference not in ("inside", "outside", "before"):
            raise ValueError(f"`reference` must be 'inside', 'outside' or 'before', got {self.reference!r}.")

    def num_needed(self) -> int:
        """Frames that a video must have."""
        return self.history + self.num_frames + (self.reference != "inside")

    def starts(self, video: Video) -> Sequence[int]:
        """The frames of `video` at which a clip can begin; none if it is too short."""
        first = self.history + (self.reference == "before")
        last = video.num_frames - self.num_frames
        if video.num_frames < self.num_needed():
            return ()
        if video.starts is None:
            return range(first, last + 1)
        return [start for start in video.starts if first <= start <= last]


# Where videos come from


class Candidate(NamedTuple):
    """A video that has not been looked at yet. `open` raises a `ValueError` if it cannot be read."""

    name: str
    caption: str | None
    open: Callable[[], Video]


def read_captions(
    folder: str | os.PathLike, video_column: str | None = None, caption_column: str | None = None
) -> list[tuple[Path, str | None]]:
    """The videos that a folder's CSV or JSONL file lists, with their captions; `None` where that is missing or empty.

    The file is `<folder name>.csv`, as the authors have it, or else the only `*.csv` or `*.jsonl` of the folder.

    Args:
        folder: The folder; paths in the file are relative to it.
        video_column, caption_column (`str`, *optional*):
            Their columns; if not given, they are found by name among `VIDEO_COLUMNS` and `CAPTION_COLUMNS`.

    Raises:
        ValueError: if there is no such file or more than one, if it is malformed or has no such columns, or if a path
            leads out of the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder`={str(folder)!r} is not a folder.")
    file = folder / f"{folder.resolve().name}.csv"
    if not file.is_file():
        files = sorted([*folder.glob("*.csv"), *folder.glob("*.jsonl")])
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise ValueError(
                f"`folder`={str(folder)!r} must hold {file.name}, or exactly one file *.csv or *.jsonl, that lists "
                f"videos and captions; found {found}."
            )
        (file,) = files
    rows = _read_rows(file)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    video_column = _find_column("video_column", video_column, VIDEO_COLUMNS, columns, file)
    caption_column = _find_column("caption_column", caption_column, CAPTION_COLUMNS, columns, file)
    captions = []
    for line, row in rows.items():
        path = row.get(video_column)
        if not isinstance(path, str) or not path.strip():
            raise ValueError(f"{file}, line {line}: {video_column!r} must be the path of a video, got {path!r}.")
        path = os.path.normpath(path.strip())
        if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
            raise ValueError(
                f"{file}, line {line}: {video_column!r} must be a path within the folder of the file, got {path!r}."
            )
        captions.append((folder / path, _caption(row.get(caption_column), f"{file}, line {line}: {caption_column!r}")))
    return captions


def open_folder(
    folder: str | os.PathLike, video_column: str | None = None, caption_column: str | None = None
) -> list[Candidate]:
    """The videos of a folder, for `usable_videos`. See `read_captions`."""
    return [
        Candidate(str(path.relative_to(folder)), caption, partial(open_video, path, caption))
        for path, caption in read_captions(folder, video_column, caption_column)
    ]


def open_dataset(
    name: str,
    config: str | None = None,
    split: str = "train",
    video_column: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[Candidate]:
    """The videos of a Hugging Face dataset, for `usable_videos`.

    Args:
        name (`str`): Of the dataset on the Hub, or a local folder.
        config (`str`, *optional*): Its configuration.
        split (`str`, defaults to `"train"`): Its split.
        video_column, caption_column (`str`, *optional*):
            If not given, the only column of videos, or one of `VIDEO_COLUMNS`, and one of `CAPTION_COLUMNS`.
        cache_dir (*optional*): Where downloads are kept.

    Raises:
        ValueError: if there are no such columns; and what `datasets.load_dataset` raises.
    """
    import datasets

    dataset = datasets.load_dataset(name, config, split=split, cache_dir=None if cache_dir is None else str(cache_dir))
    columns = dataset.column_names
    videos = [column for column in columns if isinstance(dataset.features[column], datasets.Video)]
    if video_column is None and len(videos) == 1:
        (video_column,) = videos
    video_column = _find_column("video_column", video_column, VIDEO_COLUMNS, columns, name)
    caption_column = _find_column("caption_column", caption_column, CAPTION_COLUMNS, columns, name)
    rows = dataset.select_columns([video_column]).cast_column(video_column, datasets.Video(decode=False))
    candidates = []
    for index, caption in enumerate(dataset[caption_column]):
        title = f"{name}, row {index}"
        caption = _caption(caption, f"{title}: {caption_column!r}")
        source = partial(_open_row, rows, index, video_column)
        candidates.append(Candidate(title, caption, partial(_open_source, source, title, caption)))
    return candidates


def open_video(path: str | os.PathLike, caption: str) -> Video:
    """The video in a file. Raises a `ValueError` if it cannot be read."""
    return _open_source(partial(open, path, "rb"), str(path), caption)


@dataclass
class Skipped:
    """The videos that are not used, by name, of `total`."""

    too_short: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)
    total: int = 0

    def __len__(self) -> int:
        return len(self.too_short) + len(self.unreadable) + len(self.without_caption)

    def describe(self, num_names: int = 5) -> str:
        """Counts, and the first names of each kind."""
        kinds = {"too short": self.too_short, "unreadable": self.unreadable, "without caption": self.without_caption}
        parts = []
        for kind, names in kinds.items():
            if names:
                more = f"; and {len(names) - num_names} more" if len(names) > num_names else ""
                parts.append(f" {len(names)} {kind}: {'; '.join(names[:num_names])}{more}.")
        return f"{len(self)} of {self.total} videos are not used.{''.join(parts)}"


def usable_videos(
    candidates: Iterable[Candidate], layout: SampleLayout, max_skipped_share: float = 0.1
) -> tuple[list[Video], Skipped]:
    """Open `candidates`, and tell those from which samples of `layout` can be taken from the others.

    Args:
        candidates: What `open_folder` or `open_dataset` found.
        layout (`SampleLayout`): What is taken from every video.
        max_skipped_share (`float`, defaults to 0.1): Share of videos, in [0, 1], that may be of no use.

    Returns:
        The usable videos, and the others by what is wrong with them, to be logged by the caller.

    Raises:
        ValueError: if more are of no use, or all.
    """
    if not 0 <= max_skipped_share <= 1:
        raise ValueError(f"`max_skipped_share` is a share in [0, 1], got {max_skipped_share!r}.")
    videos, skipped = [], Skipped()
    for candidate in tqdm(candidates, desc="Opening videos", leave=False):
        skipped.total += 1
        if candidate.caption is None:
            skipped.without_caption.append(candidate.name)
            continue
        try:
            video = candidate.open()
        except ValueError as error:
            skipped.unreadable.append(f"{candidate.name} ({error})")
            continue
        if layout.starts(video):
            videos.append(video)
        else:
            skipped.too_short.append(f"{candidate.name} ({video.num_frames} frames, {layout.num_needed()} needed)")
    if not skipped.total:
        raise ValueError("`candidates` is empty: there is no video to train on.")
    if not videos or len(skipped) > max_skipped_share * skipped.total:
        raise ValueError(
            f"{skipped.describe()} At most a share of `max_skipped_share`={max_skipped_share} may be left out, and "
            "one must remain. Mend or remove them, use shorter clips, or raise `max_skipped_share`."
        )
    return videos, skipped


def _read_rows(file: Path) -> dict[int, dict]:
    """The rows of a CSV or JSONL file, by the number of the line on which they end."""
    rows = {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            if file.suffix == ".csv":
                reader = csv.DictReader(stream, strict=True)
                for row in reader:
                    rows[reader.line_num] = row
                    if None in row:
                        raise ValueError(f"line {reader.line_num} has too many fields; quote text with commas")
            else:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        rows[number] = json.loads(line)
                        if not isinstance(rows[number], dict):
                            raise ValueError(f"line {number} is not an object")
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read as a list of videos: {error}.") from error
    if not rows:
        raise ValueError(f"{file} lists no video.")
    return rows


def _find_column(argument: str, given: str | None, known: tuple[str, ...], columns: list[str], where) -> str:
    if given is not None:
        if given not in columns:
            raise ValueError(f"`{argument}`={given!r} is no column of {where}, which has {columns}.")
        return given
    by_name = {column.strip().lower(): column for column in columns}
    for name in known:
        if name in by_name:
            return by_name[name]
    raise ValueError(f"{where} has no column named like one of {known}. Set `{argument}` to one of {columns}.")


def _caption(value, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {value!r}.")
    return (value or "").strip() or None


# Video files


def _open_row(rows, index: int, column: str) -> BinaryIO:
    import io

    value = rows[index][column] or {}
    if value.get("bytes") is not None:
        return io.BytesIO(value["bytes"])
    if value.get("path") is None:
        raise OSError("the row holds neither bytes nor a path")
    return open(value["path"], "rb")


def _open_source(source: Callable[[], BinaryIO], name: str, caption: str) -> Video:
    digest = hashlib.sha256()
    try:
        with source() as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    num_frames = _count_frames(source, name)
    return Video(name, caption, num_frames, digest.hexdigest(), partial(_read_frames, source, name))


@contextmanager
def _open_stream(source: Callable[[], BinaryIO], name: str):
    # The file is opened here rather than by FFmpeg, to which a path might be an address on the network.
    import av

    try:
        with source() as file, av.open(file) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError(f"{name} holds no video.")
            yield container, stream
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"{name} cannot be read as a video: {error}") from error


def _count_frames(source: Callable[[], BinaryIO], name: str) -> int:
    with _open_stream(source, name) as (container, stream):
        packets = [packet.is_discard or packet.is_corrupt for packet in container.demux(stream) if packet.size]
        told = stream.frames
    with _open_stream(source, name) as (container, stream):
        frames = container.decode(stream)
        # What the container tells is believed if the file has it all and every packet is shown.
        if told and len(packets) == told and not any(packets):
            return told if next(frames, None) is not None else 0
        return sum(1 for _ in frames)


def _read_frames(source: Callable[[], BinaryIO], name: str, indices: list[int]) -> np.ndarray:
    frames, wanted, index = {}, set(indices), -1
    with _open_stream(source, name) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                frames[index] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            if len(frames) == len(wanted):
                break
        else:
            missing = sorted(wanted - frames.keys())
            if missing:
                raise ValueError(f"{name} has no frames {missing}; only {index + 1} can be decoded.")
    return np.stack([frames[index] for index in indices])


# Samples


class Samples(torch.utils.data.Dataset):
    r"""Samples cut from videos, as a map from their number to a dictionary.

    A sample holds `video`, float32 `(3, history + num_frames, height, width)` in [-1, 1], history first; `condition`,
    `(3, condition_frames, height, width)`, the first frames of the clip, augmented if the layout says so; `reference`,
    `(3, height, width)`; and its `caption` and `key`. Clips are of consecutive frames at the video's own rate. If the
    video has a `first_start`, `first` is the clip `(3, num_frames, height, width)` that begins there.

    Args:
        videos (`list[Video]`): Where samples come from.
        layout (`SampleLayout`): What they consist of.
        seed (`int`): Of everything random.
        samples_per_video (`int`, defaults to 1): Samples `i * samples_per_video` and following are of video i.

    Raises:
        ValueError: if a video is too short.
    """

    def __init__(self, videos: list[Video], layout: SampleLayout, seed: int, samples_per_video: int = 1):
        check_count("seed", seed, 0)
        check_count("samples_per_video", samples_per_video, 1)
        if not videos:
            raise ValueError("`videos` is empty: there is nothing to take samples from.")
        for video in videos:
            if not layout.starts(video):
                raise ValueError(
                    f"`videos`: {video.name} has {video.num_frames} frames and `starts`={video.starts}, in which no "
                    f"sample of {layout} fits. Leave it out, as `usable_videos` does."
                )
        self.videos, self.layout, self.seed, self.samples_per_video = videos, layout, seed, samples_per_video

    def __len__(self) -> int:
        return len(self.videos) * self.samples_per_video

    def key(self, index: int) -> str:
        """What the cache calls sample `index`: the same in every run, whatever other videos there are."""
        video, number = self._locate(index)
        parts = [self.seed, number, video.fingerprint, video.num_frames, video.starts, asdict(self.layout)]
        # Only then: what was cached before keeps its key.
        if video.first_start is not None:
            parts.append(video.first_start)
        return fingerprint("sample", VERSION, *parts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        video, number = self._locate(index)
        layout = self.layout
        rng = np.random.default_rng(int(fingerprint(self.seed, video.fingerprint, number), 16))

        starts = layout.starts(video)
        start = starts[rng.integers(len(starts))]
        indices = list(range(start - layout.history, start + layout.num_frames))
        if layout.reference == "inside":
            options = indices[layout.history :]
        else:
            options = list(range(indices[0]))
            if layout.reference == "outside":
                options += range(indices[-1] + 1, video.num_frames)
        first = [] if video.first_start is None else range(video.first_start, video.first_start + layout.num_frames)
        wanted = [*indices, options[rng.integers(len(options))], *first]
        pixels = video.read(wanted)
        assert len(pixels) == len(wanted)

        top, left, height, width = crop_box(pixels.shape[1:3], layout, rng)
        frames = _resize(pixels[:, top : top + height, left : left + width], layout.height, layout.width)
        frames, reference, first = frames.tensor_split([len(indices), len(indices) + 1], dim=1)
        condition = frames[:, layout.history : layout.history + layout.condition_frames].clone()
        if layout.augment:
            condition = augment(condition, rng)
        sample = {
            "video": frames.contiguous(),
            "condition": condition,
            "reference": reference[:, 0].contiguous(),
            "caption": video.caption,
            "key": self.key(index),
        }
        if video.first_start is not None:
            sample["first"] = first.contiguous()
        return sample

    def _locate(self, index: int) -> tuple[Video, int]:
        index, number = divmod(range(len(self))[index], self.samples_per_video)
        return self.videos[index], number


def crop_box(size: tuple[int, int], layout: SampleLayout, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of a frame of `size = (height, width)` at the layout's aspect.

    Its limiting side is at random between 13/14 and all of the largest that fits, and so is its place.
    """
    height, width = size
    by_height = height * layout.width <= width * layout.height
    limit = height if by_height else width
    if layout.crop:
        limit = int(rng.integers(math.ceil(SMALLEST_CROP * limit), limit + 1))
    if by_height:
        crop_height, crop_width = limit, max(1, round(limit * layout.width / layout.height))
    else:
        crop_height, crop_width = max(1, round(limit * layout.height / layout.width)), limit
    room = height - crop_height, width - crop_width
    top, left = (int(rng.integers(r + 1)) if layout.crop else r // 2 for r in room)
    return top, left, crop_height, crop_width


def _resize(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    """From `(n, h, w, 3)` uint8 to `(3, n, height, width)` in [-1, 1]."""
    frames = torch.empty(len(pixels), 3, height, width)
    # One by one: all frames of a large video as floats would take gigabytes.
    for frame, picture in zip(frames, pixels, strict=True):
        picture = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
        frame.copy_(F.interpolate(picture, (height, width), mode="bilinear", antialias=True)[0])
    return frames.div_(127.5).sub_(1).clamp_(-1, 1).transpose(0, 1)


def augment(frames: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Strong augmentation of condition frames, `(3, n, height, width)` in [-1, 1]; the same for all of them.

    Colour jitter with probability 0.7: brightness, contrast and saturation by 0.7 to 1.3, hue by up to a tenth of the
    circle. Gaussian blur with probability 0.5, up to 2 pixels at a short side of 480. A change of sharpness with
    probability 0.5, between smooth (0) and twice as sharp.
    """
    jitter, blur, sharpen = rng.random(3) < (0.7, 0.5, 0.5)
    factors, hue = rng.uniform(0.7, 1.3, size=3), rng.uniform(-0.1, 0.1)
    radius, sharpness = rng.uniform(0.1, 2.0) * min(frames.shape[2:]) / 480, rng.uniform(0.0, 2.0)
    if not (jitter or blur or sharpen):
        return frames
    pictures = []
    for frame in frames.unbind(1):
        picture = PIL.Image.fromarray(((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        if jitter:
            for enhance, factor in zip(("Brightness", "Contrast", "Color"), factors, strict=True):
                picture = getattr(PIL.ImageEnhance, enhance)(picture).enhance(factor)
            hsv = np.array(picture.convert("HSV"))
            hsv[..., 0] = (hsv[..., 0].astype(int) + round(hue * 256)) % 256
            picture = PIL.Image.fromarray(hsv, mode="HSV").convert("RGB")
        if blur:
            picture = picture.filter(PIL.ImageFilter.GaussianBlur(radius))
        if sharpen:
            picture = PIL.ImageEnhance.Sharpness(picture).enhance(sharpness)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(pictures, dim=1).float() / 127.5 - 1


# The cache


def fingerprint(*parts) -> str:
    """SHA-256, 64 hexadecimal digits, of `parts`: bytes, or anything that JSON can hold (the order of keys is not)."""
    digest = hashlib.sha256()
    for part in parts:
        kind, content = (b"b", part) if isinstance(part, bytes) else (b"j", json.dumps(part, sort_keys=True).encode())
        digest.update(kind + len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()


class TensorCache:
    """A folder of tensors by key. Several processes may use it at once, and may be killed at any time.

    Args:
        folder: Where to; it is made when the first entry is saved.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def path(self, key: str) -> Path:
        """Where the entry of `key`, a `fingerprint`, is or will be."""
        if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
            raise ValueError(f"`key` must be a `fingerprint`, 64 hexadecimal digits, got {key!r}.")
        return self.folder / key[:2] / f"{key}.safetensors"

    def save(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write an entry, whole or not at all. One that was there is replaced."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.parent / f".{key}.{uuid.uuid4().hex}.tmp"
        # Parts of larger tensors would be refused or saved with the whole.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, key: str) -> dict[str, torch.Tensor]:
        """Read an entry. Raises a `FileNotFoundError` if there is none and a `ValueError` if it is damaged."""
        path = self.path(key)
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it, and it is made anew.") from error
