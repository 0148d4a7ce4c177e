"""Buckets: which one a video goes to, and batches of one bucket each, the same one for all processes."""

import re
from collections import Counter
from functools import partial

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, SequentialSampler

from conftest import make_components, quiet, seeded
from diffusers_svi import PixelMotion, SVIPipeline
from diffusers_svi.training.buckets import BucketBatchSampler, choose_bucket, describe_buckets, read_buckets
from diffusers_svi.training.cache import TensorCache
from diffusers_svi.training.encode import encode_samples
from diffusers_svi.training.samples import SampleLayout, Samples
from diffusers_svi.training.sources import Candidate, usable_videos
from small_videos import ramp_video


def layout(width: int, height: int, num_frames: int = 9) -> SampleLayout:
    return SampleLayout(num_frames=num_frames, height=height, width=width)


WIDE, TALL, SQUARE = layout(832, 480), layout(480, 832), layout(624, 624)


def video(width: int, height: int, num_frames: int = 40):
    return ramp_video(num_frames, height, width, size=(height, width))


def test_buckets_as_they_are_given():
    assert read_buckets(["832x480", "480x832x49"], 81) == ["832x480x81", "480x832x49"]


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (["832"], "give width x height, or x frames too, 832x480 or 832x480x81; got '832'."),
        (["832x480x81x2"], "got '832x480x81x2'."),
        (["0x480"], "got '0x480'."),
        (["-832x480"], "got '-832x480'."),
        (["wide x tall"], "got 'wide x tall'."),
        (["832x480x80"], "`--buckets`: clips have 1 + 4n frames, 81 say; got 832x480x80."),
        (["832x480", "832x480x81"], "`--buckets`: 832x480x81 is given more than once."),
    ],
)
def test_what_is_no_bucket_is_refused(buckets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_buckets(buckets, 81)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1920, 1080), WIDE),
        ((1080, 1920), TALL),
        ((500, 500), SQUARE),
        # Between 1 and 26 / 15 the middle is 1.317, of ratios.
        ((131, 100), SQUARE),
        ((132, 100), WIDE),
        ((100, 131), SQUARE),
        ((100, 132), TALL),
    ],
)
def test_a_video_goes_to_the_nearest_aspect(size, bucket):
    assert choose_bucket(video(*size), [WIDE, TALL, SQUARE]) == bucket


def test_of_an_aspect_it_is_the_longest_that_is_filled():
    layouts = [layout(832, 480, 9), layout(832, 480, 17), layout(480, 832, 33)]
    lengths = [choose_bucket(video(832, 480, frames), layouts) for frames in (8, 9, 16, 17, 40)]
    assert [chosen and chosen.num_frames for chosen in lengths] == [None, 9, 9, 17, 17]
    # One that is too short for its aspect is not made tall.
    assert choose_bucket(video(480, 832, 32), layouts) is None


