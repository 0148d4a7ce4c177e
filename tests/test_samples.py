"""Layouts and samples: which frames they take, how these are cropped, and that they are always the same."""

import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_svi.frames import Times, Video, open_video
from diffusers_svi.training.cache import fingerprint
from diffusers_svi.training.samples import SampleLayout, Samples, crop_box
from small_videos import numbers, ramp, ramp_video, write_numbered


CLIP = SampleLayout(num_frames=9, height=48, width=64)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Video:
    return open_video(write_numbered(tmp_path_factory.mktemp("videos") / "numbered.mp4"), "grey")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 8}, "`num_frames` must be 1, 5, 9, ..., got 8."),
        ({"num_frames": 9.0}, "`num_frames` must be a whole number of at least 1, got 9.0."),
        ({"height": 0}, "`height` must be a whole number of at least 1, got 0."),
        ({"width": -1}, "`width` must be a whole number of at least 1, got -1."),
        ({"history": -4}, "`history` must be a whole number of at least 0, got -4."),
        ({"condition_frames": 0}, "`condition_frames` must be a whole number of at least 1, got 0."),
        ({"condition_frames": 10}, "`condition_frames`=10 must not exceed `num_frames`=9."),
        ({"fps": 0}, "`fps` must be a whole number of at least 1, got 0."),
        ({"fps": 23.976}, "`fps` must be a whole number of at least 1, got 23.976."),
        ({"reference": "after"}, "`reference` must be one of \\('inside', 'outside', 'before'\\), got 'after'."),
    ],
)
def test_impossible_layouts(values, message):
    with pytest.raises(ValueError, match=message):
        replace(CLIP, **values)


@pytest.mark.parametrize(("reference", "needed"), [("inside", 13), ("outside", 14), ("before", 14)])
def test_a_video_of_the_frames_needed_is_just_long_enough(reference, needed):
    layout = replace(CLIP, history=4, reference=reference)
    assert layout.num_needed() == needed
    assert len(layout.starts(needed - 1)) == 0
    assert len(layout.starts(needed)) == (2 if reference == "outside" else 1)


@pytest.mark.parametrize("reference", ["inside", "outside", "before"])
@pytest.mark.parametrize("history", [0, 8])
def test_frames_come_from_where_the_layout_says(numbered, reference, history):
    layout = replace(CLIP, history=history, reference=reference, condition_frames=5)
    references, starts = set(), set()
    for sample in Samples([numbered], layout, seed=0, samples_per_video=12):
        assert sample["video"].dtype == torch.float32 and sample["video"].shape == (3, history + 9, 48, 64)
        frames = numbers(sample["video"])
        assert frames == list(range(frames[0], frames[0] + history + 9)) and frames[-1] < 40
        clip = frames[history:]
        assert torch.equal(sample["condition"], sample["video"][:, history : history + 5])
        assert sample["reference"].shape == (3, 48, 64)
        (number,) = numbers(sample["reference"][:, None])
        if reference == "inside":
            assert number in clip
        else:
            assert number not in frames and 0 <= number < 40
            assert reference == "outside" or number < frames[0]
        references.add(number - frames[0])
        starts.add(clip[0])
    assert len(references) > 4 and len(starts) > 4


def test_all_starts_and_references_are_possible():
    layout = replace(CLIP, history=1, reference="outside")
    seen = set()
    for sample in Samples([ramp_video(12)], layout, seed=0, samples_per_video=60):
        blue = ((sample["video"][2, 1, 0, 0] + 1) * 127.5, (sample["reference"][2, 0, 0] + 1) * 127.5)
        seen.add(tuple(round(float(value)) for value in blue))
    assert seen == {(1, 10), (1, 11), (2, 0), (2, 11), (3, 0), (3, 1)}


def test_videos_too_short_are_refused():
    with pytest.raises(ValueError, match="`videos`: ramp has 8 frames, but a sample of .* needs 9. Leave it out"):
        Samples([ramp_video(), ramp_video(8)], CLIP, seed=0)
    with pytest.raises(ValueError, match="`videos` is empty"):
        Samples([], CLIP, seed=0)
    with pytest.raises(ValueError, match="`samples_per_video` must be a whole number of at least 1, got 0."):
        Samples([ramp_video()], CLIP, seed=0, samples_per_video=0)
    with pytest.raises(ValueError, match="`seed` must be a whole number of at least 0, got None."):
        Samples([ramp_video()], CLIP, seed=None)


