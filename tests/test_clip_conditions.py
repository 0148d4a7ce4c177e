"""What clips that are trained on hear and see: found beside their videos, cut where the clips are, cached."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_svi.conditions.audio import open_audio
from diffusers_svi.conditions.audio_encoder import AudioEncoder
from diffusers_svi.conditions.clip_conditions import ClipAudio, ClipPoses, encode_conditions
from diffusers_svi.conditions.following import PUBLISHED_SHARES, Following
from diffusers_svi.conditions.pose import open_pose
from diffusers_svi.conditions.windows import audio_windows, pose_pictures, windows_of
from diffusers_svi.frames import open_video
from diffusers_svi.pixels import to_uint8
from diffusers_svi.training.cache import TensorCache
from diffusers_svi.training.lists import Listed, read_list
from diffusers_svi.training.samples import SampleLayout, Samples
from diffusers_svi.training.sources import open_dataset, open_folder, usable_videos
from small_videos import ramp, ramp_video, write_numbered, write_rows
from test_audio import make_model, speech, write


LAYOUT = SampleLayout(num_frames=9, height=48, width=64, fps=8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> AudioEncoder:
    folder = tmp_path_factory.mktemp("encoder")
    make_model().float().save_pretrained(folder)
    return AudioEncoder(folder)


def counted(length: int) -> np.ndarray:
    """Rows of features, `(length, 2, 3)`, that tell their number."""
    return np.broadcast_to(np.arange(length, dtype=np.float32)[:, None, None], (length, 2, 3)).copy()


def video_beside(path: Path, num_frames: int = 40, **fields):
    return ramp_video(num_frames, beside=path, fps=8, **fields)


def clip_of(samples: Samples, conditions, folder: Path, index: int = 0) -> torch.Tensor:
    cache = TensorCache(folder / "cache")
    return cache.load(encode_conditions(samples, conditions, cache)[index])[conditions.kind]


# Where they lie


def test_columns_are_found_by_name_and_sounds_may_lie_in_the_videos(tmp_path):
    folder = write_rows(tmp_path / "list.csv", ["file_name", "text", "Audio", "pose"], ["a.mp4", "a", "a.wav", "a"])
    assert read_list(folder, condition="audio") == [Listed(folder / "a.mp4", "a", folder / "a.wav")]
    assert read_list(folder, condition="pose") == [Listed(folder / "a.mp4", "a", folder / "a")]
    assert read_list(folder, condition="pose", condition_column="Audio")[0].beside == folder / "a.wav"
    assert read_list(folder) == [Listed(folder / "a.mp4", "a", None)]
    bare = write_rows(tmp_path / "bare" / "list.csv", ["file_name", "text"], ["a.mp4", "a"])
    assert read_list(bare, condition="audio") == [Listed(bare / "a.mp4", "a", bare / "a.mp4")]


@pytest.mark.parametrize(
    ("rows", "condition", "message"),
    [
        ([["file_name", "text"], ["a.mp4", "a"]], "pose", "Set `condition_column` to one of"),
        (
            [["file_name", "text", "audio"], ["a.mp4", "a", ""]],
            "audio",
            "'audio' must be the path of the audio",
        ),
        ([["file_name", "text", "pose"], ["a.mp4", "a", "../b"]], "pose", "must be a path within the folder"),
    ],
)
def test_a_condition_that_is_not_there_is_told(tmp_path, rows, condition, message):
    with pytest.raises(ValueError, match=message):
        read_list(write_rows(tmp_path / "list.csv", *rows), condition=condition)


def test_videos_know_what_lies_beside_them(tmp_path):
    write_numbered(tmp_path / "a.mp4")
    folder = write_rows(tmp_path / "list.csv", ["file_name", "text", "audio"], ["a.mp4", "a", "a.npy"])
    (video,), _ = usable_videos(open_folder(folder, condition="audio"), LAYOUT)
    assert video.beside == folder / "a.npy" and video.fps == 8


def test_rows_of_a_dataset_name_files(tmp_path):
    write_numbered(tmp_path / "a.mp4")
    np.save(tmp_path / "a.npy", counted(40))
    row = {"file_name": "a.mp4", "text": "a", "audio": str(tmp_path / "a.npy"), "pose": "nowhere"}
    write_rows(tmp_path / "metadata.csv", list(row), list(row.values()))
    (candidate,) = open_dataset(str(tmp_path), condition="audio")
    assert candidate.open().beside == tmp_path / "a.npy"
    with pytest.raises(ValueError, match="row 0: 'pose' must name a file that is there, got 'nowhere'"):
        open_dataset(str(tmp_path), condition="pose")


# What a clip hears


def test_a_clip_in_the_middle_hears_the_rows_around_its_own_frames(tmp_path):
    np.save(tmp_path / "a.npy", counted(40))
    samples = Samples([video_beside(tmp_path / "a.npy")], LAYOUT, seed=0, samples_per_video=4)
    starts = [samples.cut(index).start for index in range(4)]
    assert len({*starts}) > 1 and max(starts) > 2
    for index, start in enumerate(starts):
        # The number of a frame stands in its blue.
        first = round(float(samples[index]["video"][2, 0, 0, 0] + 1) * 127.5)
        heard = clip_of(samples, ClipAudio(8, 5), tmp_path, index)
        assert first == start and heard.shape == (13, 2, 3)
        assert heard[:, 0, 0].tolist() == [min(max(start + n - 2, 0), 39) for n in range(13)]
        assert torch.equal(windows_of(heard), audio_windows(open_audio(counted(40)), start, 9))


def test_a_sound_is_heard_as_films_hear_it(tmp_path, encoder):
    """At the rate of the clips, from where the clip begins."""
    sound = write(tmp_path / "a.wav", speech(5), 16000)
    samples = Samples([video_beside(sound)], LAYOUT, seed=0)
    start = samples.cut(0).start
    heard = windows_of(clip_of(samples, ClipAudio(8, 3, encoder), tmp_path), 3)
    assert torch.equal(heard, audio_windows(open_audio(sound, encoder.model, 8), start, 9, 3))
    assert heard.shape == (9, 3, 3, 16) and start > 0


def test_what_is_in_the_cache_is_not_encoded_again(tmp_path, encoder):
    sound = write(tmp_path / "a.wav", speech(5), 16000)
    samples, cache = Samples([video_beside(sound)], LAYOUT, seed=0), TensorCache(tmp_path / "cache")
    keys = encode_conditions(samples, ClipAudio(8, 5, encoder), cache)
    again = AudioEncoder(encoder.folder)
    assert encode_conditions(samples, ClipAudio(8, 5, again), cache) == keys
    assert "model" not in vars(again)
    # Other rows have other keys.
    write(tmp_path / "b.wav", speech(5, seed=1), 16000)
    others = Samples([video_beside(tmp_path / "b.wav")], LAYOUT, seed=0)
    assert encode_conditions(others, ClipAudio(8, 5, encoder), cache) != keys
    assert encode_conditions(samples, ClipAudio(8, 3, encoder), cache) != keys


def test_features_may_lie_in_safetensors(tmp_path):
    save_file({"rows": torch.from_numpy(counted(40))}, tmp_path / "a.safetensors")
    samples = Samples([video_beside(tmp_path / "a.safetensors")], LAYOUT, seed=0)
    assert clip_of(samples, ClipAudio(8, 1), tmp_path)[0, 0, 0] == samples.cut(0).start


def test_a_pickle_is_no_file_of_rows(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as rows"):
        open_audio(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (37, "37 rows, a row a frame, but the video has 40 frames at 8 a second: it ends"),
        (43, "of anoth"),
    ],
)
def test_rows_that_are_not_those_of_the_video_are_refused(tmp_path, length, message):
    np.save(tmp_path / "a.npy", counted(length))
    samples = Samples([video_beside(tmp_path / "a.npy")], LAYOUT, seed=0)
    with pytest.raises(ValueError, match=message):
        encode_conditions(samples, ClipAudio(8, 5), TensorCache(tmp_path / "cache"))
    # A quarter of a second is nothing.
    for near in (38, 42):
        np.save(tmp_path / "a.npy", counted(near))
        encode_conditions(samples, ClipAudio(8, 5), TensorCache(tmp_path / "cache"))


def test_a_sound_may_be_longer_than_its_video_and_not_shorter(tmp_path, encoder):
    samples = Samples([video_beside(write(tmp_path / "a.wav", speech(9), 16000))], LAYOUT, seed=0)
    assert len(encode_conditions(samples, ClipAudio(8, 5, encoder), TensorCache(tmp_path / "cache"))) == 1
    write(tmp_path / "a.wav", speech(4), 16000)
    with pytest.raises(ValueError, match="has 32 rows, a row a frame, but the video has 40 frames"):
        encode_conditions(samples, ClipAudio(8, 5, encoder), TensorCache(tmp_path / "cache"))


def test_a_sound_without_encoder_and_rows_of_another_are_told(tmp_path, encoder):
    sound = Samples([video_beside(write(tmp_path / "a.wav", speech(5), 16000))], LAYOUT, seed=0)
    with pytest.raises(ValueError, match="`audio` of ramp cannot be used: a sound needs an encoder: give `--audio_en"):
        encode_conditions(sound, ClipAudio(8, 5), TensorCache(tmp_path / "cache"))
    with pytest.raises(ValueError, match="rows of 48 values, layers times channels, but the modules, .* have 6:"):
        encode_conditions(sound, ClipAudio(8, 5, encoder), TensorCache(tmp_path / "cache"), row_values=6)


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_the_sound_in_a_video_begins_with_its_picture(tmp_path, encoder, delay):
    """One that begins later would be heard too early."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        pictures, sound = container.add_stream("ffv1", rate=8), container.add_stream("pcm_s16le", rate=16000)
        pictures.width, pictures.height, pictures.pix_fmt, sound.layout = 64, 48, "yuv420p", "mono"
        samples = (speech(5)[None] * 32767).astype(np.int16)
        heard = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        heard.sample_rate, heard.pts, heard.time_base = 16000, round(16000 * delay), Fraction(1, 16000)
        container.mux(sound.encode(heard))
        for _ in range(40):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux([*pictures.encode(), *sound.encode()])
    samples, cache = Samples([video_beside(tmp_path / "a.mkv")], LAYOUT, seed=0), TensorCache(tmp_path / "cache")
    if not delay:
        assert len(encode_conditions(samples, ClipAudio(8, 5, encoder), cache)) == 1
        return
    with pytest.raises(ValueError, match="the sound in it begins 0.50 seconds after the picture"):
        encode_conditions(samples, ClipAudio(8, 5, encoder), cache)


