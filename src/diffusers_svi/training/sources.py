"""Where videos and captions come from: folders with a CSV or JSONL file, and Hugging Face datasets.

Both give candidates; `usable_videos` opens them, and tells what can be trained on from what cannot.
"""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffusers.utils import logging
from tqdm.auto import tqdm

from ..frames import Video, open_source, open_video
from .buckets import choose_bucket, is_enlarged, nearest_in_aspect
from .lists import CAPTION_COLUMNS, VIDEO_COLUMNS, check_caption, find_beside, find_column, read_list
from .samples import SampleLayout


logger = logging.get_logger(__name__)

# Videos whose own rate is lower by more than this repeat frames; 23.976 instead of 24 is no such rate.
RATE_TOLERANCE = 1.01
# Videos that are named of each kind; of the others the number is told.
NUM_NAMES = 5


class Candidate(NamedTuple):
    """A video that has not been looked at yet. `open` raises a `ValueError` if it cannot be read."""

    name: str
    caption: str | None
    open: Callable[[], Video]


def open_folder(
    folder: str | os.PathLike,
    video_column: str | None = None,
    caption_column: str | None = None,
    condition: str | None = None,
    condition_column: str | None = None,
) -> list[Candidate]:
    """The videos of a folder, for `usable_videos`. See `read_list`."""
    return [
        Candidate(str(path.relative_to(folder)), caption, partial(_open_file, path, caption or "", beside))
        for path, caption, beside in read_list(folder, video_column, caption_column, condition, condition_column)
    ]


