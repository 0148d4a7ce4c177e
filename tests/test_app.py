"""The page: a studio and its queue without a browser; and in a real one a film made, changed, stopped and finished."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright
from safetensors.torch import load_file, save_file

from conftest import make_components, quiet
from diffusers_svi import PixelMotion, SVIPipeline, save_video
from diffusers_svi.app.project import Project
from diffusers_svi.app.settings import Settings
from diffusers_svi.app.studio import Progress, Studio, in_plain_words
from diffusers_svi.app.uploads import read_upload
from diffusers_svi.conditions.dance_pipeline import SVIDancePipeline
from diffusers_svi.conditions.talk_pipeline import SVITalkPipeline
from diffusers_svi.film import read_clips
from diffusers_svi.recipe import read_recipe
from test_audio import speech, write
from test_dance import counted, make_dwpose
from test_lora import make_lora
from test_talk import make_encoder, make_multitalk


ROOT = Path(__file__).parents[1]
START = ROOT / "docs" / "images" / "start.png"
SMALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0, "fps": 8}
SETTINGS = Settings.of("none", **SMALL)
LIMIT = 180  # seconds, after which a test that waits gives up
expect.set_options(timeout=LIMIT * 1000)


def load(preset: str) -> SVIPipeline:
    return quiet(SVIPipeline(**make_components("i2v")))


def load_following(preset: str) -> SVIPipeline:
    """As published, with the modules for what films follow."""
    if preset == "talk":
        pipe = SVITalkPipeline(**make_components("i2v"), audio_encoder=make_encoder())
        pipe.load_audio_modules(make_multitalk())
        return quiet(pipe)
    pipe = SVIDancePipeline(**make_components("i2v"))
    pipe.load_lora_weights({**make_lora(pipe.transformer), **make_dwpose()}, conditioning=PixelMotion(5))
    return quiet(pipe)


class Gate:
    """A pipeline whose steps can be held back, so that a test knows where a film stands."""

    def __init__(self, load: Callable[[str], SVIPipeline] = load):
        self._load, self._changed, self._left = load, threading.Condition(), float("inf")

    def let(self, steps: float) -> None:
        """Let so many steps through from now on."""
        with self._changed:
            self._left = steps
            self._changed.notify_all()

    def load(self, preset: str) -> SVIPipeline:
        pipe = self._load(preset)
        pipe.transformer.register_forward_pre_hook(self._pass)
        return pipe

    def _pass(self, *_: object) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._left > 0, LIMIT)
            self._left -= 1


def close_amid(studio: Studio, gate: Gate) -> None:
    """Close a studio whose film is held back, and goes on once the closing has begun."""

    def open_gate() -> None:
        wait_for(lambda: studio._closed)
        gate.let(float("inf"))

    opening = threading.Thread(target=open_gate)
    opening.start()
    studio.close()
    opening.join()


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def studio(tmp_path, gate):
    studio = Studio(tmp_path / "films", gate.load)
    yield studio
    gate.let(float("inf"))
    studio.close()


def wait_for(true, what: str = "") -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def at_rest(studio: Studio, name: str) -> str:
    wait_for(lambda: studio.status(name) not in ("queued", "making", "stopping"))
    return studio.status(name)


def prompts(film: Project) -> list[str]:
    return [clip["prompt"] for clip in read_clips(film.path)]


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_film_is_made_and_can_be_made_longer(studio, image):
    film = studio.create(image, ["a cat sits", "", "it jumps"], SETTINGS, "  My cat  ")
    assert studio.status(film.name) == "stopped" and film.title == "My cat"
    studio.make(film.name)
    assert at_rest(studio, film.name) == "done", studio.error(film.name)
    assert prompts(film) == ["a cat sits", "a cat sits", "it jumps"]
    assert film.num_frames == num_frames(film.path) == 3 * 8 + 1
    assert [clip["made_with"]["seed"] for clip in read_clips(film.path)] == ["0", "42", "84"]

    film.add(["the dog sleeps"])
    assert studio.status(film.name) == "stopped"
    studio.make(film.name)
    assert at_rest(studio, film.name) == "done"
    finished = studio.finished(film.name)
    assert finished.name == f"{film.name}.mp4" and num_frames(finished) == 4 * 8 + 1
    made = finished.stat().st_mtime_ns
    assert studio.finished(film.name).stat().st_mtime_ns == made


def test_what_has_not_begun_can_be_changed_while_the_film_is_made(studio, gate, image):
    film = studio.create(image, [f"a cat {n}" for n in range(6)], SETTINGS)
    numbers = [clip.number for clip in film.clips]
    gate.let(0)
    studio.make(film.name)
    wait_for(lambda: film.num_fixed > 0)
    fixed = film.num_fixed
    with pytest.raises(ValueError, match="Clip 1 has begun"):
        film.edit(numbers[0], "the dog")
    with pytest.raises(ValueError, match="Clip 1 has begun"):
        film.remove(numbers[0])
    film.edit(numbers[3], "the  dog\n sleeps ")
    film.remove(numbers[4])
    film.add(["a red mat"])
    film.move(numbers[5], -1)
    with pytest.raises(ValueError, match="not on the timeline any more"):
        film.edit(numbers[4], "gone")
    changed = ["a cat 0", "a cat 1", "a cat 2", "a cat 5", "the dog sleeps", "a red mat"]
    # On disk already, for who comes after a crash.
    assert [clip["prompt"] for clip in json.loads((film.folder / "film.json").read_text())["clips"]] == changed
    assert fixed <= 2
    gate.let(float("inf"))
    assert at_rest(studio, film.name) == "done", studio.error(film.name)
    assert prompts(film) == changed


def test_a_clip_is_not_moved_before_one_that_has_begun(studio, gate, image):
    film = studio.create(image, [f"a cat {n}" for n in range(4)], SETTINGS)
    gate.let(0)
    studio.make(film.name)
    wait_for(lambda: film.num_fixed > 0)
    last = film.clips[-1].number
    film.move(last, -10)
    assert [clip.number for clip in film.clips].index(last) == film.num_fixed


def test_a_film_is_stopped_and_goes_on_as_if_it_had_not_been(studio, gate, image):
    story = [f"a cat {n}" for n in range(4)]
    whole = studio.create(image, story, SETTINGS)
    studio.make(whole.name)
    assert at_rest(studio, whole.name) == "done"

    film = studio.create(image, story, SETTINGS)
    gate.let(3)
    studio.make(film.name)
    wait_for(lambda: film.num_done == 1)
    studio.stop(film.name)
    gate.let(float("inf"))
    assert at_rest(studio, film.name) == "stopped" and film.num_done == 1
    # What was dropped can be changed again.
    assert film.num_fixed == film.num_done
    studio.make(film.name)
    assert at_rest(studio, film.name) == "done"
    assert film.path.read_bytes() == whole.path.read_bytes()


def test_two_films_wait_for_each_other(studio, gate, image):
    gate.let(0)
    one, two, three = (studio.create(image, ["a cat sits"], SETTINGS) for _ in range(3))
    assert one.name < two.name < three.name and len({film.folder for film in (one, two, three)}) == 3
    for film in (one, two, three, two):
        studio.make(film.name)
    wait_for(lambda: studio.status(one.name) == "making")
    assert [studio.status(film.name) for film in (two, three)] == ["queued", "queued"]
    assert [studio.place(film.name) for film in (two, three)] == [1, 2]
    studio.stop(two.name)
    assert studio.status(two.name) == "stopped" and studio.place(three.name) == 1
    with pytest.raises(ValueError, match="no clip yet"):
        studio.finished(one.name)
    gate.let(float("inf"))
    assert [at_rest(studio, film.name) for film in (one, three)] == ["done", "done"]
    assert [film.name for film in studio.films] == [three.name, two.name, one.name]


def test_the_queue_goes_on_after_a_film_that_fails(tmp_path, image):
    def fails(preset: str) -> SVIPipeline:
        if preset == "shot":
            raise OSError(28, "No space left on device")
        return load(preset)

    studio = Studio(tmp_path, fails)
    bad = studio.create(image, ["a cat sits"], Settings.of("shot", **SMALL))
    wrong = studio.create(image, ["a cat sits"], Settings.of("none", **{**SMALL, "height": 48, "num_frames": 5}))
    good = studio.create(image, ["a cat sits"], SETTINGS)
    wrong.edit(wrong.clips[0].number, "")
    for film in (bad, wrong, good):
        studio.make(film.name)
    assert [at_rest(studio, film.name) for film in (bad, wrong, good)] == ["failed", "failed", "done"]
    assert studio.error(bad.name) == "The disk is full. Make room, then continue: what was made is safe."
    assert studio.error(wrong.name) == "The first clip has no prompt. Write what happens in it."
    wrong.edit(wrong.clips[0].number, "a cat sits")
    studio.make(wrong.name)
    assert at_rest(studio, wrong.name) == "done" and studio.error(wrong.name) == ""
    studio.close()


def test_values_that_are_not_finite_are_told(studio, image):
    pipe = load("none")
    for weight in pipe.transformer.parameters():
        weight.data.fill_(float("nan"))
    studio._pipeline = "none", pipe
    film = studio.create(image, ["a cat sits"], SETTINGS)
    studio.make(film.name)
    assert at_rest(studio, film.name) == "failed" and "not finite" in studio.error(film.name)
    assert film.num_done == film.num_fixed == 0


def test_what_nobody_expected_is_told_too(capsys):
    assert in_plain_words(KeyError("odd")) == "KeyError: 'odd'"
    assert "KeyError" in capsys.readouterr().err
    assert in_plain_words(MemoryError()).startswith("The memory did not suffice.")


def test_a_film_without_an_end_goes_on_with_its_last_prompt(studio, image):
    film = studio.create(image, ["a cat sits"], Settings.of("none", **SMALL, endless=True))
    studio.make(film.name)
    wait_for(lambda: film.num_done >= 3)
    studio.stop(film.name)
    assert at_rest(studio, film.name) == "stopped"
    assert set(prompts(film)) == {"a cat sits"} and len(prompts(film)) >= 3


def test_progress_tells_the_time_left(studio, gate, image):
    film = studio.create(image, ["a cat sits"] * 4, SETTINGS)
    gate.let(3)
    studio.make(film.name)
    wait_for(lambda: film.num_done == 1 and studio.progress(film.name).step == 1)
    progress = studio.progress(film.name)
    assert (progress.clip, progress.step, progress.num_steps) == (1, 1, 2)
    each = progress.seconds_a_clip
    assert 2 * each <= progress.seconds_left(4) <= 3 * each
    assert Progress(1, 1, 2, None, 0.0).seconds_left(4) is None
    assert studio.progress("another") is None


SERVER = """
import sys, time
from pathlib import Path

