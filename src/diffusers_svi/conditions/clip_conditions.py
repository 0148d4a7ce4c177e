"""What clips that are trained on hear or see: cut where they are, out of what their videos follow, and cached.

Rows come from `open_audio` and `open_pose`, as they do for films: row n belongs to frame n of the video, at the rate
of the clips.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..frames import Video
from ..pixels import to_uint8
from ..sound import sound_delay
from ..training.cache import TensorCache, fingerprint
from ..training.samples import Cut, SampleLayout, Samples, cut_pictures
from .audio import num_rows, open_audio
from .audio_encoder import AudioEncoder, hear
from .pose import open_pose
from .rows import ROW_FILES, Rows
from .voice import Voice
from .windows import film_rows, heard_rows


# Part of every key: to be raised whenever the same rows would come out differently.
VERSION = 1
# So many seconds less than the video a condition may last: the last row holds, as at the end of a film.
MISSING = 0.25
# Seconds that the sound in a video may begin before or after its picture: two frames or so.
LATE = 0.1


@dataclass(frozen=True)
class Measured:
    """What is known of a condition before it is encoded.

    Args:
        fingerprint (`str`): Of its content.
        length (`int`): Rows, one a frame of the video.
        may_be_longer (`bool`): Whether it may go on after the video; rows without times would be of another rate.
        row_values (`int`, *optional*): How many numbers a row of audio has, layers times channels.
    """

    fingerprint: str
    length: int
    may_be_longer: bool = False
    row_values: int | None = None


class ClipConditions(Protocol):
    """How the conditions of clips of one kind, "audio" or "pose", are read."""

    kind: str
    # Whether worker processes may read them.
    in_workers: bool

    def settings(self) -> list[Any]:
        """What rows depend on beside their source, anything that JSON can hold."""

    def measure(self, video: Video) -> Measured:
        """Raises a `ValueError` if it cannot be read."""

    def open(self, video: Video) -> Rows: ...

    def clip(self, rows: Rows, cut: Cut, layout: SampleLayout) -> torch.Tensor:
        """What a clip hears or sees."""


class ClipAudio:
    """Rows of audio, of a clip those that its frames hear: `(num_frames + window - 1, layers, channels)` float32.

    Args:
        fps (`int`): Frames a second of the clips.
        window (`int`): Rows that a frame hears.
        encoder (`AudioEncoder`, *optional*): Of sounds. Features that were computed before need none.
    """

    kind, in_workers = "audio", False

    def __init__(self, fps: int, window: int, encoder: AudioEncoder | None = None) -> None:
        self.fps, self.window, self.encoder = fps, window, encoder

    def settings(self) -> list[Any]:
        return [self.fps, self.window, None if self.encoder is None else self.encoder.fingerprint]

    def measure(self, video: Video) -> Measured:
        if _has_rows(video):
            features = open_audio(str(video.beside))
            _, layers, channels = features.shape
            return Measured(features.fingerprint, len(features), row_values=layers * channels)
        if self.encoder is None:
            raise ValueError(
                "a sound needs an encoder: give `--audio_encoder`, a Wav2Vec2 model such as "
                "TencentGameMate/chinese-wav2vec2-base, or features that were computed before (.npy, .safetensors)"
            )
        delay = sound_delay(str(video.beside))
        if abs(delay) > LATE:
            raise ValueError(
                f"the sound in it begins {delay:.2f} seconds after the picture, and row n belongs to frame n: write "
                "it anew with both from the beginning (`ffmpeg -i in.mp4 -af aresample=async=1:first_pts=0 out.mp4`)"
            )
        voice = Voice(str(video.beside))
        return Measured(voice.fingerprint, num_rows(voice, self.fps), True, self.encoder.row_values)

    def open(self, video: Video) -> Rows:
        assert video.beside is not None
        return hear(video.beside, self.encoder, self.fps)

    def clip(self, rows: Rows, cut: Cut, layout: SampleLayout) -> torch.Tensor:
        return heard_rows(rows, cut.start, layout.num_frames, self.window)


class ClipPoses:
    """Pictures of poses, of a clip `(num_frames, height, width, 3)` uint8, cropped as its frames are.

    Args:
        fps (`int`, *optional*): Frames a second of the clips, to which videos of poses are resampled.
    """

    kind, in_workers = "pose", True

    def __init__(self, fps: int | None) -> None:
        self.fps = fps

    def settings(self) -> list[Any]:
        return [self.fps]

    def measure(self, video: Video) -> Measured:
        poses = self.open(video)
        return Measured(poses.fingerprint, len(poses))

    def open(self, video: Video) -> Rows:
        size = video.read([0]).shape[1:3] if video.size is None else video.size
        return open_pose(str(video.beside), size[0], size[1], self.fps)

    def clip(self, rows: Rows, cut: Cut, layout: SampleLayout) -> torch.Tensor:
        pictures = film_rows(rows, cut.start, layout.num_frames).numpy()
        return to_uint8(cut_pictures(pictures, cut, layout)).permute(1, 2, 3, 0).contiguous()


def encode_conditions(
    samples: Samples,
    conditions: ClipConditions,
    cache: TensorCache,
    num_workers: int = 0,
    row_values: int | None = None,
) -> list[str]:
    """The conditions of all samples, in the cache, under the kind of condition; every process adds its share.

    Args:
        samples (`Samples`): What is trained on; their videos tell what lies beside them.
        conditions (`ClipConditions`): How that is read.
        cache (`TensorCache`): Where they are kept.
        num_workers (`int`, defaults to 0): Processes that read them, where these may.
        row_values (`int`, *optional*): Numbers that a row of audio must have.

    Returns:
        Keys of the cache, one a sample.

    Raises:
        ValueError: if one cannot be read, is shorter than its video, or of another rate.
    """
    state = PartialState()
    measured = measure_all(samples.videos, conditions, row_values)
    keys = [
        fingerprint(
            *("condition", VERSION, conditions.kind, samples.key(index), *conditions.settings()),
            measured[index // samples.samples_per_video].fingerprint,
        )
        for index in range(len(samples))
    ]
    missing = [index for index, key in enumerate(keys) if key not in cache]
    # No process may look for what another one has already written.
    state.wait_for_everyone()
    if missing:
        with state.split_between_processes(missing) as share:
            clips = Subset(_Clips(samples, conditions), share)
            loader = DataLoader(clips, batch_size=None, num_workers=num_workers if conditions.in_workers else 0)
            progress = tqdm(loader, desc=f"Encoding {conditions.kind}", disable=not state.is_main_process, leave=False)
            for index, rows in zip(share, progress, strict=True):
                cache.save(keys[index], {conditions.kind: rows})
    state.wait_for_everyone()
    return keys


class _Clips(Dataset):
    """What the clips of samples follow; samples of one video come one after the other."""

    def __init__(self, samples: Samples, conditions: ClipConditions):
        self._samples, self._conditions = samples, conditions
        self._opened: tuple[Video, Rows] | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        video = self._samples.video(index)
        if self._opened is None or self._opened[0] is not video:
            self._opened = video, self._conditions.open(video)
        return self._conditions.clip(self._opened[1], self._samples.cut(index), self._samples.layout(index))


def measure_all(videos: Sequence[Video], conditions: ClipConditions, row_values: int | None = None) -> list[Measured]:
    """What is known of the conditions of all videos, each of which has been read once.

    Raises:
        ValueError: as [`encode_conditions`].
    """
    with ThreadPool() as pool:
        measured = list(
            tqdm(
                pool.imap(partial(_measure, conditions), videos),
                desc=f"Opening {conditions.kind}",
                total=len(videos),
                leave=False,
            )
        )
    for video, found in zip(videos, measured, strict=True):
        where = f"`{conditions.kind}` of {video.name} ({os.fspath(video.beside or '')})"
        row_values = found.row_values if row_values is None else row_values
        if found.row_values != row_values:
            raise ValueError(
                f"{where} has rows of {found.row_values} values, layers times channels, but the modules, or the "
                f"videos before, have {row_values}: use one `--audio_encoder`, that of the modules."
            )
        allowed = 1 if video.fps is None else max(1, round(MISSING * video.fps))
        if found.length < video.num_frames - allowed:
            raise ValueError(
                f"{where} has {found.length} rows, a row a frame, but the video has {video.describe_length()}: it "
                "ends too early. Lengthen it, or cut the video where it ends."
            )
        if found.length > video.num_frames + allowed and not found.may_be_longer:
            raise ValueError(
                f"{where} has {found.length} rows, but the video has {video.describe_length()}, and row n belongs to "
                "frame n: is it of another rate? Compute it at `--fps`, or train with the rate that it has."
            )
    return measured


def _measure(conditions: ClipConditions, video: Video) -> Measured:
    try:
        return conditions.measure(video)
    except ValueError as error:
        raise ValueError(f"`{conditions.kind}` of {video.name} cannot be used: {error}") from error


def _has_rows(video: Video) -> bool:
    assert video.beside is not None
    return video.beside.suffix.lower() in ROW_FILES