def open_dataset(
    name: str,
    config: str | None = None,
    split: str = "train",
    video_column: str | None = None,
    caption_column: str | None = None,
    condition: str | None = None,
    condition_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[Candidate]:
    """The videos of a Hugging Face dataset, for `usable_videos`.

    Args:
        name (`str`): Of the dataset on the Hub, or a local folder.
        config (`str`, *optional*): Its configuration.
        split (`str`, defaults to `"train"`): Its split.
        video_column, caption_column (`str`, *optional*):
            If not given, the only column of videos, or one of `VIDEO_COLUMNS`, and one of `CAPTION_COLUMNS`.
        condition, condition_column (`str`, *optional*):
            What they follow, as in `read_list`: in a column of paths, or one of sounds or videos that lie in files.
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
    video_column = find_column("video_column", video_column, VIDEO_COLUMNS, columns, name)
    caption_column = find_column("caption_column", caption_column, CAPTION_COLUMNS, columns, name)
    beside_column = find_beside(condition, condition_column, columns, name)
    besides: list[Path | None] = [None] * len(dataset)
    rows = dataset.select_columns([video_column]).cast_column(video_column, datasets.Video(decode=False))
    if condition is not None:
        files = rows
        if beside_column is not None:
            files, kind = dataset.select_columns([beside_column]), type(dataset.features[beside_column])
            if kind in (datasets.Audio, datasets.Video):
                files = files.cast_column(beside_column, kind(decode=False))
        column = beside_column or video_column
        besides = [_file_of(files, index, column, f"{name}, row {index}: {column!r}") for index in range(len(files))]
    candidates = []
    for index, caption in enumerate(dataset[caption_column]):
        title = f"{name}, row {index}"
        caption = check_caption(caption, f"{title}: {caption_column!r}")
        source = partial(_open_row, rows, index, video_column)
        candidates.append(Candidate(title, caption, partial(_open_source, source, title, caption, besides[index])))
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

    def describe(self) -> str:
        """Counts, and the first names of each kind."""
        kinds = {"too short": self.too_short, "unreadable": self.unreadable, "without caption": self.without_caption}
        parts = []
        for kind, names in kinds.items():
            if names:
                more = f"; and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else ""
                parts.append(f" {len(names)} {kind}: {'; '.join(names[:NUM_NAMES])}{more}.")
        return f"{len(self)} of {self.total} videos are not used.{''.join(parts)}"


def usable_videos(
    candidates: Iterable[Candidate], layout: SampleLayout | Sequence[SampleLayout], max_skipped_share: float = 0.1
) -> tuple[list[Video], Skipped]:
    """Open `candidates`, and tell those from which samples of `layout` can be taken from the others.

    With several layouts these are the ones for which [`choose_bucket`] finds one.

    Every video is decoded once, as many at a time as there are cores.

    Args:
        candidates: What `open_folder` or `open_dataset` found.
        layout (`SampleLayout` or `Sequence[SampleLayout]`):
            What is taken from every video, or from those of every bucket, which have one `fps`. Warnings tell how many
            have a lower rate, and how many are smaller.
        max_skipped_share (`float`, defaults to 0.1): Share of videos, in [0, 1], that may be of no use.

    Returns:
        The usable videos, resampled to the layout's `fps`, and the others by what is wrong with them, to be logged by
        the caller.

    Raises:
        ValueError: if more are of no use, or all.
    """
    if not 0 <= max_skipped_share <= 1:
        raise ValueError(f"`max_skipped_share` is a share in [0, 1], got {max_skipped_share!r}.")
    layouts = [layout] if isinstance(layout, SampleLayout) else list(layout)
    (fps,) = {layout.fps for layout in layouts}
    videos, skipped, num_slow, small = [], Skipped(), 0, []
    candidates = list(candidates)
    with ThreadPool() as pool:
        opened = zip(candidates, pool.imap(_open, candidates), strict=True)
        for candidate, whole in tqdm(opened, desc="Opening videos", total=len(candidates), leave=False):
            if whole is None:
                skipped.without_caption.append(candidate.name)
                continue
            if isinstance(whole, ValueError):
                skipped.unreadable.append(f"{candidate.name} ({whole})")
                continue
            video = whole.resampled(fps)
            chosen = choose_bucket(video, layouts)
            if chosen is None:
                needed = min(layout.num_needed() for layout in nearest_in_aspect(video, layouts))
                skipped.too_short.append(f"{candidate.name} ({video.describe_length()}, {needed} needed)")
                continue
            videos.append(video)
            num_slow += video.num_frames > RATE_TOLERANCE * whole.num_frames
            if is_enlarged(video, chosen):
                small.append(candidate.name)
    skipped.total = len(candidates)
    if not skipped.total:
        raise ValueError("`candidates` is empty: there is no video to train on.")
    if not videos or len(skipped) > max_skipped_share * skipped.total:
        raise ValueError(
            f"{skipped.describe()} At most a share of `max_skipped_share`={max_skipped_share} may be left out, and "
            "one must remain. Mend or remove them, use shorter clips, or raise `max_skipped_share`."
        )
    if num_slow:
        logger.warning(
            f"{num_slow} of {len(videos)} videos have fewer than `fps`={fps} frames a second: they repeat some."
        )
    if small:
        more = f"; and {len(small) - NUM_NAMES} more" if len(small) > NUM_NAMES else ""
        logger.warning(
            f"{len(small)} of {len(videos)} videos are smaller than their clips and are enlarged: "
            f"{'; '.join(small[:NUM_NAMES])}{more}."
        )
    return videos, skipped


def _open(candidate: Candidate) -> Video | ValueError | None:
    """The video, or what is wrong with it; `None` without a caption."""
    try:
        return None if candidate.caption is None else candidate.open()
    except ValueError as error:
        return error


def _open_file(path: Path, caption: str, beside: Path | None) -> Video:
    return replace(open_video(path, caption), beside=beside)


def _open_source(source: Callable[[], BinaryIO], name: str, caption: str | None, beside: Path | None) -> Video:
    return replace(open_source(source, name, caption or ""), beside=beside)


def _file_of(rows: Any, index: int, column: str, where: str) -> Path:
    """The file, or the folder, that a row of a dataset names."""
    value = rows[index][column]
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not os.path.exists(path):
        raise ValueError(
            f"{where} must name a file that is there, got {path!r}. Datasets that hold sounds or poses themselves are "
            "not read: write them to a folder of videos with a list."
        )
    return Path(path)


def _open_row(rows: Any, index: int, column: str) -> BinaryIO:
    value = rows[index][column] or {}
    if value.get("bytes") is not None:
        return io.BytesIO(value["bytes"])
    if value.get("path") is None:
        raise OSError("the row holds neither bytes nor a path")
    return open(value["path"], "rb")