import PIL.Image

from diffusers_svi.app.studio import Studio
from test_app import SETTINGS, Gate

gate = Gate()
gate.let(5)
studio = Studio(sys.argv[1], gate.load)
film = studio.create(PIL.Image.open(sys.argv[2]), ["a cat sits", "it jumps", "", "the dog sleeps"], SETTINGS, "Killed")
waits = studio.create(PIL.Image.open(sys.argv[2]), ["a cat sits"], SETTINGS)
studio.make(film.name)
studio.make(waits.name)
while film.num_done < 2:
    time.sleep(0.01)
print(film.name, flush=True)
time.sleep(1000)
"""


def test_a_film_goes_on_after_its_server_was_killed(tmp_path, image):
    """With the bytes of one that was never stopped."""
    image.save(tmp_path / "image.png")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "films"), str(tmp_path / "image.png")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), *sys.path]))},
        stdout=subprocess.PIPE,
        text=True,
    )
    name = process.stdout.readline().strip()
    with pytest.raises(ValueError, match="is open in another page"):
        Studio(tmp_path / "films", load)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    studio = Studio(tmp_path / "films", load)
    film = studio.film(name)
    assert film.title == "Killed" and film.num_done == 2 and len(studio.films) == 2
    assert studio.status(name) == "interrupted"
    assert num_frames(studio.finished(name)) == 2 * 8 + 1
    for each in studio.films:
        studio.make(each.name)
    assert [at_rest(studio, each.name) for each in studio.films] == ["done", "done"]
    whole = studio.create(image, ["a cat sits", "it jumps", "", "the dog sleeps"], SETTINGS)
    studio.make(whole.name)
    assert at_rest(studio, whole.name) == "done"
    assert film.path.read_bytes() == whole.path.read_bytes()
    studio.close()
    Studio(tmp_path / "films", load).close()


def test_films_that_wait_when_a_server_ends_are_interrupted(tmp_path, gate, image):
    studio = Studio(tmp_path, gate.load)
    gate.let(0)
    one, two = (studio.create(image, ["a cat sits"] * 3, SETTINGS) for _ in range(2))
    studio.make(one.name)
    studio.make(two.name)
    wait_for(lambda: studio.status(one.name) == "making")
    close_amid(studio, gate)
    again = Studio(tmp_path, load)
    assert [again.status(film.name) for film in (one, two)] == ["interrupted", "interrupted"]
    again.close()


def test_a_folder_that_is_damaged_is_left_out(tmp_path, image):
    studio = Studio(tmp_path, load)
    names = [studio.create(image, ["a cat sits"], SETTINGS).name for _ in range(3)]
    studio.close()
    (tmp_path / names[0] / "film.json").write_text('{"format": "diffusers_svi.project"')
    (tmp_path / names[1] / "film.mp4.state").write_bytes(b"no state")
    again = Studio(tmp_path, load)
    assert [film.name for film in again.films] == names[2:]
    with pytest.raises(ValueError, match="There is no film"):
        again.film("../elsewhere")
    again.close()


def test_a_film_is_as_long_as_its_speech_which_it_has_and_goes_on_with(tmp_path, image):
    """Its folder has the speech: the bytes are those of a film that was never stopped. Clips may be cut out."""
    speech_file = write(tmp_path / "My Speech.WAV", speech(3.125), 16000)
    settings = Settings.of("talk", **{**SMALL, "audio_guidance_scale": 1.0})
    gate = Gate(load_following)
    studio = Studio(tmp_path / "films", gate.load)
    whole, film, shorter = (studio.create(image, ["a cat sits", "it jumps"], settings, "", speech_file) for _ in "123")
    speech_file.unlink()
    assert [clip.prompt for clip in film.clips] == ["a cat sits", "it jumps", ""]
    with pytest.raises(ValueError, match="ends with what it follows, after 3 clips"):
        film.add(["it sleeps"])
    studio.make(whole.name)
    assert at_rest(studio, whole.name) == "done", studio.error(whole.name)
    assert num_frames(whole.path) == 25 and prompts(whole) == ["a cat sits", "it jumps", "it jumps"]
    told = read_recipe(whole.path).film["settings"]
    assert told["audio"].startswith("25 frames ") and told["audio_guidance_scale"] == 1.0
    finished = studio.finished(whole.name)
    with av.open(str(finished)) as file:
        assert sum(frame.samples / frame.sample_rate for frame in file.decode(audio=0)) >= 3.125

    # Poses out of a video with sound: that is the film's.
    dance = studio.create(image, ["a cat sits"], Settings.of("dance", **SMALL), "", finished)
    assert dance.sound == dance.folder / "pose.mp4"

    shorter.remove(shorter.clips[-1].number)
    studio.make(shorter.name)
    assert at_rest(studio, shorter.name) == "done" and num_frames(shorter.path) == 17
    gate.let(3)
    studio.make(film.name)
    wait_for(lambda: film.num_done == 1)
    close_amid(studio, gate)
    again = Studio(tmp_path / "films", load_following)
    film = again.film(film.name)
    assert film.num_done == 1 and film.followed.num_clips == 3
    again.make(film.name)
    assert at_rest(again, film.name) == "done", again.error(film.name)
    assert film.path.read_bytes() == whole.path.read_bytes()
    again.close()


def test_a_clip_that_is_cut_out_while_the_last_one_is_made_is_not_made(tmp_path, image):
    """The pipeline, which knows how many clips there are to be, would let the last prompt hold."""
    gate = Gate(load_following)
    studio = Studio(tmp_path / "films", gate.load)
    settings = Settings.of("talk", **{**SMALL, "audio_guidance_scale": 1.0})
    film = studio.create(image, ["a cat sits"], settings, "", write(tmp_path / "a.wav", speech(3.125), 16000))
    gate.let(3)
    studio.make(film.name)
    wait_for(lambda: film.num_fixed == 2)
    film.remove(film.clips[-1].number)
    gate.let(float("inf"))
    assert at_rest(studio, film.name) == "done" and num_frames(film.path) == 17
    assert len(film.clips) == film.num_done == 2
    studio.close()


def test_a_film_follows_poses_and_is_counted_by_the_lora_that_makes_it(tmp_path, image):
    """17 poses are two clips of nine frames as published, and three that go on from five frames each."""
    save_video(tmp_path / "dance.mp4", 10 * counted(17), fps=8)
    studio = Studio(tmp_path / "films", load_following)
    film = studio.create(image, ["a cat sits"], Settings.of("dance", **SMALL), "", tmp_path / "dance.mp4")
    assert len(film.clips) == 2 and film.sound is None
    studio.make(film.name)
    assert at_rest(studio, film.name) == "done", studio.error(film.name)
    assert len(film.clips) == 3 and num_frames(film.path) == 17
    assert json.loads((film.folder / "film.json").read_text())["followed"] == {
        "file": "pose.mp4",
        "num_frames": 17,
        "num_clips": 3,
    }
    studio.close()
    told = (film.folder / "film.json").read_text()
    (film.folder / "film.json").write_text(told.replace('"dance"', '"shot"'))
    with pytest.raises(ValueError, match="a film of 'shot' follows nothing"):
        Project(film.folder)
    (film.folder / "film.json").write_text(told)
    (film.folder / "pose.mp4").unlink()
    with pytest.raises(ValueError, match=r"'pose\.mp4', which it follows, is not there"):
        Project(film.folder)


@pytest.mark.parametrize(
    ("preset", "file", "message"),
    [
        ("talk", None, "A film of 'talk' follows speech: choose that"),
        ("none", "speech.wav", "A film of 'none' follows nothing"),
        ("talk", "notes.txt", "The speech must be a file of one of these kinds: .wav, .mp3"),
        ("talk", "silent.mp4", "The speech cannot be followed: `audio`='silent.mp4' cannot be read as sound"),
        ("talk", "click.wav", "The speech cannot be followed: `audio`='click.wav' is shorter than a frame"),
        ("dance", "speech.wav", "The poses must be a file of one of these kinds: .mp4"),
        ("dance", "damaged.mp4", "The poses cannot be followed: "),
        ("talk", "speech.wav", "The story has 3 clips, but what the film follows is over after 2"),
    ],
)
def test_what_cannot_be_followed_is_told_in_plain_words(studio, tmp_path, image, preset, file, message):
    write(tmp_path / "speech.wav", speech(2.0), 16000)
    write(tmp_path / "click.wav", speech(0.03), 16000)
    save_video(tmp_path / "silent.mp4", counted(9), fps=8)
    (tmp_path / "damaged.mp4").write_bytes((tmp_path / "silent.mp4").read_bytes()[:300])
    (tmp_path / "notes.txt").write_text("a cat")
    followed = None if file is None else tmp_path / file
    with pytest.raises(ValueError, match=message):
        studio.create(image, ["a cat"] * 3, Settings.of(preset, **SMALL), "", followed)
    with pytest.raises(ValueError, match="it cannot go on until you stop it"):
        endless = Settings.of("talk", **SMALL, endless=True)
        studio.create(image, ["a cat"], endless, "", tmp_path / "speech.wav")
    assert studio.films == [] and [path.name for path in studio.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "movie"}, "`preset` must be one of"),
        ({"height": 40}, "`height` must be a multiple of 16, got 40"),
        ({"width": 4096}, "`width` must be a whole number of 16 to 2048"),
        ({"num_frames": 12}, r"`num_frames` must be 1 \+ 4n"),
        ({"num_frames": 4001}, "`num_frames` must be a whole number of 5 to 1001"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a whole number of 1 to 200"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ({"audio_guidance_scale": float("inf")}, "`audio_guidance_scale` must be a finite number"),
        ({"fps": 0}, "`fps` must be above 0"),
        ({"fps": 1000}, "`fps` must be 120 at most"),
        ({"seed": -1}, "`seed` must be a whole number"),
        ({"color_match": "bright"}, "`color_match` must be one of"),
        ({"guidance_scale_2": float("inf")}, "`guidance_scale_2` must be a finite number"),
        ({"resize_mode": "warp"}, "`resize_mode` must be one of"),
        ({"negative_prompt": "x" * 5000}, "`negative_prompt` must be a text"),
        ({"max_sequence_length": 1000}, "`max_sequence_length` must be a whole number of 1 to 512"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.of(**{"preset": "none", **SMALL, **given})


def test_a_film_needs_a_prompt(studio, image):
    for story in ([], ["", "a cat sits"]):
        with pytest.raises(ValueError, match="needs a prompt for its first clip"):
            studio.create(image, story, SETTINGS)
    with pytest.raises(ValueError, match="may have 4000 characters"):
        studio.create(image, ["a" * 4001], SETTINGS)
    assert studio.films == [] and [path.name for path in studio.folder.iterdir()] == [".lock"]
    film = studio.create(image, ["a cat sits"], SETTINGS)
    with pytest.raises(ValueError, match="the only clip"):
        film.remove(film.clips[0].number)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"GIF89a" + b"0" * 100, "no PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG, JPEG or WebP"),
        (b"", "no PNG, JPEG or WebP"),
        (START.read_bytes()[:600], "damaged"),
        (b"0" * 20_000_001, "larger than 20 MB"),
        (PIL.Image.new("RGB", (64, 8)), "too small or too narrow"),
        (PIL.Image.new("1", (8000, 6000)), "8000 x 6000 pixels. Make it smaller: 40 million at most"),
        (PIL.Image.new("RGBA", (64, 64)), "transparent parts"),
    ],
)
def test_bad_uploads_are_refused_in_plain_words(tmp_path, picture, message):
    path = tmp_path / "upload"
    if isinstance(picture, bytes):
        path.write_bytes(picture)
    else:
        picture.save(path, format="PNG")
    with pytest.raises(ValueError, match=message):
        read_upload(path)


def test_good_uploads_are_taken(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP"):
        PIL.Image.new("RGB", (64, 48), "red").save(tmp_path / "upload", format=kind)
        picture = read_upload(tmp_path / "upload")
        assert picture.mode == "RGB" and picture.size == (64, 48)
        assert np.abs(np.asarray(picture)[0, 0].astype(int) - (255, 0, 0)).max() <= 3


# From here on with a real server, and where there is Chromium with a real browser.
TINY = ROOT / "examples" / "svi_tiny"
STORY = [
    f"a large red circle moves {way} over a green meadow" for way in ("left", "up", "right", "down", "left", "up")
]


def put_published(folder: Path) -> None:
    """What the Hub has, under its names, but tiny: svi-tiny as the model, and modules for speech that are random."""
    wan = folder / "Wan-AI" / "Wan2.1-I2V-14B-480P-Diffusers"
    shot = folder / "vita-video-gen" / "svi-model" / "version-1.0" / "svi-shot.safetensors"
    for path, target in ((wan, TINY / "model"), (shot, TINY / "loras" / "shot.safetensors")):
        path.parent.mkdir(parents=True)
        path.symlink_to(target)
    modules = {name: value / 8 for name, value in make_multitalk(dim=256, num_blocks=6).items()}
    save_file({**load_file(shot), **modules}, shot.with_name("svi-talk.safetensors"))
    make_encoder().save_pretrained(folder / "TencentGameMate" / "chinese-wav2vec2-base")


class Server:
    """`diffusers-svi app` with all presets, in a process of its own, and where the published names mean svi-tiny."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0
        put_published(folder.parent)
        self.film = next((path.name for path in sorted(folder.glob("2*"))), "")  # one that is there before
        self.start()

    def start(self) -> None:
        options = {
            **{"folder": self.folder, "port": self.port, "preset": "shot", "height": 64, "width": 64, "fps": 8},
            **{"num_frames": 17, "num_inference_steps": 8, "guidance_scale": 1, "max_sequence_length": 64},
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "diffusers_svi", "app", *(f"--{name}={value}" for name, value in options.items())],
            cwd=self.folder.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            text=True,
        )
        told = self.process.stdout.readline()
        self.url = re.search(r"http://127.0.0.1:(\d+)/", told).group()
        self.port = int(self.url.split(":")[-1].rstrip("/"))

    def stop(self, how: int = signal.SIGKILL) -> int:
        self.process.send_signal(how)
        return self.process.wait(LIMIT)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=LIMIT) as answer:
            return answer.read()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "films"
    studio = Studio(folder, load)
    film = studio.create(PIL.Image.open(START), ["a cat sits", "it jumps"], SETTINGS, "Of yesterday")
    studio.make(film.name)
    assert at_rest(studio, film.name) == "done"
    studio.close()
    server = Server(folder)
    yield server
    # As by Ctrl-C.
    assert server.stop(signal.SIGINT) == 130


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_tab(browser: Browser, **options: Any) -> Page:
    tab = browser.new_page(**options)
    tab.set_default_timeout(LIMIT * 1000)
    return tab


