"""What `plan` tells of a film, on the embedded model, whose numbers can be counted."""

import re

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from huggingface_hub import constants
from transformers import UMT5EncoderModel

from diffusers_svi.erft import BankConfig
from diffusers_svi.memory import model_shapes
from test_cli import SVI_TINY, generate


TINY = ("--model", SVI_TINY / "model", "--lora", SVI_TINY / "loras" / "shot.safetensors", "--fps", 8)


def test_weights_are_counted_out_of_the_configuration():
    models = {"text_encoder": UMT5EncoderModel, "transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}
    loaded = {name: kind.from_pretrained(SVI_TINY / "model", subfolder=name) for name, kind in models.items()}
    numbers = {name: sum(value.numel() for value in model.parameters()) for name, model in loaded.items()}
    shapes = model_shapes(SVI_TINY / "model")
    assert {name: weights.count for name, weights in shapes.weights.items()} == numbers
    # The VAE is in float32 whatever the rest is; of the transformer, what diffusers keeps in float32.
    sizes = shapes.num_bytes(torch.bfloat16)
    assert sizes["vae"] == 4 * numbers["vae"] and sizes["text_encoder"] == 2 * numbers["text_encoder"]
    in_bfloat16 = WanTransformer3DModel.from_pretrained(
        SVI_TINY / "model", subfolder="transformer", dtype=torch.bfloat16
    )
    assert sizes["transformer"] == sum(value.nbytes for value in in_bfloat16.parameters())


def test_frames_and_seconds_are_those_of_the_scheme(run_command):
    status, told, errors = run_command("plan", *TINY, "--num_clips", 10, "--num_frames", 17)
    assert status == 0, errors
    assert "10 clips, 161 frames: 20.1 seconds at 8 fps" in told and "of weights in bfloat16, VAE in float32" in told
    status, told, _ = run_command("plan", "--preset", "pro", "--num_clips", 2, "--model", SVI_TINY / "model")
    assert status == 0 and "2 clips, 157 frames: 10.5 seconds at 15 fps" in told


def test_a_model_that_cannot_be_read_is_told(run_command, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nothing is waited for
    status, told, errors = run_command("plan", "--model", "missing/model", "--num_clips", 1)
    assert status == 0 and "memory   not known: the configuration of missing/model cannot be read" in told, errors


def test_a_clip_is_measured(run_command, tmp_path):
    arguments = generate(num_frames=9, num_inference_steps=1, num_clips=6, out=None)[1:]
    status, told, errors = run_command("plan", *arguments, "--measure")
    assert status == 0 and re.search(r"time +[\d.]+ seconds a clip, [\d.]+ minutes for 6", told), errors
    assert re.search(r"file +[\d.]+ kB a clip", told) and not list(tmp_path.iterdir())
    status, _, errors = run_command("plan", "--num_clips", 6, "--measure")
    assert status == 1 and "Give prompts" in errors


def test_the_memory_of_published_models_is_told_without_looking_anywhere(run_command):
    status, told, errors = run_command("plan", "--model", "wan2.1-i2v-14b", "--card", 24, "--gguf", "Q8_0")
    assert status == 0, errors
    assert "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers" in told and "32760 tokens, transformers in Q8_0" in told
    rows = {line.split()[0]: line.split() for line in told.splitlines() if line.startswith("  ")}
    assert rows["--offload"][1:6] == ["text", "image", "encode", "denoise", "decode"]
    # 18.7 GB of weights and LoRA; what is computed; the VAE.
    assert rows["model"][4] == "23.8" and rows["model"][-1] == "yes" and rows["none"][-1] == "no"
    assert "24 GB: --offload model --gguf Q8_0" in told and "Computed from shapes" in told


def test_the_memory_of_a_training_run_is_told(run_command):
    arguments = ("plan", "--model", "wan2.1-i2v-14b", "--train", "--zero", 2, "--processes", 8, "--bank_dtype", "int8")
    status, told, errors = run_command(*arguments)
    bank = 8 * BankConfig(dtype="int8").num_bytes((16, 21, 60, 104))
    assert status == 0 and f"error banks of 8 processes {bank / 1e9:.1f} GB" in told, errors
    # Encoders; the base and its LoRA; and with 32.8 GB of base, 25.4 GB of activations.
    assert re.search(r"blocks on the CPU +20\.3 +4\.6 +47\.0 +47\.0 ", told), told
    assert re.search(r"as asked +20\.3 +35\.3 +61\.7 +61\.7 .* no +no +yes\n", told), told
    status, _, errors = run_command("plan", "--train", "--zero", 3, "--quantize_base", "4bit")
    assert status == 1 and "quantized weights cannot be dealt out" in errors


def test_the_memory_of_two_experts_and_of_buckets_is_told(run_command):
    arguments = ("plan", "--model", "wan2.2-i2v-a14b", "--train", "--both_experts", "--buckets", "832x480 480x832x49")
    status, told, errors = run_command(*arguments)
    assert status == 0 and "GB on each GPU, 81 frames of 480 x 832, 49 frames of 832 x 480, batch of 1" in told, errors
    bank = sum(BankConfig().num_bytes((16, frames, 60, 104), 19 + 32) for frames in (21, 13))
    assert f"error bank {bank / 1e9:.1f} GB, the other expert 36.0 GB" in told and "ZeRO" not in told, told
    for options, message in {
        ("--buckets", "832x480", "--height", 480): "`--height`=480 is not for `--buckets`",
        ("--buckets", "832x480x49", "--num_frames", 33): "`--num_frames`=33 would do nothing",
        ("--buckets", "832"): "`--buckets`: give width x height",
        ("--buckets", "832x481"): "`--buckets`: width and height must be multiples of 16, got 832x481x81.",
        ("--processes", 0): "--processes",
        ("--quantize", "fp8"): "`--quantize` does nothing with `--train`: leave it out.",
        (
            "--model",
            "wan2.2-ti2v-5b",
            "--height",
            720,
        ): "`--height` must be a multiple of 32 for Wan-AI/Wan2.2-TI2V-5B",
    }.items():
        status, _, errors = run_command("plan", "--train", *options)
        assert status == 1 and message in errors, errors


def test_options_of_a_training_run_are_for_one(run_command):
    status, told, errors = run_command("plan", "--model", "wan2.2-i2v-a14b", "--both_experts")
    assert status == 1 and "`--both_experts` does nothing without `--train`: leave it out." in errors
    status, told, _ = run_command("plan", "--preset", "none", "--model", "wan2.1-i2v-14b")
    assert status == 0 and "32760 tokens\n" in told
    status, told, _ = run_command("plan", "--preset", "film", "--model", "wan2.1-i2v-14b", "--rank", 64)
    assert status == 0 and "32760 tokens, LoRA of rank 64\n" in told
