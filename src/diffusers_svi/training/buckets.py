"""Buckets: clips of several sizes and lengths in one training, in batches of one of them each."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import cycle, islice

from torch.utils.data import BatchSampler, Sampler

from ..frames import Video
from .samples import SampleLayout


def read_buckets(buckets: Sequence[str], num_frames: int) -> list[str]:
    """Buckets as they are given, "832x480" or "832x480x49", all with their frames: "832x480x81".

    Args:
        buckets (`Sequence[str]`): Width x height, or width x height x frames.
        num_frames (`int`): Frames of those that do not say.

    Raises:
        ValueError: if one is nothing like that, or is given twice.
    """
    read = [bucket if bucket.count("x") == 2 else f"{bucket}x{num_frames}" for bucket in buckets]
    for given, bucket in zip(buckets, read, strict=True):
        if not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}){2}", bucket):
            raise ValueError(
                f"`--buckets`: give width x height, or x frames too, 832x480 or 832x480x81; got {given!r}."
            )
        frames = int(bucket.split("x")[2])
        if frames % 4 != 1:
            raise ValueError(f"`--buckets`: clips have 1 + 4n frames, {frames // 4 * 4 + 1} say; got {bucket}.")
        if read.count(bucket) > 1:
            raise ValueError(f"`--buckets`: {bucket} is given more than once.")
    return read


def bucket_name(layout: SampleLayout) -> str:
    """Of samples of `layout`: "832x480x81"."""
    return f"{layout.width}x{layout.height}x{layout.num_frames}"


def nearest_in_aspect(video: Video, layouts: Sequence[SampleLayout]) -> list[SampleLayout]:
    """Those of `layouts` whose aspect is nearest to that of the video: of which a crop leaves out the least.

    Raises:
        ValueError: if they have several aspects, and the size of the video is not known.
    """
    aspects = {Fraction(layout.width, layout.height) for layout in layouts}
    if len(aspects) == 1:
        return list(layouts)
    if video.size is None:
        raise ValueError(f"{video.name} can go to none of {len(layouts)} buckets: it has no `size`.")
    own = Fraction(video.size[1], video.size[0])
    # Twice as wide is as far away as half as wide; of two that are as far away, the first.
    nearest = min(
        (Fraction(layout.width, layout.height) for layout in layouts),
        key=lambda aspect: max(aspect / own, own / aspect),
    )
    return [layout for layout in layouts if Fraction(layout.width, layout.height) == nearest]


def choose_bucket(video: Video, layouts: Sequence[SampleLayout]) -> SampleLayout | None:
    """The one of `layouts` that samples of a video have; `None` if it is too short for all of its aspect.

    It is the longest that the video fills of those nearest in aspect. Where these have several sizes, it is the
    largest that the video need not be enlarged for, or else the smallest.
    """
    filled = [layout for layout in nearest_in_aspect(video, layouts) if layout.starts(video.num_frames)]

    def preference(layout: SampleLayout) -> tuple[int, bool, int]:
        area, enlarged = layout.width * layout.height, is_enlarged(video, layout)
        return layout.num_frames, not enlarged, -area if enlarged else area

    return max(filled, key=preference, default=None)


def is_enlarged(video: Video, layout: SampleLayout) -> bool:
    """Whether frames of `layout` have more pixels than those of the video, as far as its size is known."""
    return video.size is not None and (video.size[0] < layout.height or video.size[1] < layout.width)


def describe_buckets(chosen: Sequence[SampleLayout], layouts: Sequence[SampleLayout]) -> str:
    """How many videos, of which `chosen` has the layouts, each of `layouts` has got."""
    counts = {bucket_name(layout): list(chosen).count(layout) for layout in layouts}
    told = ", ".join(f"{name}: {count}" for name, count in counts.items())
    empty = [name for name, count in counts.items() if not count]
    advice = f" No video goes to {', '.join(empty)}: leave it out, and the others have its share of the error bank."
    return f"Videos of each bucket: {told}.{advice if empty else ''}"


class BucketBatchSampler(BatchSampler):
    """Batches of samples of one bucket, in rounds: one batch for every process, all of the same bucket.

    So accelerate, which deals them out in turn, gives all processes the same work at every step. Samples are taken
    in the order of `sampler`, and a round comes as soon as it is full. What is left over in the end is left out, as
    `drop_last` of a loader has it; but a bucket too small for one round has one, in which its samples are repeated for
    several processes, and which is smaller for one.

    Args:
        sampler (`Sampler`): The order of all samples; accelerate puts in one that it can seed.
        buckets (`Sequence[str]`): The bucket of every sample.
        batch_size (`int`): Samples of a batch.
        num_processes (`int`, defaults to 1): Batches of a round.
    """

    def __init__(self, sampler: Sampler, buckets: Sequence[str], batch_size: int, num_processes: int = 1):
        # With `drop_last` accelerate adds nothing of another bucket to the end.
        super().__init__(sampler, batch_size, drop_last=True)
        self.buckets, self.num_processes = buckets, num_processes
        self.round = batch_size * num_processes

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[str, list[int]] = {bucket: [] for bucket in self.buckets}
        too_small = set(waiting)
        for index in self.sampler:
            indices = waiting[self.buckets[index]]
            indices.append(index)
            if len(indices) == self.round:
                too_small.discard(self.buckets[index])
                yield from self._batches(indices)
                indices.clear()
        for bucket, indices in waiting.items():
            if bucket in too_small:
                repeated = islice(cycle(indices), self.round) if self.num_processes > 1 else indices
                yield from self._batches(list(repeated))

    def __len__(self) -> int:
        rounds = sum(max(1, count // self.round) for count in Counter(self.buckets).values())
        return rounds * self.num_processes

    def _batches(self, indices: list[int]) -> Iterator[list[int]]:
        for first in range(0, len(indices), self.batch_size):
            yield indices[first : first + self.batch_size]
