"""Where videos and captions come from, and which of them can be trained on."""

import json
import pickle
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diffusers_svi import data
from diffusers_svi.frames import Times, open_video
from diffusers_svi.training.lists import read_captions
from diffusers_svi.training.samples import SampleLayout, Samples
from diffusers_svi.training.sources import Candidate, open_dataset, open_folder, usable_videos
from small_videos import numbers, ramp_video, write_numbered, write_rows
from svi_tiny import world
from svi_tiny.videos import write_videos


CATS = Path(__file__).parents[2] / "shared/data/real/cats"
CLIP = SampleLayout(num_frames=9, height=48, width=64)


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


def test_a_damaged_video_is_left_out_whatever_the_seed(tmp_path):
    """One whose index is whole and whose tail is gone: nothing of it is trained on."""
    folder = write_rows(tmp_path / "list.csv", ["video", "text"], ["whole.mp4", "a cat"], ["damaged.mp4", "a dog"])
    for name in ("whole.mp4", "damaged.mp4"):
        write_numbered(folder / name)
    content = (folder / "damaged.mp4").read_bytes()
    data = content.index(b"mdat")
    (folder / "damaged.mp4").write_bytes(content[: data + 400] + bytes(400) + content[data + 800 :])
    videos, skipped = usable_videos(open_folder(folder), CLIP, max_skipped_share=0.5)
    assert [video.caption for video in videos] == ["a cat"]
    assert len(skipped) == len(skipped.unreadable) == 1 and skipped.unreadable[0].startswith("damaged.mp4 (")
    for seed in range(10):
        assert Samples(videos, CLIP, seed)[0]["caption"] == "a cat"


def test_videos_are_resampled(tmp_path, caplog):
    """Frames are counted at the wanted rate; videos that have fewer are told once."""
    rates = {"fast": 64, "short": 64, "right": 16, "slow": 8, "slower": 4}
    rows = [[f"{name}.mp4", name] for name in rates]
    folder = write_rows(tmp_path / "list.csv", ["video", "text"], *rows)
    for name, rate in rates.items():
        write_numbered(folder / f"{name}.mp4", num_frames=20 if name == "short" else 40, rate=rate)
    videos, skipped = usable_videos(open_folder(folder), replace(CLIP, fps=16), max_skipped_share=0.5)
    lengths = {video.caption: video.num_frames for video in videos}
    assert lengths == {"fast": 10, "right": 40, "slow": 80, "slower": 160}
    assert skipped.too_short == ["short.mp4 (5 frames at 16 a second, 9 needed)"]
    assert numbers(videos[0].read([2, 3])) == [9, 13]
    told = [record.message for record in caplog.records if "repeat" in record.message]
    assert told == ["2 of 4 videos have fewer than `fps`=16 frames a second: they repeat some."]
    caplog.clear()
    usable_videos(open_folder(folder), replace(CLIP, fps=4), max_skipped_share=0.5)
    usable_videos(open_folder(folder), CLIP)
    assert not caplog.records


def test_a_rate_that_is_almost_the_wanted_one_is_not_told(caplog):
    times = Times(np.arange(2001), Fraction(1001, 24000))
    candidate = Candidate("v", "a", partial(ramp_video, 2000, times=times))
    (video,), _ = usable_videos([candidate], replace(CLIP, fps=24))
    assert video.num_frames == 2002 and not caplog.records


def test_the_data_of_a_run_under_one_name(tmp_path):
    folder = write_rows(tmp_path / "list.csv", ["video", "text"], ["a.mp4", "a cat"])
    write_numbered(folder / "a.mp4", rate=16)
    layout = data.SampleLayout(num_frames=9, height=48, width=64, fps=16)
    videos, skipped = data.usable_videos(data.open_folder(folder), layout)
    assert isinstance(videos[0], data.Video) and skipped == data.Skipped(total=1)
    assert data.Samples(videos, layout, seed=0)[0]["caption"] == data.read_captions(folder)[0][1] == "a cat"
    assert data.open_dataset is open_dataset


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
