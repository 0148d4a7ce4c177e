"""`examples/convert_svi_data.py`: the authors' preprocessed data, whose pickles may ask for nothing but data."""

import io
import os
import pickle
import shutil
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

from conftest import load_script
from diffusers_svi.conditions.clip_conditions import ClipAudio, ClipPoses, encode_conditions
from diffusers_svi.training.cache import TensorCache
from diffusers_svi.training.samples import SampleLayout, Samples
from diffusers_svi.training.sources import open_folder, usable_videos
from small_videos import numbers, write_numbered


LAYOUT = SampleLayout(num_frames=9, height=32, width=48, fps=25)


@pytest.fixture(scope="module")
def script():
    return load_script(Path(__file__).parents[1] / "examples" / "convert_svi_data.py")


def jpegs(count: int, step: int = 4) -> dict[str, bytes]:
    """Frames as the authors' scripts pickle them; each of one grey, that tells its number."""
    pictures = {}
    for number in range(count):
        file = io.BytesIO()
        PIL.Image.fromarray(np.full((32, 48, 3), step * number, np.uint8)).save(file, "JPEG", quality=100)
        pictures[f"{number:06}.jpg"] = file.getvalue()
    return pictures


def dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def convert(script, tmp_path: Path) -> Path:
    arguments = {"input_dir": tmp_path / "in", "output_dir": tmp_path / "out", "caption": "a person is talking"}
    script.main([f"--{name}={value}" for name, value in arguments.items()])
    return tmp_path / "out"


def samples_of(folder: Path, condition: str) -> Samples:
    videos, skipped = usable_videos(open_folder(folder, condition=condition), LAYOUT)
    assert not skipped
    return Samples(videos, LAYOUT, seed=0)


def test_talk_is_what_training_reads(script, tmp_path, capsys):
    features = torch.arange(40.0).view(40, 1, 1).expand(40, 2, 3).clone()
    for name in ("b", "a"):
        dump(tmp_path / "in" / name / "frame_data.pkl", jpegs(40))
        dump(tmp_path / "in" / name / "audio_embedding.pkl", features)
    samples = samples_of(convert(script, tmp_path), "audio")
    assert [Path(video.name).name for video in samples.videos] == ["a.mkv", "b.mkv"]
    assert samples.caption(0) == "a person is talking" and "an unpickler that runs nothing" in capsys.readouterr().out
    cache = TensorCache(tmp_path / "cache")
    start = samples.cut(0).start
    heard = cache.load(encode_conditions(samples, ClipAudio(25, 1), cache)[0])["audio"]
    assert heard[:, 0, 0].tolist() == numbers(samples[0]["video"]) == list(range(start, start + 9))


def test_the_frames_are_the_very_pictures(script, tmp_path):
    """Not encoded anew: they are what FFmpeg makes of the JPEG files."""
    noise = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)).save(noise, "JPEG")
    (tmp_path / "one.jpg").write_bytes(noise.getvalue())
    script.write_video(tmp_path / "a.mkv", [noise.getvalue()] * 3, 25)
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert [bytes(packet) for packet in container.demux() if packet.size] == [noise.getvalue()] * 3


def test_dance_is_what_training_reads(script, tmp_path):
    dump(tmp_path / "in" / "a" / "frame_data.pkl", jpegs(40))
    dump(tmp_path / "in" / "a" / "dw_pose_with_foot_wo_face.pkl", jpegs(40))
    samples, cache = samples_of(convert(script, tmp_path), "pose"), TensorCache(tmp_path / "cache")
    seen = cache.load(encode_conditions(samples, ClipPoses(25), cache)[0])["pose"]
    assert numbers(seen.numpy()) == numbers(samples[0]["video"])


def test_dance_without_pickles_is_copied(script, tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    write_numbered(tmp_path / "in" / "a" / "video.mp4", rate=25)
    shutil.copy(tmp_path / "in" / "a" / "video.mp4", tmp_path / "in" / "a" / "dwpose.mp4")
    samples = samples_of(convert(script, tmp_path), "pose")
    assert samples.videos[0].beside == tmp_path / "out" / "a-pose.mp4"
    assert (tmp_path / "out" / "a.mp4").read_bytes() == (tmp_path / "in" / "a" / "video.mp4").read_bytes()


class Call:
    """Pickled, it asks that a file be made."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Storage:
    """Pickled, it has the bytes of a tensor's storage ask for it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        file = io.BytesIO()
        torch.save(Call(self.path), file)
        return torch.storage._load_from_bytes, (file.getvalue(),)


@pytest.mark.parametrize("kind", [Call, Storage])
@pytest.mark.parametrize("name", ["frame_data.pkl", "audio_embedding.pkl"])
def test_a_pickle_that_asks_for_more_is_not_run(script, tmp_path, capsys, kind, name):
    for file, value in (("frame_data.pkl", jpegs(9)), ("audio_embedding.pkl", torch.zeros(9, 2, 3))):
        dump(tmp_path / "in" / "a" / file, kind(tmp_path / "made") if file == name else value)
    with pytest.raises(SystemExit) as exit:
        convert(script, tmp_path)
    assert exit.value.code == 1 and f"{name} is not read: " in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    pickle.loads((tmp_path / "in" / "a" / name).read_bytes()) if kind is Call else None
    assert (tmp_path / "made").exists() == (kind is Call)


@pytest.mark.parametrize(
    ("frames", "audio", "message"),
    [
        ({"0.jpg": b"GIF89a"}, torch.zeros(9, 2, 3), "'0.jpg' is no JPEG"),
        ([1], torch.zeros(9, 2, 3), "must hold a dictionary of pictures, got list"),
        (None, torch.zeros(9, 2), "must hold a tensor (frames, layers, channels) of floats"),
        (None, None, "dw_pose_with_foot_wo_face.pkl is not read"),
    ],
)
def test_what_is_no_such_data_is_told(script, tmp_path, capsys, frames, audio, message):
    dump(tmp_path / "in" / "a" / "frame_data.pkl", jpegs(9) if frames is None else frames)
    if audio is not None:
        dump(tmp_path / "in" / "a" / "audio_embedding.pkl", audio)
    with pytest.raises(SystemExit):
        convert(script, tmp_path)
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(script, tmp_path)
    assert "is there already: give another one" in capsys.readouterr().err
