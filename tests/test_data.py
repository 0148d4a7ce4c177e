"""Videos, captions, samples and the cache: what training reads. Files are real, and so are the processes."""

import csv
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from diffusers_svi.data import (
    Candidate,
    SampleLayout,
    Samples,
    TensorCache,
    Video,
    augment,
    crop_box,
    fingerprint,
    open_dataset,
    open_folder,
    open_video,
    read_captions,
    usable_videos,
)
from diffusers_svi.tiny import world
from diffusers_svi.tiny.videos import world_videos, write_videos


CATS = Path(__file__).parents[2] / "shared/data/real/cats"
KEY = fingerprint("an entry")
CLIP = SampleLayout(num_frames=9, height=48, width=64)

# Frames are of one grey each, brighter from one to the next, so that their number can be read from any crop.
STEP = 4


def write_numbered(path: Path, num_frames: int = 40, height: int = 48, width: int = 64) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {} if path.suffix == ".mkv" else {"qp": "0"}
        for index in range(num_frames):
            pixels = np.full((height, width, 3), STEP * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(pixels) -> list[int]:
    """The numbers of frames `(3, n, height, width)` in [-1, 1] or `(n, height, width, 3)` uint8."""
    if isinstance(pixels, torch.Tensor):
        pixels = ((pixels + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    return np.round(pixels.mean(axis=(1, 2, 3)) / STEP).astype(int).tolist()


def write_rows(path: Path, *rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path.parent


def ramp(height: int, width: int, indices: list[int]) -> np.ndarray:
    """Frames that tell of each pixel where it is: y in red, x in green, the number of the frame in blue."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([np.stack([y, x, np.full_like(x, index)], axis=-1) for index in indices]).astype(np.uint8)


def ramp_video(num_frames: int = 40, height: int = 120, width: int = 160, **fields) -> Video:
    read = partial(ramp, height, width)
    return Video(
        **{"name": "ramp", "caption": "a ramp", "fingerprint": fingerprint("ramp"), **fields},
        read=read,
        num_frames=num_frames,
    )


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Video:
    return open_video(write_numbered(tmp_path_factory.mktemp("videos") / "numbered.mp4"), "grey")


# Layouts


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
        ({"reference": "after"}, "`reference` must be 'inside', 'outside' or 'before', got 'after'."),
    ],
)
def test_impossible_layouts(values, message):
    with pytest.raises(ValueError, match=message):
        replace(CLIP, **values)


@pytest.mark.parametrize(("reference", "needed"), [("inside", 13), ("outside", 14), ("before", 14)])
def test_a_video_of_the_frames_needed_is_just_long_enough(reference, needed):
    layout = replace(CLIP, history=4, reference=reference)
    assert layout.num_needed() == needed
    assert len(layout.starts(ramp_video(needed - 1))) == 0
    assert len(layout.starts(ramp_video(needed))) == (2 if reference == "outside" else 1)


# Captions


def test_captions_of_the_authors(tmp_path):
    write_videos(tmp_path / "world", num_videos=2)
    (path, caption), _ = read_captions(tmp_path / "world")
    assert path == tmp_path / "world" / "0-000000.mp4" and path.is_file()
    state, (action,) = world.sample_story(0, 0)
    assert caption == world.caption(state, action)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_captions_as_hugging_face_has_them(tmp_path, name):
    if name.endswith(".csv"):
        write_rows(tmp_path / name, ["file_name", "text"], ["clips/a.mp4", " a cat, "], ["b.mp4", " "])
    else:
        rows = [{"file_name": "clips/a.mp4", "text": "a cat,"}, {"file_name": "b.mp4"}]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_captions(tmp_path) == [(tmp_path / "clips" / "a.mp4", "a cat,"), (tmp_path / "b.mp4", None)]


def test_the_file_named_after_the_folder_is_preferred(tmp_path, monkeypatch):
    write_rows(tmp_path / "cats" / "other.csv", ["video", "text"], ["b.mp4", "b"])
    folder = write_rows(tmp_path / "cats" / "cats.csv", ["video", "text"], ["a.mp4", "a"])
    assert read_captions(folder) == [(folder / "a.mp4", "a")]
    monkeypatch.chdir(folder)
    assert read_captions(".") == [(Path("a.mp4"), "a")]


def test_columns_can_be_named(tmp_path):
    write_rows(tmp_path / "list.csv", ["file", "video", "text", "long"], ["a.mp4", "b.mp4", "short", "long"])
    assert read_captions(tmp_path, "file", "long") == [(tmp_path / "a.mp4", "long")]
    assert read_captions(tmp_path) == [(tmp_path / "b.mp4", "short")]
    with pytest.raises(ValueError, match="`video_column`='clip' is no column of .*list.csv, which has \\['file', 'vi"):
        read_captions(tmp_path, video_column="clip")
    with pytest.raises(ValueError, match="`caption_column`='words' is no column of .*list.csv"):
        read_captions(tmp_path, caption_column="words")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["clip", "text"], ["a.mp4", "a"]], "named like one of .*Set `video_column` to one of \\['clip', 'text'\\]"),
        ([["video", "words"], ["a.mp4", "a"]], "Set `caption_column` to one of \\['video', 'words'\\]"),
        ([["video", "text"]], "list.csv lists no video"),
        ([["video", "text"], ["", "a"]], "line 2: 'video' must be the path of a video, got ''"),
        ([["video", "text"], ["../a.mp4", "a"]], "line 2: 'video' must be a path within the folder of the file"),
        ([["video", "text"], ["b/../../a.mp4", "a"]], "must be a path within the folder of the file, got '../a.mp4'"),
        ([["video", "text"], ["/etc/a.mp4", "a"]], "must be a path within the folder of the file, got '/etc/a.mp4'"),
        ([["video", "text"], ["a.mp4", "a cat", " asleep"]], "line 2 has too many fields; quote text with commas"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_captions(write_rows(tmp_path / "list.csv", *rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "list.jsonl cannot be read as a list of videos"),
        ("[1]", "line 1 is not an object"),
        ('{"video": 3, "text": "a"}', "line 1: 'video' must be the path of a video, got 3"),
        ('{"video": "a.mp4", "text": 3}', "line 1: 'text' must be text, got 3"),
    ],
)
def test_malformed_json_lines(tmp_path, text, message):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path)


def test_folders_without_one_list(tmp_path):
    with pytest.raises(ValueError, match="`folder`='nowhere' is not a folder."):
        read_captions("nowhere")
    with pytest.raises(ValueError, match=f"must hold {tmp_path.name}.csv, or exactly one file .*; found none."):
        read_captions(tmp_path)
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="found a.csv, b.jsonl."):
        read_captions(tmp_path)


# Video files


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_video_is_counted_and_read(tmp_path, suffix):
    """Containers that do not tell how many frames they have are decoded; frames come in the order asked for."""
    path = write_numbered(tmp_path / f"a{suffix}", num_frames=12)
    video = open_video(path, "grey")
    assert (video.num_frames, video.caption, video.name) == (12, "grey", str(path))
    pixels = video.read([7, 0, 11, 7])
    assert pixels.shape == (4, 48, 64, 3) and pixels.dtype == np.uint8
    assert numbers(pixels) == [7, 0, 11, 7]
    with pytest.raises(ValueError, match="has no frames \\[12, 20\\]; only 12 can be decoded."):
        video.read([3, 20, 12])


def test_a_video_is_known_by_its_content(tmp_path):
    first, other = (write_numbered(tmp_path / name, frames) for name, frames in (("a.mp4", 12), ("b.mp4", 13)))
    copy = tmp_path / "c.mp4"
    copy.write_bytes(first.read_bytes())
    assert open_video(first, "a").fingerprint == open_video(copy, "c").fingerprint
    assert open_video(first, "a").fingerprint != open_video(other, "a").fingerprint


def test_a_rotated_video_is_turned_upright(tmp_path):
    import imageio_ffmpeg

    path, rotated = write_numbered(tmp_path / "a.mp4", 3), tmp_path / "b.mp4"
    arguments = ["-v", "error", "-display_rotation", "90", "-i", path, "-c", "copy", rotated]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], check=True)
    assert open_video(rotated, "grey").read([1]).shape == (1, 64, 48, 3)


def test_files_that_are_no_videos(tmp_path):
    with pytest.raises(ValueError, match="nothing.mp4 cannot be read: .*No such file"):
        open_video(tmp_path / "nothing.mp4", "a")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4 cannot be read as a video: "):
        open_video(tmp_path / "text.mp4", "a")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="sound.wav holds no video."):
        open_video(tmp_path / "sound.wav", "a")


def test_a_hugging_face_dataset(tmp_path):
    """From paths, and from bytes in Parquet."""
    import datasets

    folder, cache = tmp_path / "videos", tmp_path / "cache"
    write_rows(folder / "metadata.csv", ["file_name", "text"], ["a.mp4", "a cat"], ["b.mp4", ""])
    paths = [write_numbered(folder / name, num_frames=9) for name in ("a.mp4", "b.mp4")]
    first, second = open_dataset(str(folder), cache_dir=cache)
    assert (first.name, first.caption, second.caption) == (f"{folder}, row 0", "a cat", None)
    video = pickle.loads(pickle.dumps(first.open()))
    assert (video.caption, video.num_frames, numbers(video.read([4, 2]))) == ("a cat", 9, [4, 2])
    assert video.fingerprint == open_video(paths[0], "").fingerprint

    rows = {"clip": [{"bytes": paths[1].read_bytes(), "path": None}], "prompt": ["in bytes"], "number": [3]}
    features = {"clip": datasets.Video(), "prompt": datasets.Value("string"), "number": datasets.Value("int64")}
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(parquet / "rows.parquet")
    (only,) = open_dataset(str(parquet), cache_dir=cache)
    assert (only.caption, numbers(only.open().read([8]))) == ("in bytes", [8])
    with pytest.raises(ValueError, match="`caption_column`='text' is no column of .*\\['clip', 'prompt', 'number'\\]"):
        open_dataset(str(parquet), cache_dir=cache, caption_column="text")
    with pytest.raises(ValueError, match="row 0: 'number' must be text, got 3"):
        open_dataset(str(parquet), cache_dir=cache, caption_column="number")


@pytest.mark.skipif(not CATS.is_dir(), reason=f"no real data at {CATS}")
def test_the_authors_cats():
    layout = SampleLayout(num_frames=17, height=60, width=104, history=12, reference="before")
    videos, skipped = usable_videos(open_folder(CATS), layout)
    assert not skipped and [video.num_frames for video in videos] == [81, 81]
    sample = Samples(videos, layout, seed=0)[0]
    assert sample["caption"].startswith("A white, blue-eyed cat sits on a wood floor")
    assert sample["video"].shape == (3, 29, 60, 104) and sample["video"].std() > 0.1


# What can be used


def test_what_cannot_be_used_is_told(tmp_path):
    rows = [[f"{index}.mp4", f"video {index}"] for index in range(4)]
    folder = write_rows(tmp_path / "list.csv", ["video", "text"], *rows, ["4.mp4", ""], ["gone.mp4", "gone"])
    for index in range(5):
        write_numbered(folder / f"{index}.mp4", num_frames=8 if index == 3 else 9)
    videos, skipped = usable_videos(open_folder(folder), CLIP, max_skipped_share=0.5)
    assert [video.caption for video in videos] == ["video 0", "video 1", "video 2"]
    assert skipped.too_short == ["3.mp4 (8 frames, 9 needed)"] and skipped.without_caption == ["4.mp4"]
    assert len(skipped.unreadable) == 1 and skipped.unreadable[0].startswith("gone.mp4 (")
    text = skipped.describe()
    assert text.startswith("3 of 6 videos are not used. 1 too short: 3.mp4 (8 frames, 9 needed). 1 unreadable: gone")
    assert text.endswith(" 1 without caption: 4.mp4.")
    with pytest.raises(ValueError, match="^3 of 6 videos are not used.*`max_skipped_share`=0.4 may be left out"):
        usable_videos(open_folder(folder), CLIP, max_skipped_share=0.4)


def test_only_the_first_names_are_told():
    candidates = [Candidate(f"v{index}", None, ramp_video) for index in range(7)] + [Candidate("v7", "a", ramp_video)]
    _, skipped = usable_videos(candidates, CLIP, max_skipped_share=1)
    assert skipped.describe() == "7 of 8 videos are not used. 7 without caption: v0; v1; v2; v3; v4; and 2 more."


def test_one_video_must_remain():
    with pytest.raises(ValueError, match="1 of 1 videos are not used"):
        usable_videos([Candidate("v", None, ramp_video)], CLIP, max_skipped_share=1)
    with pytest.raises(ValueError, match="`candidates` is empty"):
        usable_videos([], CLIP)
    with pytest.raises(ValueError, match="`max_skipped_share` is a share in \\[0, 1\\], got 10."):
        usable_videos([], CLIP, max_skipped_share=10)


# Samples


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


def test_a_clip_begins_where_the_video_allows():
    video = ramp_video(40, starts=(2, 20, 31, 35))
    samples = Samples([video], replace(CLIP, history=4), seed=0, samples_per_video=20)
    assert {round(float(sample["video"][2, 4, 0, 0] + 1) * 127.5) for sample in samples} == {20, 31}


def test_videos_too_short_are_refused():
    with pytest.raises(
        ValueError, match="`videos`: ramp has 8 frames and `starts`=None, in which no sample of .* fits"
    ):
        Samples([ramp_video(), ramp_video(8)], CLIP, seed=0)
    with pytest.raises(ValueError, match="`starts`=\\(35,\\), in which no sample"):
        Samples([ramp_video(starts=(35,))], CLIP, seed=0)
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


def test_without_crops_a_frame_of_the_right_size_stays_as_it_is():
    layout = replace(CLIP, height=120, width=160, crop=False)
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


def test_keys_tell_samples_apart():
    videos = [ramp_video(), ramp_video(fingerprint=fingerprint("second"))]
    keys = [Samples(videos, CLIP, seed, samples_per_video=2).key(i) for seed in (0, 1) for i in range(4)]
    layouts = ({"height": 32}, {"history": 1}, {"reference": "outside"}, {"augment": True}, {"crop": False})
    keys += [Samples(videos, replace(CLIP, **values), 0).key(0) for values in layouts]
    assert len({*keys}) == len(keys) == 13


def test_keys_are_stable_across_processes():
    code = "from test_data import *; print(Samples([ramp_video()], CLIP, 0).key(0))"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(__file__).parent)}
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


def test_condition_frames_are_augmented_alike():
    frame = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rng = np.random.default_rng(0)
    results = [augment(frame.expand(-1, 3, -1, -1), rng) for _ in range(20)]
    assert all(torch.equal(result, result[:, :1].expand_as(result)) for result in results)
    assert len({fingerprint(result.numpy().tobytes()) for result in results}) > 15


# The cache


def test_fingerprints():
    assert fingerprint("a", 1) == fingerprint("a", 1) != fingerprint("a1")
    assert fingerprint({"a": 1, "b": (2, None)}) == fingerprint({"b": [2, None], "a": 1})
    assert len({fingerprint(b"a"), fingerprint("a"), fingerprint("a", ""), fingerprint("", "a"), fingerprint()}) == 5


def test_tensors_come_back_from_the_cache(tmp_path):
    cache = TensorCache(tmp_path / "cache")
    assert KEY not in cache
    whole = torch.arange(12.0).view(3, 4)
    cache.save(KEY, {"row": whole[1], "column": whole.T[2], "half": whole.bfloat16()})
    assert KEY in cache and cache.path(KEY) == tmp_path / "cache" / KEY[:2] / f"{KEY}.safetensors"
    entry = cache.load(KEY)
    assert torch.equal(entry["row"], whole[1]) and torch.equal(entry["column"], whole[:, 2])
    assert torch.equal(entry["half"], whole.bfloat16())
    assert [file.name for file in cache.path(KEY).parent.iterdir()] == [f"{KEY}.safetensors"]


def test_what_the_cache_refuses(tmp_path):
    cache = TensorCache(tmp_path)
    with pytest.raises(ValueError, match="`key` must be a `fingerprint`, 64 hexadecimal digits, got '../a'."):
        cache.path("../a")
    with pytest.raises(FileNotFoundError):
        cache.load(KEY)
    cache.save(KEY, {"a": torch.zeros(100)})
    content = cache.path(KEY).read_bytes()
    for damaged in (content[:-30], content[:5], b""):
        cache.path(KEY).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{KEY}.safetensors is damaged .* Delete it, and it is made anew."):
            cache.load(KEY)


def test_a_failed_save_leaves_nothing(tmp_path):
    cache = TensorCache(tmp_path)
    cache.path(KEY).mkdir(parents=True)
    with pytest.raises(OSError, match=KEY):
        cache.save(KEY, {"a": torch.zeros(3)})
    assert KEY not in cache and list(cache.path(KEY).parent.iterdir()) == [cache.path(KEY)]


def write_forever(folder: Path, value: float) -> None:
    while True:
        TensorCache(folder).save(KEY, {"a": torch.full((20_000,), value)})


def test_processes_may_write_the_same_entry(tmp_path):
    """While two processes write it again and again and one is killed, an entry is always whole."""
    cache = TensorCache(tmp_path)
    # Forked, as importing torch twice more would take longer than everything else here.
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_forever, args=(tmp_path, value), daemon=True) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    try:
        seen = set()
        while seen != {1.0, 2.0}:
            assert all(writer.is_alive() for writer in writers)
            if KEY in cache:
                (value,) = cache.load(KEY)["a"].unique().tolist()
                seen.add(value)
        writers[0].kill()
        for _ in range(50):
            assert len(cache.load(KEY)["a"].unique()) == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert len(cache.load(KEY)["a"].unique()) == 1


def test_a_stray_temporary_file_does_no_harm(tmp_path):
    cache = TensorCache(tmp_path)
    cache.path(KEY).parent.mkdir()
    stray = cache.path(KEY).parent / f".{KEY}.0.tmp"
    stray.write_bytes(b"half")
    assert KEY not in cache
    cache.save(KEY, {"a": torch.ones(2)})
    assert torch.equal(cache.load(KEY)["a"], torch.ones(2)) and stray.read_bytes() == b"half"


# The world of svi-tiny


@pytest.mark.parametrize("setting", ["consistent", "creative"])
@pytest.mark.parametrize(
    ("clip_frames", "history", "retold"), [(17, 0, 1), (17, 0, 5), (17, 12, 5), (33, 24, 9), (81, 76, 5), (17, 40, 1)]
)
def test_a_clip_of_the_world_shows_what_its_caption_says(clip_frames, history, retold, setting):
    """From its last re-told frame on; a first clip re-tells nothing."""
    new = clip_frames - retold
    for index, video in enumerate(world_videos(3, 7, clip_frames, history, retold, setting)):
        (start,) = video.starts
        assert start > history
        own = start + retold - 1
        state, actions = world.sample_story(7, index, own // new + 1, setting)
        moved = setting == "creative" and retold > 1
        assert video.first_start == (own if moved else None)
        assert video.num_frames == (own if moved else start) + clip_frames
        states = world.film(state, actions, [new] * (own // new) + [video.num_frames - 1 - own])
        begin = states[own]
        assert begin.settled and video.caption == world.caption(begin, actions[-1])
        shown = video.read(list(range(own, video.num_frames)))
        assert np.array_equal(shown, world.render(world.film(begin, actions[-1:], len(shown) - 1)))
        assert np.array_equal(video.read([start, 0]), world.render([states[start], state]))
        assert video.history_caption == world.caption(states[own - new], actions[-2])
        assert moved or retold == 1 or video.caption == video.history_caption


def test_samples_of_the_world_are_its_frames():
    layout = SampleLayout(num_frames=17, height=64, width=64, history=12, reference="before", crop=False)
    videos = world_videos(2, history=12, retold=5)
    sample = Samples(videos, layout, seed=0)[1]
    (start,) = videos[1].starts
    expected = torch.from_numpy(videos[1].read(list(range(start - 12, start + 17)))).permute(3, 0, 1, 2) / 127.5 - 1
    assert torch.equal(sample["video"], expected) and sample["caption"] == videos[1].caption


def test_videos_of_the_world_are_told_apart_and_travel():
    groups = [(), (1,), (0, 33), (0, 17, 40), (0, 17, 0, 5), (0, 17, 0, 1, "consistent")]
    videos = [video for values in groups for video in world_videos(2, *values)]
    assert len({video.fingerprint for video in videos}) == len(videos)
    assert world_videos(5)[1].fingerprint == videos[1].fingerprint
    assert np.array_equal(pickle.loads(pickle.dumps(videos[0])).read([20]), videos[0].read([20]))


def test_impossible_videos_of_the_world():
    with pytest.raises(ValueError, match="`clip_frames`=17 less `retold`=6 must leave at least 12 new frames"):
        world_videos(1, retold=6)
    with pytest.raises(ValueError, match="`history` must be a whole number of at least 0, got -1."):
        world_videos(1, history=-1)
    with pytest.raises(ValueError, match="`num_videos` must be a whole number of at least 1, got 0."):
        world_videos(0)
