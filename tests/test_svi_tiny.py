"""The embedded model, and the scripts that make, measure and show it."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

from conftest import quiet, seeded
from diffusers_svi import PixelMotion, SVIPipeline
from svi_tiny import world
from svi_tiny.evaluate import measure_vae
from svi_tiny.tracker import displacement, track
from svi_tiny.train_vae import decode


EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "svi_tiny" / "model"
HELD_OUT_SEED = 1
SIZE = {"height": 64, "width": 64, "num_frames": 17}


@pytest.fixture(scope="module")
def svi_tiny() -> SVIPipeline:
    return quiet(SVIPipeline.from_pretrained(MODEL))


def run(*command) -> str:
    """What a program prints, with `examples` on its path."""
    path = os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": path}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_it_is_real_and_small(svi_tiny):
    assert isinstance(svi_tiny.vae, AutoencoderKLWan)
    assert isinstance(svi_tiny.transformer, WanTransformer3DModel)
    assert isinstance(svi_tiny.text_encoder, UMT5EncoderModel)
    z_dim = svi_tiny.vae.config.z_dim
    assert svi_tiny.transformer.config.in_channels == z_dim + 4 + z_dim
    assert {m.dtype for m in (svi_tiny.vae, svi_tiny.transformer, svi_tiny.text_encoder)} == {torch.float32}
    assert sum(file.stat().st_size for file in EXAMPLES.rglob("*.safetensors")) <= 32e6


def test_the_vae_keeps_the_world(svi_tiny):
    """The first 24 of the 64 films that are measured in `docs/results/svi_tiny`."""
    psnr = measure_vae(svi_tiny, argparse.Namespace(num_videos=24))["psnr_per_frame"]
    assert len(psnr) == 17 and min(psnr) >= 33


def test_a_first_clip_follows_its_prompt(svi_tiny):
    for motion, (dx, dy) in world.DIRECTIONS.items():
        state = world.State("green meadow", 5, world.Sprite("circle", "red", "large", 30, 36))
        prompt = world.caption(state, world.Action(motion))
        image = PIL.Image.fromarray(world.render(state))
        options = {"num_inference_steps": 8, "guidance_scale": 1.0, "generator": seeded(), **SIZE}
        seen = track(svi_tiny(image=image, prompts=prompt, **options).frames[0])
        assert all(observation.found for observation in seen)
        moved = np.array(displacement(seen[0], seen[-1]))
        np.testing.assert_allclose(moved, 24 * np.array([dx, dy]), atol=4)


def test_defaults_of_the_pipeline_work_with_it(svi_tiny):
    """Guidance of 5, a prompt padded to 512 tokens, two clips: nothing has to be set but the size."""
    state, (action,) = world.sample_story(HELD_OUT_SEED, 3)
    frames = svi_tiny(
        image=PIL.Image.fromarray(world.render(state)),
        prompts=world.caption(state, action),
        num_clips=2,
        num_inference_steps=4,
        generator=seeded(),
        **SIZE,
    ).frames[0]
    assert frames.shape == (33, 64, 64, 3) and np.isfinite(frames).all()


def test_demo(tmp_path):
    sizes = ("--num_clips", 3, "--num_inference_steps", 2, "--compare_clips", 2, "--talk_clips", 1)
    printed = run(EXAMPLES / "demo.py", "--output_dir", tmp_path, *sizes)
    film, sheet, comparison = re.findall(r"^(?:Film|Contact sheet|Comparison): +(.+)$", printed, re.MULTILINE)
    with av.open(film) as container:
        assert sum(1 for _ in container.decode(video=0)) == PixelMotion(1).film_length(3, 17)
    assert PIL.Image.open(sheet).size[0] > 500 and PIL.Image.open(comparison).size[0] > 200
    assert PIL.Image.open(tmp_path / "recycling.png").size[0] > 1200
    talk, picture, followed = re.search(
        r"^Voice: +(.+), (.+): .* correlated by (-?[\d.]+)$", printed, re.MULTILINE
    ).groups()
    with av.open(talk) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17
    with av.open(talk) as container:
        sound = np.concatenate([frame.to_ndarray().mean(0) for frame in container.decode(audio=0)])
    # A second of it, of as many samples as the voice has.
    assert np.abs(sound[:16000]).max() > 0.1 and -1 <= float(followed) <= 1
    assert PIL.Image.open(picture).size[0] > 1000
    clips, kept, plain = re.search(
        r"after (\d+) clips (\d+)% of .* recycling, (\d+)% by plain tuning", printed
    ).groups()
    assert int(clips) == 1000 and int(kept) > int(plain) > 0


def test_evaluation_runs(tmp_path):
    options = {"num_clips": 2, "num_chains": 1, "num_prompts": 2, "num_videos": 2, "num_inference_steps": 2}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    printed = run("-m", "svi_tiny.evaluate", f"--output_dir={tmp_path}", *arguments)
    results = json.loads((tmp_path / "svi_tiny.json").read_text())
    assert results["command"].startswith("python -m svi_tiny.evaluate --output_dir=")
    assert "psnr_worst_frame" in printed and len(results["drift"]["re-encoded"]["background_error"]) == 2
    assert PIL.Image.open(tmp_path / "drift.png").size[0] > 500


def test_a_training_script_resumes_with_all_of_its_state(tmp_path):
    """Two steps, two more after a restart. Both scripts are run from nothing to a pipeline in test_on_a_card.py."""
    options = ("--size=tenth", f"--output_dir={tmp_path / 'model'}", f"--checkpoint_dir={tmp_path / 'vae'}")
    counts = ("--train_batch_size=2", "--num_validation_clips=1", "--num_statistics_clips=4")
    every = ("--checkpointing_steps=2", "--validation_steps=2")
    for steps, validated in ((2, [2]), (4, [2, 4])):
        # Not every CPU has bfloat16 instructions.
        run(
            "-m", "svi_tiny.train_vae", *options, *counts, *every, f"--max_train_steps={steps}", "--mixed_precision=no"
        )
        curve = json.loads((tmp_path / "model" / "training" / "vae.json").read_text())["curve"]
        assert [point["step"] for point in curve] == validated
        assert (tmp_path / "vae" / f"step-{steps}" / "optimizer.bin").exists()


def test_the_vae_decodes_with_a_gradient(svi_tiny):
    latents = torch.randn(1, svi_tiny.vae.config.z_dim, 3, 2, 2, generator=seeded()).requires_grad_()
    pixels = decode(svi_tiny.vae, latents)
    torch.testing.assert_close(pixels.clamp(-1, 1), svi_tiny.vae.decode(latents).sample)
    (gradient,) = torch.autograd.grad(pixels.square().sum(), latents)
    assert all(part.any() for part in gradient.unbind(2))
