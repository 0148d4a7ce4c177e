"""Films by their recipes: the same once more, longer, and gone on with from a video. On the embedded model."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils import load_image
from safetensors.torch import load_file, save_file

from diffusers_svi import FilmWriter, PixelMotion, SVIPipeline
from diffusers_svi.recipe import read_recipe
from test_cli import ROOT, SVI_TINY, generate, num_frames
from test_recipe import write_comment
from test_sound import make_sound


QUICK = {"num_frames": 9, "num_inference_steps": 2}


def make(film: Path, lora: object = SVI_TINY / "loras" / "shot.safetensors", **options: object) -> None:
    """A film of one clip, made in Python."""
    pipe = SVIPipeline.from_pretrained(SVI_TINY / "model")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora, conditioning=PixelMotion(1, "reference"))
    image = load_image(str(ROOT / "docs" / "images" / "start.png"))
    small = {"height": 64, "width": 64, "guidance_scale": 1, "max_sequence_length": 64, **QUICK}
    with FilmWriter(film, 8) as writer:
        for clip in pipe.stream(image=image, prompts="a large red circle moves left", num_clips=1, **small, **options):
            writer.append(clip)


def test_a_film_is_made_longer_by_what_its_file_tells(run_command, tmp_path):
    """The bytes are those of a film that was asked for at once."""
    story = ["a large red circle moves left", "it turns blue"]
    (tmp_path / "two.txt").write_text("\n".join(story))
    (tmp_path / "five.txt").write_text("\n".join([*story, "it turns red", "it turns red", "it stays still"]))
    asked = {**QUICK, "prompt": None, "crf": 20}
    assert run_command(*generate(**asked, out="whole.mp4", prompts="five.txt", num_clips=5))[0] == 0
    assert run_command(*generate(**asked, prompts="two.txt", num_clips=2))[0] == 0

    status, told, errors = run_command("extend", "film.mp4", "--prompt", "it turns red")
    assert status == 0 and "film.mp4: clips 3 to 3" in told, errors
    status, _, errors = run_command("extend", "film.mp4", "--num_clips", 1)  # with the last prompt
    assert status == 0, errors
    (tmp_path / "more.txt").write_text("it stays still\n")
    status, _, errors = run_command("extend", "film.mp4", "--prompts", "more.txt")
    assert status == 0, errors
    assert (tmp_path / "film.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_film_is_made_again_by_its_recipe_to_the_byte(run_command, tmp_path):
    (tmp_path / "story.json").write_text(
        '[{"prompt": "a large red circle moves left", "seed": 7, "lora_weights": {"default_0": 0.5}}, "it turns blue"]'
    )
    asked = {**QUICK, "prompt": None, "prompts": "story.json", "num_clips": 3, "resize_mode": "crop", "crf": 25}
    status, _, errors = run_command(*generate(**asked))
    assert status == 0, errors
    (tmp_path / "film.mp4.state").unlink()
    status, told, errors = run_command("generate", "--recipe", "film.mp4", "--out", "again.mp4")
    assert status == 0 and "again.mp4: clips 1 to 3" in told, errors
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "film.mp4").read_bytes()

    status, _, errors = run_command("generate", "--recipe", "film.mp4", "--out", "x.mp4", "--num_inference_steps", 3)
    assert status == 1 and "`--num_inference_steps` cannot be given with `--recipe`, which tells it." in errors
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"latents": torch.zeros(1, 48, 3, 8, 8)}, "its noise did not come from seeds, but from 'latents'"),
        ({"generator": torch.Generator()}, "its noise did not come from seeds, but from 'generator'"),
    ],
)
def test_noise_that_no_recipe_tells_is_refused(run_command, tmp_path, noise, message):
    make(tmp_path / "film.mp4", **noise)
    status, _, errors = run_command("generate", "--recipe", "film.mp4", "--out", "x.mp4")
    assert status == 1 and message in errors and not (tmp_path / "x.mp4").exists()


def test_a_lora_of_no_file_is_refused(run_command, tmp_path):
    make(tmp_path / "film.mp4", lora=load_file(SVI_TINY / "loras" / "shot.safetensors"), seeds=[0])
    for command in (("generate", "--out", "x.mp4", "--recipe"), ("extend", "--num_clips", 1)):
        status, _, errors = run_command(*command, "film.mp4")
        assert status == 1 and "a LoRA of which no file is known (a state dict)" in errors


def test_a_lora_that_was_changed_since_is_refused(run_command, tmp_path):
    weights, lora = load_file(SVI_TINY / "loras" / "shot.safetensors"), tmp_path / "lora.safetensors"
    save_file(weights, lora)
    make(tmp_path / "film.mp4", lora=lora, seeds=[0])
    save_file({name: value * 2 for name, value in weights.items()}, lora)
    status, _, errors = run_command("extend", "film.mp4", "--num_clips", 1)
    assert status == 1 and "is not the one that the film was made with" in errors
    assert len(read_recipe(tmp_path / "film.mp4").clips) == 1


def test_a_film_goes_on_with_other_settings_where_they_are_asked_for(run_command, tmp_path):
    make(tmp_path / "film.mp4", seeds=[0])
    status, _, errors = run_command("extend", "film.mp4", "--num_clips", 1, "--num_inference_steps", 3)
    assert status == 0, errors
    recipe = read_recipe(tmp_path / "film.mp4")
    steps = [film["settings"]["num_inference_steps"] for film in (recipe.film, recipe.changes[1])]
    assert steps == [2, 3]
    status, _, errors = run_command("generate", "--recipe", "film.mp4", "--out", "x.mp4")
    assert status == 1 and "from clip 1 on it was made with something else (settings)" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Say what is new"),
        (("--prompt", "a", "--prompts", "b.txt"), "Give either `--prompt` or `--prompts`"),
        (("--prompt", "a", "--prompt", "b", "--num_clips", 1), "is fewer than the 2 clips that are to be made"),
        (("--num_clips", 0), "is fewer than the 1 clips"),
    ],
)
def test_what_is_to_be_new_must_be_told(run_command, tmp_path, arguments, message):
    make(tmp_path / "film.mp4", seeds=[0])
    before = (tmp_path / "film.mp4").read_bytes()
    status, _, errors = run_command("extend", "film.mp4", *arguments)
    assert status == 1 and message in errors
    assert (tmp_path / "film.mp4").read_bytes() == before


def test_prompts_and_seed_of_another_program_are_taken_over(run_command, tmp_path):
    write_comment(tmp_path / "wan.mp4", json.dumps({"prompt": "a cat wakes\nit jumps", "seed": 7}))
    asked = {**QUICK, "prompt": None, "num_clips": None, "recipe": "wan.mp4"}
    status, _, errors = run_command(*generate(**asked))
    assert status == 0, errors
    clips = read_recipe(tmp_path / "film.mp4").clips
    assert clips == [{"prompt": "a cat wakes", "seed": 7}, {"prompt": "it jumps", "seed": 42}]
    status, _, errors = run_command(*generate(**asked | {"prompt": "it sleeps", "out": "x.mp4"}))
    assert status == 1 and "leave out `--prompt` and `--prompts`" in errors


def test_a_clip_that_was_begun_by_a_typed_prompt_comes_before_new_ones(run_command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat wakes\n"))
    status, _, errors = run_command(*generate(**QUICK, prompt=None, prompts="-", num_clips=1))
    assert status == 0, errors
    with open(tmp_path / "film.mp4.journal", "a") as journal:
        journal.write('{"prompt": "it jumps"}\n')
    status, told, errors = run_command("extend", "film.mp4", "--prompt", "it sleeps")
    assert status == 0 and "clips 2 to 3" in told, errors
    clips = read_recipe(tmp_path / "film.mp4").clips
    assert [clip["prompt"] for clip in clips] == ["a cat wakes", "it jumps", "it sleeps"]
    assert [clip["seed"] for clip in clips] == [0, 42, 84]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert run_command("extend", "film.mp4", "--prompts", "-")[0] == 0
    assert read_recipe(tmp_path / "film.mp4").clips[3] == {"prompt": "it sleeps", "seed": 126}


def test_sound_is_given_again(run_command, tmp_path):
    make_sound(tmp_path / "a.wav", 3)
    again = ("generate", "--recipe", "film.mp4", "--out", "again.mp4")
    assert run_command(*generate(**QUICK, num_clips=1, audio="a.wav"))[0] == 0
    status, _, errors = run_command(*again)
    assert status == 1 and "has sound, which is not in its recipe: give its file by `--audio`" in errors
    assert run_command(*again, "--audio", "a.wav")[0] == 0
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "film.mp4").read_bytes()
    assert run_command("extend", "film.mp4", "--num_clips", 1, "--audio", "a.wav")[0] == 0


def test_a_film_begins_with_a_video_and_goes_on_from_its_end(run_command, tmp_path):
    make(tmp_path / "clip.mp4", seeds=[0])
    started = generate(**QUICK, image=None, continue_from="clip.mp4", num_clips=1)
    status, _, errors = run_command(*started)
    assert status == 0, errors
    status, told, _ = run_command(*started)
    assert status == 0 and "film.mp4 has 1 clips already" in told
    # Both tell the one frame that the clip goes on from.
    assert num_frames(tmp_path / "film.mp4") == 9 + 9 - 1
    assert run_command("extend", "film.mp4", "--num_clips", 1)[0] == 0
    assert num_frames(tmp_path / "film.mp4") == 9 + 2 * 9 - 2
    assert run_command("inspect", "film.mp4")[1].startswith("a video that the film begins with\nclip 1: ")
    status, _, errors = run_command("generate", "--recipe", "film.mp4", "--out", "x.mp4")
    assert status == 1 and "it begins with a video" in errors
    status, _, errors = run_command(*generate(**QUICK, out="y.mp4", image=None, continue_from="gone.mp4"))
    assert status == 1 and "`--continue_from` 'gone.mp4' cannot be gone on from" in errors