def test_an_encoder_that_is_none_is_told(tmp_path):
    with pytest.raises(ValueError, match="is no model"):
        AudioEncoder(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(ValueError, match="must be a Wav2Vec2 model, but its config.json tells of 'hubert'"):
        AudioEncoder(tmp_path)


# What a clip sees


def test_pictures_of_poses_are_cut_as_the_frames_are(tmp_path):
    """Where the pictures are the frames themselves, a clip sees itself."""
    np.save(tmp_path / "a.npy", ramp(120, 160, list(range(40))))
    samples = Samples([video_beside(tmp_path / "a.npy", size=(120, 160))], LAYOUT, seed=3, samples_per_video=3)
    for index in range(3):
        seen = clip_of(samples, ClipPoses(8), tmp_path, index)
        assert seen.dtype == torch.uint8 and seen.shape == (9, 48, 64, 3)
        assert torch.equal(seen, to_uint8(samples[index]["video"]).permute(1, 2, 3, 0))


def test_a_video_of_poses_is_resampled_as_the_video_is(tmp_path):
    write_numbered(tmp_path / "pose.mkv", num_frames=60, rate=12)
    video = replace(open_video(write_numbered(tmp_path / "a.mkv", rate=8), ""), beside=tmp_path / "pose.mkv")
    samples = Samples([video], replace(LAYOUT, center_crop=True), seed=0)
    start = samples.cut(0).start
    seen = clip_of(samples, ClipPoses(8), tmp_path)
    assert torch.equal(seen, torch.from_numpy(open_pose(tmp_path / "pose.mkv", 48, 64, 8)[start : start + 9]))


# What a batch follows


def test_a_batch_hears_windows_and_a_share_of_it_zeros():
    rows = torch.rand(200, 13, 2, 3) + 1
    followed, no_image = Following(kind="audio", p_no_condition=0.3).choose(
        {"audio": rows}, torch.Generator().manual_seed(0)
    )
    left_out = (followed["audio"] == 0).flatten(1).all(1)
    assert followed["audio"].shape == (200, 9, 5, 2, 3) and not no_image.any()
    for sample in range(200):
        assert left_out[sample] or torch.equal(followed["audio"][sample], windows_of(rows[sample]))
    assert 40 < left_out.sum() < 80


def test_poses_and_images_are_left_out_each_by_itself():
    pictures = torch.randint(256, (2000, 1, 2, 2, 3), dtype=torch.uint8)
    no_condition, p_no_image = PUBLISHED_SHARES["pose"]
    following = Following(kind="pose", p_no_condition=no_condition, p_no_image=p_no_image)
    followed, no_image = following.choose({"pose": pictures}, torch.Generator().manual_seed(0))
    assert torch.equal(followed["pose"], pose_pictures(pictures)) and followed["pose"].shape == (2000, 3, 1, 2, 2)
    assert float(followed["pose"].max()) == 1
    without = followed["pose_weight"] == 0
    assert without.float().mean() == pytest.approx(0.145, abs=0.03)
    assert no_image.float().mean() == pytest.approx(0.1, abs=0.03)
    assert (without & no_image).float().mean() == pytest.approx(0.0145, abs=0.01)


def test_shares_are_probabilities():
    with pytest.raises(ValueError, match="`p_no_image`"):
        Following(kind="pose", p_no_image=1.5)
