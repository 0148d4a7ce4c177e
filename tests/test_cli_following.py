"""Films that follow a sound or poses, by the command, on tiny models: frames, sound, and what is refused."""

import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from conftest import make_components, make_transformer, quiet
from diffusers_svi import SVIEulerScheduler, SVIPipeline, save_video
from diffusers_svi.conditions.dance_pipeline import SVIDancePipeline
from diffusers_svi.conditions.pose import open_pose
from diffusers_svi.conditions.talk_pipeline import SVITalkPipeline
from diffusers_svi.film import read_clips
from diffusers_svi.loading import load_pipeline
from diffusers_svi.presets import PRESETS
from diffusers_svi.prompts import NEGATIVE_PROMPT
from diffusers_svi.recipe import read_recipe
from diffusers_svi.video import to_8_bits
from test_audio import speech, write
from test_dance import counted, make_dwpose
from test_lora import make_lora
from test_sound import make_sound
from test_talk import make_encoder, make_multitalk


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A model, LoRAs with their modules in them, and what hears; speech and poses of 17 frames, a start image."""
    folder = tmp_path_factory.mktemp("following")
    SVIPipeline(**make_components("i2v")).save_pretrained(folder / "model")
    lora = make_lora(make_transformer())
    save_file({**lora, **make_multitalk()}, folder / "svi-talk.safetensors")
    save_file({**lora, **make_dwpose()}, folder / "svi-dance.safetensors")
    save_file(lora, folder / "plain.safetensors")
    make_encoder().save_pretrained(folder / "encoder")
    write(folder / "speech.wav", speech(0.68), 16000)
    save_video(folder / "dance.mp4", 10 * counted(17), fps=25)
    pixels = np.random.default_rng(0).integers(256, size=(4, 4, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).resize((32, 32)).save(folder / "start.png")
    return folder


def generate(published: Path, preset: str = "talk", command: str = "generate", **options: object) -> list[object]:
    of_preset = {
        "talk": {"audio": published / "speech.wav", "audio_encoder": published / "encoder"},
        "dance": {"pose": published / "dance.mp4"},
    }
    values = {
        "out": "film.mkv",
        "codec": "ffv1",
        "preset": preset,
        "model": published / "model",
        "lora": published / f"svi-{preset}.safetensors",
        "image": published / "start.png",
        "prompt": "a cat sits",
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        **of_preset.get(preset, {}),
        **options,
    }
    flags = [f"--{name}" for name, value in values.items() if value is True]
    given = {name: value for name, value in values.items() if value is not None and value is not True}
    return [command, *flags, *(f"--{name}={value}" for name, value in given.items())]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def seconds_of_sound(path: Path) -> Fraction:
    with av.open(str(path)) as file:
        return sum(Fraction(frame.samples, frame.sample_rate) for frame in file.decode(audio=0))


def by_hand(pipe: SVIPipeline, published: Path, lora: str, **options: object) -> np.ndarray:
    """The film as in the docs, in Python."""
    pipe.scheduler = SVIEulerScheduler.from_config(pipe.scheduler.config, shift=5.0)
    pipe.load_lora_weights(published / lora)
    image = PIL.Image.open(published / "start.png")
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
    given = {"negative_prompt": NEGATIVE_PROMPT, "seeds": [0, 42], **size, **options}
    return np.stack([to_8_bits(frame) for frame in quiet(pipe)(image, "a cat sits", **given).frames[0]])


def test_a_film_follows_speech_has_its_sound_and_goes_on_after_a_kill(run_command, published, tmp_path):
    """Its frames are those of the pipeline, as many as the speech has; the bytes are those of one never killed."""
    status, told, errors = run_command(*generate(published, out="whole.mkv", audio_guidance_scale=3))
    assert status == 0 and "whole.mkv: clips 1 to 2, about 1 seconds at 25 fps." in told, errors
    encoder = make_encoder()
    expected = by_hand(
        SVITalkPipeline(**make_components("i2v"), audio_encoder=encoder),
        published,
        "svi-talk.safetensors",
        audio=published / "speech.wav",
        audio_guidance_scale=3.0,
    )
    assert expected.shape == (17, 32, 32, 3) and np.array_equal(frames_of(tmp_path / "whole.mkv"), expected)
    assert seconds_of_sound(tmp_path / "whole.mkv") == Fraction(17, 25)
    settings = read_recipe(tmp_path / "whole.mkv").film["settings"]
    assert (settings["guidance_scale"], settings["audio_guidance_scale"]) == (2.0, 3.0)
    assert settings["audio"].startswith("17 frames ")
    status, told, _ = run_command("inspect", "whole.mkv")
    assert status == 0 and f"audio                 {settings['audio']}\n" in told

    # As a kill leaves it, in the middle of the second clip.
    assert run_command(*generate(published, audio_guidance_scale=3, num_clips=1))[0] == 0
    with open(tmp_path / "film.mkv", "ab") as film:
        film.write(b"half of a clip")
    status, _, errors = run_command(*generate(published, audio_guidance_scale=3))
    assert status == 0, errors
    assert (tmp_path / "film.mkv").read_bytes() == (tmp_path / "whole.mkv").read_bytes()
    status, told, _ = run_command(*generate(published, audio_guidance_scale=3))
    assert status == 0 and "film.mkv has 2 clips already" in told

    make_sound(tmp_path / "other.wav", 0.68)
    for changed, message in (
        ({}, "was made with `audio_guidance_scale` '3.0', and '5.0' is asked for"),
        ({"audio": tmp_path / "other.wav"}, "is a film with"),
        ({"num_clips": 3}, "`audio` has 17 frames, which make 2 clips"),
    ):
        status, _, errors = run_command(*generate(published, **changed))
        assert status == 1 and message in errors, errors
    assert (tmp_path / "film.mkv").read_bytes() == (tmp_path / "whole.mkv").read_bytes()


def test_a_film_that_follows_speech_is_made_longer_and_once_more_by_its_recipe(run_command, published, tmp_path):
    """What it follows is given again, and the very same."""
    scale = {"audio_guidance_scale": 3}
    assert run_command(*generate(published, out="whole.mkv", **scale))[0] == 0
    assert run_command(*generate(published, **scale, num_clips=1))[0] == 0
    encoder = ("--audio_encoder", published / "encoder")
    speech_of_it = ("--audio", published / "speech.wav")
    extend = ("extend", "film.mkv", "--num_clips", 1, *encoder)
    make_sound(tmp_path / "other.wav", 0.68)
    for wrong, message in (
        ((), "film.mkv follows speech, of which it tells no more than a fingerprint: give the file by `--audio`"),
        (("--audio", "other.wav"), "film.mkv follows other speech (17 frames "),
        ((*speech_of_it, "--num_clips", 5), "`audio` has 17 frames, which make 2 clips"),
    ):
        status, _, errors = run_command(*extend, *wrong)
        assert status == 1 and message in errors, errors
    status, _, errors = run_command(*extend, *speech_of_it)
    assert status == 0, errors
    again = ("generate", "--recipe", "whole.mkv", "--out", "again.mkv", *encoder)
    status, _, errors = run_command(*again)
    assert status == 1 and "has sound, which is not in its recipe: give its file by `--audio`" in errors
    status, _, errors = run_command(*again, *speech_of_it)
    assert status == 0, errors
    for film in ("film.mkv", "again.mkv"):
        assert (tmp_path / film).read_bytes() == (tmp_path / "whole.mkv").read_bytes()


def test_a_film_that_follows_nothing_takes_nothing_to_follow_by_its_recipe(run_command, published, tmp_path):
    plain = {"lora": "none", "num_inference_steps": 1, "num_clips": 1}
    assert run_command(*generate(published, "none", **plain))[0] == 0
    status, _, errors = run_command("extend", "film.mkv", "--num_clips", 1, "--pose", published / "dance.mp4")
    assert status == 1 and "film.mkv follows nothing beside text: leave out `--pose`" in errors


def test_a_film_follows_poses_to_music_and_is_made_longer(run_command, published, tmp_path):
    make_sound(tmp_path / "music.wav", 0.5, rate=16000)
    music = {"audio": "music.wav"}
    assert run_command(*generate(published, "dance", **music, num_clips=1))[0] == 0
    assert len(frames_of(tmp_path / "film.mkv")) == 9
    again = ("--pose", published / "dance.mp4", "--audio", "music.wav")
    status, _, errors = run_command("extend", "film.mkv", "--num_clips", 1, *again)
    assert status == 0, errors
    status, told, _ = run_command(*generate(published, "dance", **music))
    assert status == 0 and "film.mkv has 2 clips already" in told
    expected = by_hand(
        SVIDancePipeline(**make_components("i2v")),
        published,
        "svi-dance.safetensors",
        pose=published / "dance.mp4",
    )
    assert len(expected) == 17 and np.array_equal(frames_of(tmp_path / "film.mkv"), expected)
    # After the music there is silence.
    assert seconds_of_sound(tmp_path / "film.mkv") == Fraction(17, 25)
    save_video(tmp_path / "other.mp4", 12 * counted(17), fps=25)
    status, _, errors = run_command(*generate(published, "dance", **music, pose="other.mp4"))
    assert status == 1 and "was made with `pose` '17 frames " in errors, errors


def test_a_pose_video_of_another_rate_is_brought_to_that_of_the_film_and_may_loop(run_command, published, tmp_path):
    """Nine poses at 12.5 a second are 17 or 18 frames at 25; 8 frames loop for as many clips as are asked for."""
    save_video(tmp_path / "slow.mp4", 20 * counted(9), fps=12.5)
    assert len(open_pose(tmp_path / "slow.mp4", fps=25)) in (17, 18)
    status, told, errors = run_command(*generate(published, "dance", pose="slow.mp4", dry_run=True))
    assert status == 0 and "clips 1 to " in told, errors
    short = {"pose": "short.mp4", "num_clips": 2}
    save_video(tmp_path / "short.mp4", 20 * counted(8), fps=25)
    status, _, errors = run_command(*generate(published, "dance", **short, dry_run=True))
    assert status == 1 and "`pose` has 8 frames, which make 1 clips" in errors
    status, _, errors = run_command(*generate(published, "dance", **short, loop_pose=True))
    assert status == 0 and read_recipe(tmp_path / "film.mkv").film["settings"]["loop_pose"] is True, errors
    assert len(frames_of(tmp_path / "film.mkv")) == 17


def test_a_model_that_was_saved_with_modules_and_what_hears_needs_nothing_else(run_command, published, tmp_path):
    """How clips are chained is known once it is loaded, and so is the length of the film."""
    pipe = SVITalkPipeline(**make_components("i2v"), audio_encoder=make_encoder())
    pipe.load_audio_modules(make_multitalk())
    pipe.save_pretrained(tmp_path / "own")
    own = {"model": tmp_path / "own", "lora": "none", "audio_encoder": None}
    status, _, errors = run_command(*generate(published, **own))
    assert status == 0 and len(frames_of(tmp_path / "film.mkv")) == 17, errors
    status, _, errors = run_command(*generate(published, **own, num_clips=None))
    assert status == 0 and len(read_clips(tmp_path / "film.mkv")) == 2


def test_a_film_that_begins_with_a_video_hears_from_its_end_on(run_command, published, tmp_path):
    """The speech is that of the whole film: behind the 9 frames of the video there is one clip."""
    save_video(tmp_path / "before.mp4", 20 * counted(9), fps=25)
    begun = generate(published, image=None, continue_from="before.mp4", num_inference_steps=1)
    status, _, errors = run_command(*begun)
    assert status == 0 and len(read_clips(tmp_path / "film.mkv")) == 2, errors
    assert len(frames_of(tmp_path / "film.mkv")) == 17
    status, told, _ = run_command(*begun)
    assert status == 0 and "film.mkv has 1 clips already" in told


def test_jobs_follow_each_its_own(run_command, published, tmp_path):
    jobs = [
        {"out": "talk.mkv", "num_clips": 1},
        {"out": "dance.mkv", "preset": "dance", "pose": str(published / "dance.mp4")}
        | {"lora": str(published / "svi-dance.safetensors"), "audio": None, "audio_encoder": None},
        {"out": "long.mkv", "num_clips": 9},
    ]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs[:2]))
    asked = generate(published, jobs="films.jsonl", out=None)
    status, told, errors = run_command(*asked)
    assert status == 0 and "films.jsonl: 2 of 2 films." in told, errors
    assert len(frames_of(tmp_path / "talk.mkv")) == 9 and len(frames_of(tmp_path / "dance.mkv")) == 17
    (tmp_path / "films.jsonl").write_text(json.dumps(jobs[2]))
    status, _, errors = run_command(*asked)
    assert status == 1 and "line 1: `audio` has 17 frames, which make 2 clips" in errors


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("talk", {"audio": None}, "A film of `--preset talk` follows speech: give `--audio`, its file."),
        ("dance", {"pose": None}, "A film of `--preset dance` follows poses: give `--pose`, its file."),
        ("talk", {"pose": "dance.mp4"}, "A film follows one of the two, audio or poses."),
        ("dance", {"audio_guidance_scale": 0}, "`--audio_guidance_scale` is for films that follow audio"),
        ("shot", {"pose": "dance.mp4"}, "`--preset shot` makes none: leave it out, or give `--preset dance`."),
        ("shot", {"audio_encoder": "encoder"}, "or give `--preset talk`."),
        ("shot", {"lora": "svi-talk.safetensors"}, "is for films that follow audio: give `--preset talk`"),
        ("talk", {"audio": "gone.wav"}, "`audio`='gone.wav' cannot be read as sound: [Errno 2]"),
        ("talk", {"audio": "start.png"}, "`audio`='start.png' cannot be read as sound"),
        ("talk", {"audio": "click.wav"}, "`audio`='click.wav' is shorter than a frame of the film"),
        ("dance", {"pose": "gone.mp4"}, "gone.mp4"),
        ("dance", {"fps": 12.5}, "`fps` must be a whole number of at least 1, got 12.5"),
        ("talk", {"num_clips": 3}, "`audio` has 17 frames, which make 2 clips of `num_frames`=9"),
        ("talk", {"prompts": "three.txt", "prompt": None}, "but 3 are asked for by `prompts`"),
        ("talk", {"lora": "none"}, "has no modules for audio, and `lora`='none' brings none"),
        (
            "dance",
            {"lora": "plain.safetensors"},
            "has no modules for pose, and `lora`='plain.safetensors' brings none",
        ),
        ("talk", {"audio_encoder": "pickled"}, "no file named model.safetensors found in directory pickled"),
    ],
)
def test_what_cannot_be_followed_is_told_before_a_model_is_loaded(
    run_command, published, tmp_path, preset, options, message
):
    for name in ("svi-talk.safetensors", "plain.safetensors", "start.png"):
        (tmp_path / name).symlink_to(published / name)
    write(tmp_path / "click.wav", speech(0.03), 16000)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").symlink_to(published / "encoder" / "config.json")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    (tmp_path / "three.txt").write_text("a cat sits\nit jumps\nit sleeps\n")
    status, _, errors = run_command(*generate(published, preset, **options))
    assert status == 1 and message in errors and "Traceback" not in errors, errors
    assert "Loading pipeline components" not in errors and not (tmp_path / "film.mkv").exists()


def test_a_package_that_is_missing_is_named_before_a_model_is_loaded(run_command, published, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)  # Python's way of saying that there is none
    status, _, errors = run_command(*generate(published, dry_run=True))
    assert status == 1 and "`diffusers_svi[talk]`" in errors


def test_what_hears_is_whole_on_the_device_where_the_rest_is_offloaded_layer_by_layer(published):
    """And in float32. Its layers are taken one by one, around the hooks of offloading."""
    options = {"model": published / "model", "lora": published / "svi-talk.safetensors", "dtype": "bfloat16"}
    pipe = load_pipeline(PRESETS["talk"], **options, audio_encoder=published / "encoder", offload="group")
    hooked = {
        name: any(hasattr(layer, "_diffusers_hook") for layer in getattr(pipe, name).modules())
        for name in ("transformer", "audio_encoder")
    }
    assert hooked == {"transformer": True, "audio_encoder": False}
    assert (pipe.transformer.dtype, pipe.audio_encoder.dtype) == (torch.bfloat16, torch.float32)
    assert not pipe.audio_encoder.training


def test_a_plan_counts_modules_and_the_clips_of_a_sound(run_command, published):
    """The modules are 2.49 B weights of two bytes."""
    weights = {}
    for preset in ("shot", "talk"):
        sizes = {
            "preset": preset,
            "model": "wan2.1-i2v-14b",
            "prompt": None,
            "out": None,
            "image": None,
            "codec": None,
        }
        status, told, errors = run_command(*generate(published, command="plan", **sizes, num_clips=None))
        assert status == 0, errors
        weights[preset] = float(re.search(r"transformer ([\d.]+) GB", told).group(1))
    assert "film     2 clips, 17 frames: 0.7 seconds at 25 fps" in told
    assert weights["talk"] - weights["shot"] == pytest.approx(2 * 2.487168, abs=0.11)


def test_correction_is_not_measured_of_what_follows(run_command, published):
    picture = published / "start.png"
    status, _, errors = run_command("correct", "--preset", "talk", "--image", picture, "--out_dir", "x")
    assert status == 1 and "follow audio, which `correct` does not give them" in errors