@pytest.fixture
def page(browser, server):
    """A tab of its own, which asks nobody but the server for anything, and has no error of its own to tell."""
    tab = new_tab(browser, viewport={"width": 1280, "height": 900})
    asked, errors = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab
    assert [url for url in asked if not url.startswith((server.url, "blob:", "data:"))] == []
    assert errors == []
    tab.close()


def state_of(page: Page) -> Locator:
    return page.locator(".svi-state")


def begin(page: Page, server: Server, story: list[str], title: str = "") -> str:
    """Make a film as people do; its name."""
    page.goto(server.url)
    page.locator("input[type=file]").first.set_input_files(START)
    page.get_by_label("Story").fill("\n".join(story))
    page.get_by_label("Title").fill(title)
    page.get_by_label("Remove Image").wait_for()  # the upload has arrived
    page.get_by_role("button", name="Make the film").click()
    page.wait_for_url("**/?film=*")
    return page.url.partition("?film=")[2]


@contextmanager
def unanswered(page: Page) -> Iterator[None]:
    """What the page asks outside the server's queue waits for its answer until the end."""
    page.wait_for_function("performance.getEntriesByType('resource').some((e) => e.name.endsWith('/run/predict'))")
    held: list[Route] = []
    page.route("**/run/predict", lambda route: held.append(route))
    yield
    page.unroute("**/run/predict")
    for route in held:
        route.continue_()


