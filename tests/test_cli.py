"""The command, run as users run it, on the embedded model."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import av
import PIL.Image
import pytest
from huggingface_hub import constants

from diffusers_svi import PixelMotion
from diffusers_svi.film import read_clips
from diffusers_svi.lora_file import _published, read_lora
from diffusers_svi.presets import PRESETS


ROOT = Path(__file__).parents[1]
SVI_TINY = ROOT / "examples" / "svi_tiny"


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


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_film_is_made_stopped_gone_on_with_and_made_longer(run_command, tmp_path):
    """The bytes are those of a film that was made at once."""
    status, told, errors = run_command(*generate(out="whole.mp4", num_clips=4))
    assert status == 0, errors
    assert "whole.mp4: clips 1 to 4, about 8 seconds at 8 fps." in told
    assert re.search(r"Clip 4 of 4: .* s a clip, 00:00 left.", errors)
    assert told.splitlines()[-1] == "whole.mp4: 65 frames, 8.1 seconds."

    # As by Ctrl-C, while the second clip is made.
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_svi", *map(str, generate())],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "Clip 1 of 3" not in (line := process.stderr.readline()):
        assert line, process.stdout.read()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130, told
    assert "Traceback" not in told and "The same command goes on with it." in told

    status, told, errors = run_command(*generate())
    assert status == 0 and "film.mp4: 49 frames" in told, errors
    status, told, _ = run_command(*generate())
    assert status == 0 and "film.mp4 has 3 clips already" in told
    # Without the image, which the film has.
    status, _, errors = run_command(*generate(image=None, num_clips=4))
    assert status == 0, errors
    assert (tmp_path / "film.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert num_frames(tmp_path / "film.mp4") == 65
    assert [clip["made_with"]["seed"] for clip in read_clips(tmp_path / "film.mp4")] == ["0", "42", "84", "126"]

    status, told, _ = run_command("inspect", "film.mp4")
    assert status == 0 and "clip 2: a large red circle moves left over a green meadow (seed 42)" in told
    assert re.search(r"num_inference_steps +8\n", told) and re.search(r"image +PNG, \d+ kB\n", told)
    assert "base64" not in told and re.search(r"LoRA default_0 +.*sha256 transformer [0-9a-f]{64}", told)
    status, told, _ = run_command("inspect", "film.mp4", "--json")
    assert status == 0 and [clip["seed"] for clip in json.loads(told)["clips"]] == [0, 42, 84, 126]
    status, told, _ = run_command("inspect", "film.mp4.state")
    assert status == 0 and re.search(r"next clip from frame +64\n", told)


def test_a_lora_is_inspected(run_command):
    status, told, errors = run_command("inspect", SVI_TINY / "loras" / "shot.safetensors")
    assert status == 0, errors
    scheme = read_lora(SVI_TINY / "loras" / "shot.safetensors").conditioning
    assert scheme == PixelMotion(1, "reference") and re.search(rf"scheme +{re.escape(str(scheme))}\n", told)


def test_a_film_of_other_settings_is_not_gone_on_with(run_command, tmp_path):
    quick = {"num_frames": 9, "num_inference_steps": 1, "num_clips": 1}
    assert run_command(*generate(**quick))[0] == 0
    before = (tmp_path / "film.mp4").read_bytes()
    for changed, message in [
        ({"num_inference_steps": 2}, "was made with `num_inference_steps` '1', and '2' is asked for"),
        ({"guidance_scale": 3}, "was made with `guidance_scale` '1.0', and '3.0' is asked for"),
        ({"negative_prompt": "blurry"}, "and 'blurry' is asked for"),
        ({"crf": 30}, "'crf': 18"),
        ({"dtype": "bfloat16"}, "was made with dtype float32, and now it is bfloat16"),
        ({"lora": "none"}, "was made with LoRAs"),
    ]:
        status, _, errors = run_command(*generate(**{**quick, "num_clips": 2, **changed}))
        assert status == 1 and message in errors, errors
    # What was typed while it was made, the list does not know.
    (tmp_path / "film.mp4.journal").touch()
    status, _, errors = run_command(*generate(**{**quick, "num_clips": 2}))
    assert status == 1 and "Go on with `--prompts -`" in errors
    assert (tmp_path / "film.mp4").read_bytes() == before


def test_a_film_is_written_as_an_ordinary_file_when_it_is_done(run_command, tmp_path):
    quick = {"num_frames": 9, "num_inference_steps": 1, "num_clips": 1}
    status, told, errors = run_command(*generate(**quick, finalize="done.mp4"))
    assert status == 0 and "done.mp4: the same as an ordinary file." in told, errors
    assert num_frames(tmp_path / "done.mp4") == num_frames(tmp_path / "film.mp4") == 9


def test_help_is_quick_and_shows_options_in_groups(run_command):
    script = "import sys; from diffusers_svi.cli import main; sys.argv[1:] = ['generate', '--help']\n"
    script += "try: main()\nfinally: print(sorted({'torch', 'diffusers', 'av', 'numpy', 'PIL'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert told.returncode == 0 and told.stdout.splitlines()[-1] == "[]", told.stderr
    headings = re.findall(r"^(\w[\w ]+):$", told.stdout, re.MULTILINE)
    assert headings == ["What is made", "Model", "Settings", "File", "Machine", "Other", "Examples"]
    names = re.findall(r"^  (--\w+)[ \n]", told.stdout, re.MULTILINE)
    assert {"--out", "--prompts", "--quantize", "--dry_run"} <= set(names)


def test_nothing_is_made_on_trial(run_command, tmp_path):
    (tmp_path / "story.txt").write_text("a cat wakes\nit jumps\n")
    status, told, errors = run_command(
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
        ({"out": "film.avi"}, "`path.suffix` must be one of"),
        ({"preset": "movie"}, "'movie' is not one of 'film'"),
        ({"num_clips": "many"}, "'many' is not a valid integer"),
        ({"num_clips": 0}, "`--num_clips` must be a whole number of at least 1"),
        ({"num_frames": 16}, "`--num_frames` must be 1 + 4n"),
        ({"height": 100}, "`--height` must be a multiple of 16"),
        ({"seed": -1}, "`--seed` must be a whole number"),
        ({"attention_backend": "quick"}, "`attention_backend` must be one of"),
        ({"color_match": "paint"}, "`color_match` must be one of"),
        ({"finalize": "film.mp4"}, "is the film itself"),
        ({"finalize": "done.avi"}, "suffix of `--finalize`"),
        ({"finalize": "gone/done.mp4"}, "there is no folder 'gone'"),
        ({"lora": "none", "lora_weight_name": "x.safetensors"}, "name its repository or folder by `lora`"),
        ({"model": "missing", "offload": "none"}, "missing"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(run_command, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nothing is waited for
    PIL.Image.new("RGB", (64, 1)).save(tmp_path / "thin.png")
    status, _, errors = run_command(*generate(**options))
    assert status == 1 and message in errors and "Traceback" not in errors
    assert not (tmp_path / "film.mp4").exists()


def test_the_presets_are_published_files():
    """Of every one the scheme is known by its name, without the file."""
    known = {name: _published(f"{preset.lora}/{preset.weight_name or ''}") for name, preset in PRESETS.items()}
    assert all((scheme is None) == (name == "none") for name, (scheme, _) in known.items())
    assert known["pro"][1] == known["shot-2.0"][1] == "high"
    assert all(_published(PRESETS[name].weight_name_2)[1] == "low" for name in ("pro", "shot-2.0"))
