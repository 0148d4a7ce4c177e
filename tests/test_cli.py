"""The command, run as users run it, on the embedded model."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import av
import PIL.Image
import pytest

from diffusers_svi import PixelMotion
from diffusers_svi.cli import main
from diffusers_svi.film import read_clips
from diffusers_svi.lora_file import _published, read_lora
from diffusers_svi.presets import PRESETS


ROOT = Path(__file__).parents[1]
SVI_TINY = ROOT / "examples" / "svi_tiny"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """The command in this process, which need not import everything once more: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffusers-svi", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return run


def generate(**options: object) -> list[object]:
    values = {
        "out": "film.mp4",
        "image": ROOT / "docs" / "images" / "start.png",
        "prompt": "a large red circle moves left over a green meadow",
        "model": SVI_TINY / "model",
        "lora": SVI_TINY / "loras" / "shot.safetensors",
        "height": 64,
        "width": 64,
        "num_frames": 17,
        "num_inference_steps": 8,
        "guidance_scale": 1,
        "max_sequence_length": 64,
        "fps": 8,
        "num_clips": 3,
        **options,
    }
    arguments = []
    for name, value in values.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None:
            arguments += [f"--{name}", value]
    return ["generate", *arguments]


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_film_is_made_stopped_gone_on_with_and_made_longer(run, tmp_path):
    """The bytes are those of a film that was made at once."""
    status, told, errors = run(*generate(out="whole.mp4", num_clips=4))
    assert status == 0, errors
    assert "whole.mp4: clips 1 to 4, about 8 seconds at 8 fps." in told
    assert re.search(r"Clip 4 of 4: .* s a clip, 0.0 minutes left.", told)
    assert told.splitlines()[-1] == "whole.mp4: 65 frames, 8.1 seconds."

    # As by Ctrl-C, while the second clip is made.
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_svi", *map(str, generate())],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "Clip 1 of 3" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130, told
    assert "Traceback" not in told and "The same command goes on with it." in told

    status, told, errors = run(*generate())
    assert status == 0 and "film.mp4: 49 frames" in told, errors
    status, told, _ = run(*generate())
    assert status == 0 and "film.mp4 has 3 clips already" in told
    # Without the image, which the film has.
    status, _, errors = run(*generate(image=None, num_clips=4))
    assert status == 0, errors
    assert (tmp_path / "film.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert num_frames(tmp_path / "film.mp4") == 65
    assert [clip["made_with"]["seed"] for clip in read_clips(tmp_path / "film.mp4")] == ["0", "42", "84", "126"]

    status, told, _ = run("inspect", "film.mp4")
    assert status == 0 and "clip 2, from frame 16: a large red circle moves left" in told
    assert re.search(r"num_inference_steps +8\n", told)
    status, told, _ = run("inspect", "film.mp4.state")
    assert status == 0 and re.search(r"next clip from frame +64\n", told)


def test_a_lora_is_inspected(run):
    status, told, errors = run("inspect", SVI_TINY / "loras" / "shot.safetensors")
    assert status == 0, errors
    scheme = read_lora(SVI_TINY / "loras" / "shot.safetensors").conditioning
    assert scheme == PixelMotion(1, "reference") and re.search(rf"scheme +{re.escape(str(scheme))}\n", told)


def test_nothing_is_made_on_trial(run, tmp_path):
    (tmp_path / "story.txt").write_text("a cat wakes\nit jumps\n")
    status, told, errors = run(
        *generate(prompt=None, prompts="story.txt", num_clips=None, model="no/model", dry_run=True)
    )
    assert status == 0 and "clips 1 to 2, about 4 seconds at 8 fps" in told, errors
    assert not (tmp_path / "film.mp4").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "Give either `--prompt` or `--prompts`."),
        ({"image": None}, "film.mp4 is not begun: give `--image`"),
        ({"image": "gone.png"}, "`--image`='gone.png' cannot be read"),
        ({"image": "thin.png"}, "`image` is 1 x 64 pixels"),
        ({"prompt": None, "prompts": "gone.txt"}, "`path`='gone.txt' cannot be read"),
        ({"out": "film.avi"}, "`suffix of `path`` must be one of"),
        ({"preset": "movie"}, "'movie' is not one of 'film'"),
        ({"num_clips": "many"}, "'many' is not a valid integer"),
        ({"model": "missing", "offload": "none"}, "missing"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(run, tmp_path, options, message):
    PIL.Image.new("RGB", (64, 1)).save(tmp_path / "thin.png")
    status, _, errors = run(*generate(**options))
    assert status == 1 and message in errors and "Traceback" not in errors
    assert not (tmp_path / "film.mp4").exists()


def test_the_presets_are_published_files():
    """Of every one the scheme is known by its name, without the file."""
    known = {name: _published(f"{preset.lora}/{preset.weight_name or ''}") for name, preset in PRESETS.items()}
    assert all((scheme is None) == (name == "none") for name, (scheme, _) in known.items())
    assert known["pro"][1] == known["shot-2.0"][1] == "high"
    assert all(_published(PRESETS[name].weight_name_2)[1] == "low" for name in ("pro", "shot-2.0"))