def test_of_a_length_it_is_the_largest_without_enlarging():
    sizes = [layout(416, 240), layout(1664, 960), layout(832, 480)]
    widths = [choose_bucket(video(width, width * 15 // 26), sizes).width for width in (208, 416, 831, 832, 1664, 5200)]
    assert widths == [416, 416, 416, 832, 1664, 1664]
    # The length counts more.
    assert choose_bucket(video(416, 240), [*sizes, layout(1664, 960, 17)]).num_frames == 17


def test_a_video_without_size_has_one_aspect_alone():
    lengths = [layout(64, 48, 9), layout(64, 48, 17)]
    assert choose_bucket(ramp_video(16), lengths) == lengths[0]
    with pytest.raises(ValueError, match="ramp can go to none of 2 buckets: it has no `size`"):
        choose_bucket(ramp_video(), [WIDE, TALL])


def test_what_goes_where_is_told():
    assert describe_buckets([WIDE, SQUARE, WIDE], [WIDE, SQUARE]) == (
        "Videos of each bucket: 832x480x9: 2, 624x624x9: 1."
    )
    assert describe_buckets([WIDE], [WIDE, TALL]) == (
        "Videos of each bucket: 832x480x9: 1, 480x832x9: 0. No video goes to 480x832x9: leave it out, and the others "
        "have its share of the error bank."
    )


def test_videos_too_short_or_small_for_their_bucket_are_told(caplog):
    layouts = [layout(64, 48, 9), layout(64, 48, 17), layout(48, 64, 33)]
    sizes = {"wide": (64, 48, 9), "tall": (48, 64, 32), "small": (48, 36, 40), "low": (64, 47, 40)}
    candidates = [Candidate(name, "a", partial(video, *size)) for name, size in sizes.items()]
    videos, skipped = usable_videos(candidates, layouts, max_skipped_share=0.5)
    assert [found.size for found in videos] == [(48, 64), (36, 48), (47, 64)]
    assert skipped.too_short == ["tall (32 frames, 33 needed)"]
    told = "2 of 3 videos are smaller than their clips and are enlarged: small; low."
    assert [record.message for record in caplog.records] == [told]


def test_samples_and_what_is_kept_of_them_have_the_shape_of_their_bucket(tmp_path):
    """Of one video there are entries for every bucket that it ever went to."""
    layouts = [layout(64, 32, 9), layout(32, 64, 9), layout(64, 32, 5)]
    pipe, shapes = quiet(SVIPipeline(**make_components("i2v"))), []
    for chosen in ([layouts[0], layouts[1]], [layouts[2], layouts[0]]):
        samples = Samples([ramp_video(), ramp_video(fingerprint="b" * 64)], chosen, 0)
        dataset, _ = encode_samples(
            samples, PixelMotion(1), TensorCache(tmp_path), lambda: pipe, "tiny", text_dtype=torch.float32
        )
        shapes += [tuple(dataset[index][name].shape) for index in range(2) for name in ("latents", "condition")]
        assert [samples[index]["video"].shape[1:] for index in range(2)] == [
            (one.num_frames, one.height, one.width) for one in chosen
        ]
    wide, tall, short = (16, 3, 4, 8), (16, 3, 8, 4), (16, 2, 4, 8)
    assert shapes == [wide, wide, tall, tall, short, short, wide, wide]
    # Four clips, the caption and the empty one.
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6


# Seven samples of a, four of b, and one of c.
BUCKETS = "abacabaabbaa"


def sampler(batch_size: int, num_processes: int = 1, epoch: int = 0, buckets: str = BUCKETS) -> BucketBatchSampler:
    order = SeedableRandomSampler(range(len(buckets)), generator=seeded(), data_seed=3)
    order.set_epoch(epoch)
    return BucketBatchSampler(order, buckets, batch_size, num_processes)


@pytest.mark.parametrize(
    ("batch_size", "num_processes", "batches"),
    [
        (1, 1, {"a": 7, "b": 4, "c": 1}),
        (2, 1, {"a": 3, "b": 2, "c": 1}),
        (2, 2, {"a": 2, "b": 2, "c": 2}),
        (1, 3, {"a": 6, "b": 3, "c": 3}),
        (3, 2, {"a": 2, "b": 2, "c": 2}),
    ],
)
def test_batches_are_of_one_bucket_and_rounds_too(batch_size, num_processes, batches):
    """As accelerate deals them out: every process has the same bucket at every step, and full batches."""
    bucket_of = dict(enumerate(BUCKETS))
    for epoch in range(3):
        whole = sampler(batch_size, num_processes, epoch)
        made = list(whole)
        assert len(whole) == len(made)
        assert all(len({bucket_of[index] for index in batch}) == 1 for batch in made)
        assert Counter(bucket_of[batch[0]] for batch in made) == batches
        if num_processes > 1:
            shards = [BatchSamplerShard(whole, num_processes, rank) for rank in range(num_processes)]
            whole.sampler.set_epoch(epoch)
            steps = []
            for shard in shards:
                shard.batch_sampler.sampler.set_epoch(epoch)
                steps.append(list(shard))
                assert len(shard) == len(steps[-1]) == len(made) // num_processes
                assert {len(batch) for batch in steps[-1]} == {batch_size}
            for step in zip(*steps, strict=True):
                assert len({bucket_of[index] for batch in step for index in batch}) == 1


def test_no_sample_comes_twice_but_of_a_bucket_too_small_for_a_round():
    for epoch in range(5):
        counts = Counter(index for batch in sampler(2, 2, epoch) for index in batch)
        assert {BUCKETS[index] for index, count in counts.items() if count > 1} == {"c"}
        assert counts[BUCKETS.index("c")] == 4
    # What is left out of an epoch is another sample every time.
    seen = {index for epoch in range(10) for batch in sampler(2, 2, epoch) for index in batch}
    assert seen == set(range(len(BUCKETS)))


def test_buckets_come_in_random_order():
    orders = {"".join(BUCKETS[batch[0]] for batch in sampler(1, epoch=epoch)) for epoch in range(5)}
    assert len(orders) == 5 and orders == {"".join(BUCKETS[b[0]] for b in sampler(1, epoch=e)) for e in range(5)}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_one_bucket_is_what_a_loader_makes(batch_size):
    expected = list(BatchSampler(SequentialSampler(range(8)), batch_size, drop_last=batch_size <= 8))
    assert list(BucketBatchSampler(SequentialSampler(range(8)), "a" * 8, batch_size)) == expected
    # With several processes, as accelerate makes them even.
    if batch_size == 9:
        even = BatchSamplerShard(BatchSampler(SequentialSampler(range(8)), 9, drop_last=False), 2, 1)
        assert list(BatchSamplerShard(BucketBatchSampler(SequentialSampler(range(8)), "a" * 8, 9, 2), 2, 1)) == list(
            even
        )
