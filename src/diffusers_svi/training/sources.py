"""Where videos and captions come from: folders with a CSV or JSONL file, and Hugging Face datasets.

Both give candidates; `usable_videos` opens them, and tells what can be trained on from what cannot.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm.auto import tqdm

from .frames import Video, open_source, open_video
from .samples import SampleLayout


# Names of columns that are understood, in lower case; the first of both are those of the authors' CSV files.
VIDEO_COLUMNS = ("filename", "file_name", "video", "video_path", "path")
CAPTION_COLUMNS = ("video description", "text", "caption", "prompt")


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
        Candidate(str(path.relative_to(folder)), caption, partial(open_video, path, caption or ""))
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
        candidates.append(Candidate(title, caption, partial(open_source, source, title, caption or "")))
    return candidates


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
        if layout.starts(video.num_frames):
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


def _find_column(
    argument: str, given: str | None, known: tuple[str, ...], columns: list[str], where: str | Path
) -> str:
    if given is not None:
        if given not in columns:
            raise ValueError(f"`{argument}`={given!r} is no column of {where}, which has {columns}.")
        return given
    by_name = {column.strip().lower(): column for column in columns}
    for name in known:
        if name in by_name:
            return by_name[name]
    raise ValueError(f"{where} has no column named like one of {known}. Set `{argument}` to one of {columns}.")


def _caption(value: object, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {value!r}.")
    return (value or "").strip() or None


def _open_row(rows: Any, index: int, column: str) -> BinaryIO:
    value = rows[index][column] or {}
    if value.get("bytes") is not None:
        return io.BytesIO(value["bytes"])
    if value.get("path") is None:
        raise OSError("the row holds neither bytes nor a path")
    return open(value["path"], "rb")