@pytest.mark.parametrize(("height", "width"), [(120, 160), (160, 60), (77, 53)])
@pytest.mark.parametrize("target", [(60, 60), (48, 64), (60, 104)])
def test_crops_have_the_wanted_size_aspect_and_place(height, width, target):
    layout = replace(CLIP, height=target[0], width=target[1])
    rng = np.random.default_rng(0)
    largest = min(height / target[0], width / target[1])
    boxes = [crop_box((height, width), layout, rng) for _ in range(300)]
    for top, left, crop_height, crop_width in boxes:
        assert 0 <= top <= height - crop_height and 0 <= left <= width - crop_width
        assert abs(crop_height / crop_width - target[0] / target[1]) * crop_width < 1
        limit, limiting = (crop_height, height) if target[0] * largest == height else (crop_width, width)
        assert 13 / 14 * limiting <= limit <= limiting
    assert len({box[2] for box in boxes}) > 2 and len({box[:2] for box in boxes}) > 10


def test_all_frames_are_cropped_alike():
    layout = replace(CLIP, height=60, width=60, reference="before")
    boxes = set()
    for sample in Samples([ramp_video()], layout, seed=0, samples_per_video=8):
        position = sample["video"][:2]
        assert torch.equal(position, position[:, :1].expand_as(position))
        assert torch.equal(position[:, 0], sample["reference"][:2])
        y, x = ((position[:, 0] + 1) * 127.5).numpy()
        # Pixels are as far apart as a crop of 112 to 120 pixels, resized to 60, has them.
        for apart in (np.diff(y[5:-5], axis=0), np.diff(x[:, 5:-5], axis=1)):
            assert 112 / 60 - 0.05 < apart.mean() < 120 / 60 + 0.05
        boxes.add((round(float(y[0, 0])), round(float(x[0, 0]))))
    assert len(boxes) > 3


def test_cropped_from_the_middle_a_frame_of_the_right_size_stays_as_it_is():
    layout = replace(CLIP, height=120, width=160, center_crop=True)
    (sample,) = Samples([ramp_video()], layout, seed=0)
    start = round(float(sample["video"][2, 0, 0, 0] + 1) * 127.5)
    expected = torch.from_numpy(ramp(120, 160, list(range(start, start + 9)))).permute(3, 0, 1, 2) / 127.5 - 1
    assert torch.equal(sample["video"], expected)
    assert crop_box((120, 160), replace(layout, height=60, width=60), np.random.default_rng(0)) == (0, 20, 120, 120)


def test_a_sample_is_always_the_same_whatever_the_others():
    first, second = ramp_video(), ramp_video(fingerprint=fingerprint("second"))
    layout = replace(CLIP, augment=True)
    both, alone = Samples([first, second], layout, 3, samples_per_video=2), Samples([second], layout, 3)
    assert len(both) == 4 and both.key(2) == alone.key(0) == both[2]["key"]
    torch.rand(3), np.random.rand(3)
    for name, value in alone[0].items():
        assert torch.equal(value, both[2][name]) if isinstance(value, torch.Tensor) else value == both[2][name]
    assert not torch.equal(both[0]["video"], both[2]["video"]) and not torch.equal(both[2]["video"], both[3]["video"])
    assert not torch.equal(Samples([second], layout, 4)[0]["video"], alone[0]["video"])
    with pytest.raises(IndexError):
        both[4]


@pytest.mark.parametrize(
    ("reference", "history", "expected"),
    [
        ("inside", 0, [(57.44, 57.44, 20, 28), (61.99, 90.99, 16, 16), (56.97, 94.97, 28, 36)]),
        ("outside", 8, [(57.44, 57.44, 15, 39), (61.99, 90.99, 12, 1), (56.97, 94.97, 21, 39)]),
        ("before", 8, [(57.44, 57.44, 15, 14), (61.99, 90.99, 13, 0), (56.97, 94.97, 21, 20)]),
    ],
)
def test_what_is_drawn_for_a_seed_stays(reference, history, expected):
    """The middle of the crop, its first frame and its reference: weights trained before are trained again."""
    layout = replace(CLIP, height=60, width=60, history=history, reference=reference)
    for sample, (y, x, first, referred) in zip(Samples([ramp_video()], layout, 7, 3), expected, strict=True):
        middle = (sample["video"][:, 0, 30, 30] + 1) * 127.5
        assert middle.tolist() == pytest.approx([y, x, first], abs=0.01)
        assert float(sample["reference"][2, 0, 0] + 1) * 127.5 == pytest.approx(referred, abs=0.01)


