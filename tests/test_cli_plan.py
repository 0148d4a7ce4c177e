"""What `plan` tells of a film, on the embedded model, whose numbers can be counted."""

import re

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

from diffusers_svi.plan import weights_of
from test_cli import SVI_TINY, generate


TINY = ("--model", SVI_TINY / "model", "--lora", SVI_TINY / "loras" / "shot.safetensors", "--fps", 8)


def test_weights_are_counted_out_of_the_configuration():
    models = {"text_encoder": UMT5EncoderModel, "transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}
    loaded = {name: kind.from_pretrained(SVI_TINY / "model", subfolder=name) for name, kind in models.items()}
    numbers = {name: sum(value.numel() for value in model.parameters()) for name, model in loaded.items()}
    weights = weights_of(SVI_TINY / "model", torch.bfloat16)
    # The VAE is in float32 whatever the rest is.
    assert weights.sizes == {name: number * (4 if name == "vae" else 2) for name, number in numbers.items()}
    assert weights.all == sum(weights.sizes.values()) and weights.largest == max(weights.sizes.values())


def test_frames_and_seconds_are_those_of_the_scheme(run_command):
    status, told, errors = run_command("plan", *TINY, "--num_clips", 10, "--num_frames", 17)
    assert status == 0, errors
    assert "10 clips, 161 frames: 20.1 seconds at 8 fps" in told and re.search(r"weights +\d+.* MB in float32", told)
    status, told, _ = run_command("plan", "--preset", "pro", "--num_clips", 2, "--model", SVI_TINY / "model")
    assert status == 0 and "2 clips, 157 frames: 10.5 seconds at 15 fps" in told


def test_a_model_that_cannot_be_read_is_told(run_command):
    status, told, errors = run_command("plan", "--model", "missing/model", "--num_clips", 1)
    assert status == 0 and "weights  not known: the configuration of missing/model cannot be read" in told, errors


def test_a_clip_is_measured(run_command, tmp_path):
    arguments = generate(num_frames=9, num_inference_steps=1, num_clips=6, out=None)[1:]
    status, told, errors = run_command("plan", *arguments, "--measure")
    assert status == 0 and re.search(r"time +[\d.]+ seconds a clip, [\d.]+ minutes for 6", told), errors
    assert re.search(r"file +[\d.]+ kB a clip", told) and not list(tmp_path.iterdir())
    status, _, errors = run_command("plan", "--num_clips", 6, "--measure")
    assert status == 1 and "Give prompts" in errors