def begin_talk(page: Page, server: Server, folder: Path) -> None:
    """A film of 49 frames that follow speech, by people who first send what is none."""
    write(folder / "speech.wav", speech(49 / 16), 16000)
    (folder / "notes.wav").write_text("a cat")
    page.goto(server.url)
    page.locator("input[type=file]").first.set_input_files(START)
    page.get_by_label("Preset").click()
    page.get_by_role("option", name="talk", exact=True).click()
    page.get_by_text("Speech: what the film follows, and its sound").wait_for()
    page.get_by_role("button", name="Advanced settings").click()
    numbers = {"Frames a clip": (81, 17), "Steps a clip": (50, 2), "Guidance": (2, 1), "Frames a second": (25, 16)}
    for name, (published, _) in numbers.items():
        # What is filled in before would be written over.
        expect(page.get_by_label(name)).to_have_value(str(published))
    for name, (_, value) in numbers.items():
        page.get_by_label(name).fill(str(value))
    page.wait_for_function(f"({NAMELESS})().length === 0")
    sound = page.locator("input[type=file]").nth(1)
    with unanswered(page):
        sound.set_input_files(folder / "notes.wav")
        page.get_by_text("The speech cannot be followed: `audio`='notes.wav' cannot be read as sound").wait_for()
        sound.set_input_files(folder / "speech.wav")
        page.get_by_label("speech.wav").wait_for()
    page.get_by_label("Story").fill("a large red circle stays still")
    page.get_by_label("Remove Image").wait_for()
    page.get_by_role("button", name="Make the film").click()
    page.wait_for_url("**/?film=*")