def timed(num_frames: int, rate: int) -> Video:
    return ramp_video(num_frames, times=Times(np.arange(num_frames + 1), Fraction(1, rate)))


def test_clips_are_of_the_wanted_rate():
    layout = replace(CLIP, history=4, reference="before", fps=16)
    for sample in Samples([timed(64 * 3, 64)], layout, 0, samples_per_video=8):
        shown = ((sample["video"][2, :, 0, 0] + 1) * 127.5).round()
        reference = float((sample["reference"][2, 0, 0] + 1) * 127.5)
        # A quarter of the frames, whether of clip, history or reference.
        assert (shown.diff() == 4).all() and len(shown) == 13 and round(shown[0].item() - reference) % 4 == 0
        assert shown[0] - reference > 3
    slow = Samples([timed(12, 8)], replace(CLIP, fps=16), 0)[0]["video"]
    shown = ((slow[2, :, 0, 0] + 1) * 127.5).round()
    assert sorted(shown.diff().tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]
    # Of videos that have the wanted rate samples are the same as without.
    plain, same = (Samples([timed(40, 16)], replace(CLIP, fps=fps), 0)[0]["video"] for fps in (None, 16))
    assert torch.equal(plain, same)


def test_resampled_frames_are_counted():
    with pytest.raises(ValueError, match="`videos`: ramp has 8 frames at 16 a second, but a sample of .* needs 9."):
        Samples([timed(33, 64)], replace(CLIP, fps=16), seed=0)
    assert len(Samples([timed(36, 64)], replace(CLIP, fps=16), seed=0)) == 1
    with pytest.raises(ValueError, match="ramp cannot be resampled to 16 frames a second"):
        Samples([ramp_video()], replace(CLIP, fps=16), seed=0)


def test_half_of_the_samples_are_mirrored():
    """All of a sample, and always the same ones."""
    layout = replace(CLIP, history=4, reference="before", condition_frames=5)
    plain = Samples([ramp_video()], layout, 0, samples_per_video=40)
    flipped = Samples([ramp_video()], replace(layout, random_flip=True), 0, samples_per_video=40)
    mirrored = []
    for before, after in zip(plain, flipped, strict=True):
        is_mirrored = not torch.equal(before["video"], after["video"])
        for name in ("video", "condition", "reference"):
            assert torch.equal(before[name].flip(-1) if is_mirrored else before[name], after[name])
        mirrored.append(is_mirrored)
    assert 10 <= sum(mirrored) <= 30
    again = [torch.equal(flipped[index]["video"], plain[index]["video"].flip(-1)) for index in range(40)]
    assert again == mirrored


def test_keys_tell_samples_apart():
    videos = [ramp_video(), ramp_video(fingerprint=fingerprint("second"))]
    keys = [Samples(videos, CLIP, seed, samples_per_video=2).key(i) for seed in (0, 1) for i in range(4)]
    layouts = ({"height": 32}, {"history": 1}, {"reference": "outside"}, {"augment": True}, {"center_crop": True})
    layouts += ({"random_flip": True}, {"fps": 16}, {"fps": 24})
    keys += [Samples([timed(40, 16)], replace(CLIP, **values), 0).key(0) for values in layouts]
    assert len({*keys}) == len(keys) == 16


def test_keys_are_stable_across_processes():
    code = "from test_samples import *; print(Samples([ramp_video()], CLIP, 0).key(0))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": path}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == Samples([ramp_video()], CLIP, 0).key(0)


def test_samples_through_worker_processes(numbered):
    samples = Samples([numbered], CLIP, seed=0, samples_per_video=2)
    loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=1)
    for index, sample in enumerate(loader):
        assert torch.equal(sample["video"], samples[index]["video"])


def test_only_the_condition_is_augmented():
    plain, augmented = (
        Samples([ramp_video()], replace(CLIP, augment=augment, condition_frames=5), 0, samples_per_video=20)
        for augment in (False, True)
    )
    changed = 0
    for before, after in zip(plain, augmented, strict=True):
        assert torch.equal(before["video"], after["video"]) and torch.equal(before["reference"], after["reference"])
        assert after["condition"].shape == (3, 5, 48, 64) and after["condition"].dtype == torch.float32
        assert after["condition"].abs().max() <= 1
        changed += not torch.equal(before["condition"], after["condition"])
    # Nothing is done with probability 0.3 * 0.5 * 0.5.
    assert 14 <= changed <= 20
