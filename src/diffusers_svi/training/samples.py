"""Samples of videos: a `SampleLayout` says which frames a sample takes, `Samples` cuts them.

A sample has a *clip*, the *history* just before it, and one *reference* frame. They are cut at random but always the
same: a sample depends on its video, the layout, the seed and its number, and on nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..checks import check_choice, check_count
from ..frames import Video
from ..pixels import from_uint8
from .augmentation import augment
from .cache import fingerprint


# Part of every key: to be raised whenever the same sample would come out differently.
VERSION = 2

# source: the limiting side of the authors' random crop, as a share of the largest that fits
SMALLEST_CROP = 13 / 14


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
        center_crop (`bool`, defaults to `False`):
            Whether the largest crop that fits is taken, from the middle: the whole frame if that has the wanted
            aspect. Else crops are at random, of 13/14 to all of that size.
        random_flip (`bool`, defaults to `False`): Whether half of the samples are mirrored, left to right.
        fps (`int`, *optional*):
            Frames a second that all videos are resampled to by [`Video.resampled`]; if not given, all have their own.

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
    center_crop: bool = False
    random_flip: bool = False
    fps: int | None = None

    def __post_init__(self) -> None:
        check_count("num_frames", self.num_frames, 1)
        if self.num_frames % 4 != 1:
            raise ValueError(f"`num_frames` must be 1, 5, 9, ..., got {self.num_frames}.")
        for name, least in (("height", 1), ("width", 1), ("history", 0), ("condition_frames", 1)):
            check_count(name, getattr(self, name), least)
        if self.condition_frames > self.num_frames:
            raise ValueError(
                f"`condition_frames`={self.condition_frames} must not exceed `num_frames`={self.num_frames}."
            )
        if self.fps is not None:
            check_count("fps", self.fps, 1)
        check_choice("reference", self.reference, ("inside", "outside", "before"))

    def num_needed(self) -> int:
        """Frames that a video must have."""
        return self.history + self.num_frames + (self.reference != "inside")

    def starts(self, num_frames: int) -> range:
        """The frames at which a clip can begin in a video of `num_frames`; none if it is too short."""
        if num_frames < self.num_needed():
            return range(0)
        return range(self.history + (self.reference == "before"), num_frames - self.num_frames + 1)


@dataclass(frozen=True)
class Cut:
    """Where a sample is cut from its video.

    Args:
        start (`int`): The frame that its clip begins with.
        reference (`int`): The reference frame.
        box (`tuple[int, int, int, int]`): Top, left, height and width of the crop, the same in all frames.
        is_mirrored (`bool`): Whether left and right are exchanged.
    """

    start: int
    reference: int
    box: tuple[int, int, int, int]
    is_mirrored: bool


class Samples(torch.utils.data.Dataset):
    r"""Samples cut from videos, as a map from their number to a dictionary.

    A sample holds `video`, float32 `(3, history + num_frames, height, width)` in [-1, 1], history first; `condition`,
    `(3, condition_frames, height, width)`, the first frames of the clip, augmented if the layout says so; `reference`,
    `(3, height, width)`; and its `caption` and `key`. Clips are of consecutive frames, at the layout's `fps`.

    Args:
        videos (`list[Video]`): Where samples come from.
        layout (`SampleLayout` or `Sequence[SampleLayout]`): What they consist of, all, or those of every video.
        seed (`int`): Of everything random.
        samples_per_video (`int`, defaults to 1): Samples `i * samples_per_video` and following are of video i.

    Raises:
        ValueError: if a video is too short, or cannot be resampled.
    """

    def __init__(
        self,
        videos: list[Video],
        layout: SampleLayout | Sequence[SampleLayout],
        seed: int,
        samples_per_video: int = 1,
    ):
        check_count("seed", seed, 0)
        check_count("samples_per_video", samples_per_video, 1)
        if not videos:
            raise ValueError("`videos` is empty: there is nothing to take samples from.")
        layouts = [layout] * len(videos) if isinstance(layout, SampleLayout) else list(layout)
        videos = [video.resampled(layout.fps) for video, layout in zip(videos, layouts, strict=True)]
        for video, layout in zip(videos, layouts, strict=True):
            if not layout.starts(video.num_frames):
                raise ValueError(
                    f"`videos`: {video.name} has {video.describe_length()}, but a sample of {layout} needs "
                    f"{layout.num_needed()}. Leave it out, as `usable_videos` does."
                )
        self.videos, self.layouts, self.seed, self.samples_per_video = videos, layouts, seed, samples_per_video

    def __len__(self) -> int:
        return len(self.videos) * self.samples_per_video

    def key(self, index: int) -> str:
        """What the cache calls sample `index`: the same in every run, whatever other videos there are."""
        video, layout, number = self._locate(index)
        return fingerprint("sample", VERSION, self.seed, number, video.fingerprint, video.num_frames, asdict(layout))

    def caption(self, index: int) -> str:
        """The prompt of sample `index`."""
        return self._locate(index)[0].caption

    def layout(self, index: int) -> SampleLayout:
        """What sample `index` consists of."""
        return self._locate(index)[1]

    def video(self, index: int) -> Video:
        """What sample `index` is cut from."""
        return self._locate(index)[0]

    def cut(self, index: int) -> Cut:
        """Where sample `index` is cut from its video."""
        return self._draw(index)[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        video, layout, _ = self._locate(index)
        cut, rng = self._draw(index)
        wanted = [*range(cut.start - layout.history, cut.start + layout.num_frames), cut.reference]
        pixels = video.read(wanted)
        assert len(pixels) == len(wanted)

        frames = cut_pictures(pixels, cut, layout)
        frames, reference = frames[:, :-1], frames[:, -1]
        condition = frames[:, layout.history : layout.history + layout.condition_frames].clone()
        if layout.augment:
            condition = augment(condition, rng)
        return {
            "video": frames.contiguous(),
            "condition": condition,
            "reference": reference.contiguous(),
            "caption": video.caption,
            "key": self.key(index),
        }

    def _draw(self, index: int) -> tuple[Cut, np.random.Generator]:
        """The cut of a sample, and the random numbers that come after it."""
        video, layout, number = self._locate(index)
        rng = np.random.default_rng(int(fingerprint(self.seed, video.fingerprint, number), 16))

        starts = layout.starts(video.num_frames)
        start = starts[rng.integers(len(starts))]
        indices = list(range(start - layout.history, start + layout.num_frames))
        if layout.reference == "inside":
            options = indices[layout.history :]
        else:
            options = list(range(indices[0]))
            if layout.reference == "outside":
                options += range(indices[-1] + 1, video.num_frames)
        reference = options[rng.integers(len(options))]
        size = video.read([start]).shape[1:3] if video.size is None else video.size
        box = crop_box((size[0], size[1]), layout, rng)
        return Cut(start, reference, box, layout.random_flip and bool(rng.random() < 0.5)), rng

    def _locate(self, index: int) -> tuple[Video, SampleLayout, int]:
        index, number = divmod(range(len(self))[index], self.samples_per_video)
        return self.videos[index], self.layouts[index], number


def crop_box(size: tuple[int, int], layout: SampleLayout, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of a frame of `size = (height, width)` at the layout's aspect.

    Its limiting side is at random between 13/14 and all of the largest that fits, and so is its place; with
    `center_crop` it is the largest, in the middle.
    """
    height, width = size
    by_height = height * layout.width <= width * layout.height
    limit = height if by_height else width
    if not layout.center_crop:
        limit = int(rng.integers(math.ceil(SMALLEST_CROP * limit), limit + 1))
    if by_height:
        crop_height, crop_width = limit, max(1, round(limit * layout.width / layout.height))
    else:
        crop_height, crop_width = max(1, round(limit * layout.height / layout.width)), limit
    room = height - crop_height, width - crop_width
    top, left = (r // 2 if layout.center_crop else int(rng.integers(r + 1)) for r in room)
    return top, left, crop_height, crop_width


def cut_pictures(pixels: np.ndarray, cut: Cut, layout: SampleLayout) -> torch.Tensor:
    """Pictures of the video's size, `(n, h, w, 3)` uint8, as a sample has them: `(3, n, height, width)` in [-1, 1]."""
    top, left, height, width = cut.box
    frames = _resize(pixels[:, top : top + height, left : left + width], layout.height, layout.width)
    return frames.flip(-1) if cut.is_mirrored else frames


def _resize(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    """From `(n, h, w, 3)` uint8 to `(3, n, height, width)` in [-1, 1]."""
    frames = torch.empty(len(pixels), 3, height, width)
    # One by one: all frames of a large video as floats would take gigabytes.
    for frame, picture in zip(frames, pixels, strict=True):
        picture = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
        resized = F.interpolate(picture, (height, width), mode="bilinear", antialias=True)[0]
        frame.copy_(from_uint8(resized).clamp(-1, 1))
    return frames.transpose(0, 1)