def download(page: Page, path: Path) -> str:
    """The film that is shown, to `path`; the name that the page gives it."""
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the film").click()
    shutil.copy(download.value.path(), path)
    return download.value.suggested_filename


def test_films_are_made_changed_stopped_killed_continued_and_downloaded(page, browser, server, tmp_path):
    """One is stopped by hand, and one that follows speech by the end of the server, which was killed."""
    name = begin(page, server, STORY, "My <b>film</b>")
    page.get_by_role("heading", name="My <b>film</b>").wait_for()
    page.get_by_label("Clip 5", exact=True).fill("a large red circle stays still, it turns blue")
    page.get_by_label("Clip 1 · done").wait_for()
    assert page.get_by_label("Clip 1 · done").is_disabled()
    page.get_by_role("button", name="Stop").click()
    go_on = page.get_by_role("button", name="Continue")
    go_on.wait_for()
    page.reload()
    expect(page.get_by_label("Clip 5", exact=True)).to_have_value("a large red circle stays still, it turns blue")
    assert re.search(r"Stopped after clip \d of 6", state_of(page).inner_text())

    talk = new_tab(browser)
    begin_talk(talk, server, tmp_path)
    talk.get_by_label("Clip 1 · done").wait_for()
    go_on.click()
    page.get_by_role("button", name="Stop").wait_for()
    server.stop()
    server.start()

    page.goto(f"{server.url}?film={name}")
    assert "The server was stopped after clip" in state_of(page).inner_text()
    go_on.click()
    expect(state_of(page)).to_have_text("Done: 6 clips, 12.1 seconds.")
    file = server.folder.parent / "downloaded.mp4"
    assert download(page, file) == f"{name}.mp4"
    assert num_frames(file) == 6 * 16 + 1
    assert [clip["prompt"] for clip in read_recipe(file).clips][4] == "a large red circle stays still, it turns blue"
    told = [clip["prompt"] for clip in read_clips(server.folder / name / "film.mp4")]
    assert told == [*STORY[:4], "a large red circle stays still, it turns blue", STORY[5]]
    # The browser can play it.
    page.wait_for_function("document.querySelector('video').readyState >= 2")
    assert page.evaluate("document.querySelector('video').duration") == pytest.approx(97 / 8, abs=0.05)

    talk.reload()
    if "Done" not in state_of(talk).inner_text():
        talk.get_by_role("button", name="Continue").click()
    expect(state_of(talk)).to_have_text("Done: 3 clips, 3.1 seconds.")
    download(talk, file)
    assert num_frames(file) == 49 and read_recipe(file).film["settings"]["audio"].startswith("49 frames ")
    with av.open(str(file)) as film:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in film.decode(audio=0)])
    # How loud it is in every frame.
    loudness = [samples[:48000].reshape(48, 1000).std(1) for samples in (heard, speech(3.0))]
    assert len(heard) >= 49 * 1000 and np.corrcoef(loudness)[0, 1] > 0.9
    talk.close()


def test_two_tabs_have_a_film_each(page, browser, server):
    one = begin(page, server, STORY[:2])
    other = new_tab(browser)
    two = begin(other, server, STORY[2:3], "The other")
    assert one != two
    told = state_of(other)
    expect(told).to_have_text(re.compile("Waiting: 1 other film|Getting the model|Making clip 1 of 1|Done"))
    expect(told).to_have_text("Done: 1 clip, 2.1 seconds.")
    expect(state_of(page)).to_have_text("Done: 2 clips, 4.1 seconds.")
    # Each sees the films of both, and opens one by a link.
    page.get_by_role("link", name="The other").click()
    page.get_by_role("heading", name="The other").wait_for()
    expect(page.get_by_label("Clip 1 · done")).to_have_value(STORY[2])
    # A finished film is made longer.
    other.get_by_label("More clips").fill(STORY[3])
    other.get_by_role("button", name="Extend the film").click()
    expect(told).to_have_text("Done: 2 clips, 4.1 seconds.")
    other.close()


def test_clips_are_moved_and_cut_on_a_timeline_that_is_turned_over(page, server):
    story = [f"a large red circle moves left {n}" for n in range(26)]
    name = begin(page, server, story)
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Continue").wait_for()
    page.get_by_role("button", name="Move 24 up").click()
    expect(page.get_by_label("Clip 23", exact=True)).to_have_value(story[23])
    page.get_by_role("button", name="Clips after").click()
    expect(page.get_by_label("Clip 25", exact=True)).to_have_value(story[24])
    expect(page.get_by_role("button", name="Clips after")).to_be_hidden()
    page.get_by_role("button", name="Cut 25").click()
    expect(page.get_by_label("Clip 25", exact=True)).to_have_value(story[25])
    expect(page.get_by_label("Clip 26", exact=True)).to_be_hidden()
    page.get_by_role("button", name="Clips before").click()
    expect(page.get_by_label("Clip 24", exact=True)).to_have_value(story[22])
    clips = json.loads((server.folder / name / "film.json").read_text())["clips"]
    assert [clip["prompt"] for clip in clips] == [*story[:22], story[23], story[22], story[25]]


def test_a_bad_upload_is_told(page, server, tmp_path):
    (tmp_path / "evil.png").write_bytes(b"<script>alert(1)</script>")
    page.goto(server.url)
    page.get_by_role("button", name="Make the film").wait_for()
    with unanswered(page):
        page.locator("input[type=file]").first.set_input_files(tmp_path / "evil.png")
        page.get_by_text("This is no PNG, JPEG or WebP picture.").wait_for()
        page.get_by_label("Story").fill(STORY[0])
        page.get_by_role("button", name="Make the film").click()
        page.get_by_text("Choose the picture that the film begins with.").wait_for()


# The name that a screen reader tells, near enough: of its label, or what it is called by.
NAMELESS = """() => {
  const name = (e) => (e.getAttribute('aria-label') || [...(e.labels || [])].map((l) => l.innerText).join(' ')
    || (e.getAttribute('aria-labelledby') || '').split(' ').map((i) => document.getElementById(i)?.innerText).join('')
    || e.innerText || e.title || '').trim();
  const controls = document.querySelectorAll('button, a[href], input, textarea, select, summary, video, progress');
  return [...controls].filter((e) => e.checkVisibility() && e.type !== 'file' && !name(e)).map((e) => e.outerHTML);
}"""


def test_the_page_fits_and_everything_on_it_has_a_name(page, server):
    """Wide and narrow, light and dark."""
    for address in ("", f"?film={server.film}"):
        page.goto(server.url + address)
        page.get_by_role("button", name="Extend the film" if address else "Make the film").wait_for()
        if not address:
            page.get_by_role("button", name="Advanced settings").click()
            page.get_by_label("Not to be seen").wait_for()
        assert page.evaluate(NAMELESS) == []
        for width, scheme in ((1280, "light"), (390, "dark"), (390, "light"), (1280, "dark")):
            page.set_viewport_size({"width": width, "height": 844})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.wait_for_function(f"document.body.classList.contains('dark') == {str(scheme == 'dark').lower()}")


def test_a_film_is_made_with_the_keyboard(page, server):
    page.goto(server.url)
    page.locator("input[type=file]").first.set_input_files(START)
    page.get_by_label("Remove Image").wait_for()
    reached = []

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate(
                    "((e) => e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText)"
                    "(document.activeElement)"
                ).strip()
            )
            if reached[-1].startswith(name):
                return
        raise AssertionError(f"{name} is not reached: {reached}")

    tab_to("New film")
    tab_to("Title")
    page.keyboard.type("By keyboard")
    tab_to("Story")
    page.keyboard.type(STORY[0])
    tab_to("Advanced settings")
    tab_to("Make the film")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="By keyboard").wait_for()
    tab_to("Extend the film")


def test_only_films_are_served(server):
    assert server.get("").startswith(b"<!doctype html>")
    folder = server.folder / server.film
    assert server.get(f"films/{folder.name}/poster.jpg")[:3] == b"\xff\xd8\xff"
    assert server.get(f"films/{folder.name}/film.mp4") == (folder / "film.mp4").read_bytes()
    assert server.get(f"films/{folder.name}/download") == (folder / f"{folder.name}.mp4").read_bytes()
    for path in (
        f"films/{folder.name}/film.json",
        f"films/{folder.name}/start.png",
        f"films/{folder.name}/..%2F..%2F..%2Fetc%2Fpasswd",
        "films/..%2F..%2Fetc/passwd",
        "films/no-such-film/film.mp4",
        "films/no-such-film/download",
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={folder}/film.json",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.get(path)
        assert refused.value.code in (403, 404), path


def test_nothing_is_written_elsewhere(server):
    """All that uploads and films leave behind lies in the folder."""
    names = {path.name for path in server.folder.iterdir()}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d-\d{3}", name) for name in names - {".lock", ".uploads"})
    assert list((ROOT / "src").rglob("*.pyi")) == []


def test_the_space_starts(tmp_path):
    """As the Hub runs it, with nothing but its variables."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "space" / "app.py"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **{"SVI_FOLDER": str(tmp_path / "films"), "SVI_PRESET": "shot", "SVI_OPTIONS": "--fps 12 --height 480"},
            "GRADIO_SERVER_PORT": "0",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = re.search(r"http://localhost:\d+/", process.stdout.readline()).group()
        with urllib.request.urlopen(address, timeout=LIMIT) as answer:
            page = answer.read().decode()
        assert "Make the film" in page and '"film-transitions"' in page
        assert (tmp_path / "films" / ".lock").exists()
    finally:
        process.kill()
        process.wait()
    header = (ROOT / "examples" / "space" / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "sdk: gradio\n" in header and "app_file: app.py\n" in header
