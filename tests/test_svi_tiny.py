"""The embedded model, and the scripts that make, measure and show it."""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from conftest import load_script, quiet, seeded
from diffusers_svi import PixelMotion, SVIPipeline
from diffusers_svi.tiny import world
from diffusers_svi.tiny.tracker import displacement, track


ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "svi-tiny"
HELD_OUT_SEED = 1
SIZE = {"height": 64, "width": 64, "num_frames": 17}


@pytest.fixture(scope="module")
def svi_tiny() -> SVIPipeline:
    return quiet(SVIPipeline.from_pretrained(MODEL))


def run(script: str, *arguments, processes: int = 1) -> str:
    command = [str(ROOT / "examples" / script), *map(str, arguments)]
    environment = dict(os.environ)
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_it_is_real_and_small(svi_tiny):
    assert isinstance(svi_tiny.vae, AutoencoderKLWan)
    assert isinstance(svi_tiny.transformer, WanTransformer3DModel)
    assert isinstance(svi_tiny.text_encoder, UMT5EncoderModel)
    z_dim = svi_tiny.vae.config.z_dim
    assert svi_tiny.transformer.config.in_channels == z_dim + 4 + z_dim
    assert {m.dtype for m in (svi_tiny.vae, svi_tiny.transformer, svi_tiny.text_encoder)} == {torch.float32}
    assert sum(file.stat().st_size for file in (ROOT / "models").rglob("*.safetensors")) <= 24e6
    for part in ("vae", "transformer"):
        record = json.loads((MODEL / "training" / f"{part}.json").read_text())
        assert {"commands", "seed", "minutes", "machine", "versions", "curve"} <= set(record)


def test_the_vae_keeps_the_world(svi_tiny):
    """The committed measurement, made again."""
    script = load_script(ROOT / "examples" / "svi_tiny" / "evaluate.py")
    psnr = script.measure_vae(svi_tiny, argparse.Namespace(num_videos=64))["psnr_per_frame"]
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


def test_blocks_can_be_left_out_or_doubled(svi_tiny):
    script = load_script(ROOT / "examples" / "svi_tiny" / "train_transformer.py")
    config = svi_tiny.transformer.config
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, 2, 4, 4, generator=seeded()),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, config.text_dim, generator=seeded()),
    }
    outputs = {}
    for num_layers in (3, 6, 9):
        transformer = WanTransformer3DModel.from_pretrained(MODEL, subfolder="transformer", dtype=torch.float32)
        script.change_depth(transformer, num_layers)
        assert len(transformer.blocks) == transformer.config.num_layers == num_layers
        with torch.no_grad():
            outputs[num_layers] = transformer(**inputs).sample
    torch.testing.assert_close(outputs[9], outputs[6])
    assert not torch.allclose(outputs[3], outputs[6], atol=0.1)


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


@pytest.fixture
def results() -> dict:
    return json.loads((ROOT / "docs" / "results" / "svi_tiny.json").read_text())


def test_committed_first_clips_meet_the_bars(results):
    first_clip = results["first_clip"]
    assert first_clip["prompts"] >= 100
    assert first_clip["sprite_found"] >= 0.95
    assert first_clip["background_error"] <= 0.03
    assert first_clip["direction_followed"] >= 0.9


def test_the_committed_vae_meets_the_bar(results):
    assert results["vae"]["psnr_worst_frame"] >= 33


def test_the_committed_chain_drifts_much_more_than_the_vae(results):
    """Over as many clips as round trips of the VAE, 50."""
    assert {len(chain["background_error"]) for chain in results["drift"].values()} == {50}
    assert results["gates"]["chain_drift"] >= 3 * results["gates"]["vae_drift"]


# What svi-tiny does not reach yet. Once it does, the tests fail until the mark is taken away.
@pytest.mark.xfail(strict=True, reason="5.3% against the 2.1% of the VAE")
def test_the_committed_chain_drifts_much_more_in_30_clips_than_the_vae_in_50_round_trips(results):
    first, *_, last = results["drift"]["re-encoded"]["background_error"][:30]
    assert last - first >= 3 * results["gates"]["vae_drift"]


@pytest.mark.xfail(strict=True, reason="0.46 of unit variance")
def test_the_committed_last_latent_is_close(results):
    assert results["gates"]["last_latent_rms"] <= 0.3


def test_demo(tmp_path):
    sizes = ("--num_clips", 3, "--num_inference_steps", 2, "--compare_clips", 2)
    printed = run("demo.py", "--output_dir", tmp_path, *sizes)
    film, sheet, comparison = re.findall(r"^(?:Film|Contact sheet|Comparison): +(.+)$", printed, re.MULTILINE)
    with av.open(film) as container:
        assert sum(1 for _ in container.decode(video=0)) == PixelMotion(1).film_length(3, 17)
    assert PIL.Image.open(sheet).size[0] > 500 and PIL.Image.open(comparison).size[0] > 200


def test_evaluation_runs(tmp_path):
    options = {"num_clips": 2, "num_chains": 1, "num_prompts": 2, "num_videos": 2, "num_inference_steps": 2}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    printed = run("svi_tiny/evaluate.py", f"--model_dir={MODEL}", f"--output_dir={tmp_path}", *arguments)
    results = json.loads((tmp_path / "svi_tiny.json").read_text())
    assert "psnr_worst_frame" in printed and len(results["drift"]["re-encoded"]["background_error"]) == 2
    assert PIL.Image.open(tmp_path / "svi_tiny_drift.png").size[0] > 500


def test_training_scripts_run_and_resume(tmp_path):
    """Two steps of each, two more after a restart; what comes out is a pipeline."""
    model, cache = tmp_path / "model", tmp_path / "cache"

    def train(part, *options, steps):
        run(
            f"svi_tiny/train_{part}.py",
            f"--output_dir={model}",
            f"--checkpoint_dir={tmp_path / part}",
            f"--max_train_steps={steps}",
            "--train_batch_size=2",
            "--checkpointing_steps=2",
            "--validation_steps=2",
            "--mixed_precision=no",  # not every CPU has bfloat16 instructions
            "--num_validation_clips=2",
            *options,
        )
        return json.loads((model / "training" / f"{part}.json").read_text())["curve"]

    for part, options in (
        ("vae", ("--num_statistics_clips=4",)),
        ("transformer", (f"--cache_dir={cache}", "--num_clips=8", "--optimizer=adamw")),
    ):
        assert [point["step"] for point in train(part, *options, steps=2)] == [2]
        assert [point["step"] for point in train(part, *options, steps=4)] == [2, 4]
    assert SVIPipeline.from_pretrained(model).transformer.config.num_layers == 6
    # What is trained already is the start of another run; here of the decoder alone.
    train(
        "vae",
        f"--init_from={MODEL / 'vae'}",
        f"--checkpoint_dir={tmp_path / 'decoder'}",
        "--crop_size=32",
        "--decoder_only",
        "--shade_weight=200",
        "--frame_power=4",
        "--still_clips",
        "--optimizer=adamw",
        steps=2,
    )
    weights, before = (load_file(folder / "vae" / SAFETENSORS_WEIGHTS_NAME) for folder in (model, MODEL))
    changed = {name.split(".")[0] for name in before if not torch.equal(weights[name], before[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_vae_settles(tmp_path):
    """`settle_vae.py` runs in two processes, goes on after a stop, and keeps latents of films as they are."""
    for steps in (2, 4):
        run(
            "svi_tiny/settle_vae.py",
            f"--init_from={MODEL / 'vae'}",
            f"--output_dir={tmp_path}",
            f"--checkpoint_dir={tmp_path / 'checkpoints'}",
            f"--max_train_steps={steps}",
            "--train_batch_size=2",
            "--first_batches=2",
            "--checkpointing_steps=2",
            "--validation_steps=2",
            "--num_validation_clips=2",
            processes=2,
        )
    record = json.loads((tmp_path / "training" / "vae.json").read_text())
    assert [point["step"] for point in record["curve"]] == [2, 4] and record["processes"] == 2
    assert {"light_change", "scene_error", "psnr_worst_frame"} < set(record["curve"][0])
    assert 0 < record["curve"][-1]["clip_latents_rms"] < 0.02 < record["curve"][-1]["still_latents_rms"]
    weights, before = (load_file(folder / "vae" / SAFETENSORS_WEIGHTS_NAME) for folder in (tmp_path, MODEL))
    changed = {name.split(".")[0] for name in before if not torch.equal(weights[name], before[name])}
    assert changed == {"encoder", "quant_conv", "decoder", "post_quant_conv"}


def test_stills_of_the_vae_become_pictures_of_the_world(svi_tiny):
    script = load_script(ROOT / "examples" / "svi_tiny" / "settle_vae.py")
    stills, rng = script.Stills(svi_tiny.vae, seed=0, size=4), np.random.default_rng(0)
    stills.make(range(3), rng)
    stills.make(range(3, 6), rng)
    drawn = script.first_states(0, range(2, 6))
    assert [still.state.scene for still in stills.stills] == [state.scene for state in drawn]
    before = list(stills.stills)
    chosen, frames, targets = stills.sample(2, rng)
    decoded = svi_tiny.vae.decode(script.encode_still(svi_tiny.vae, frames)).sample[:, :, -1]
    stills.move_on(chosen, decoded)
    for i, (old, new) in enumerate(zip(before, stills.stills, strict=True)):
        assert (new is old) == (i not in chosen)
    frames = script.eight_bits(decoded)
    torch.testing.assert_close(torch.stack([stills.stills[i].frame for i in chosen]), frames)
    # What is to be made of them is the same scene, in nearly the light in which they came out.
    moved = torch.stack([stills.stills[i].target for i in chosen])
    assert 0 < (moved - targets).abs().mean() < 0.02 and (moved - frames).abs().mean() < 0.1


def test_the_light_of_a_still():
    script = load_script(ROOT / "examples" / "svi_tiny" / "settle_vae.py")
    states = [replace(state, light=(0.7, 0.85, 1.0)) for state in script.first_states(0, range(8))]
    np.testing.assert_allclose(script.lights(states, script.draw(states)), [(0.7, 0.85, 1.0)] * 8, atol=1e-3)
    assert max(world.scene_pixels(scene, 0).max() for scene in world.SCENES) * script.LIGHT[1] < 255
    # The nearest light there can be, if there is no such light.
    darker = (script.draw(states) + 1) * 0.9 - 1
    states, pictures = script.nearest(states, darker)
    np.testing.assert_allclose([state.light for state in states], [(0.65, 0.765, 0.9)] * 8, atol=1e-3)
    # Sprites are left alone.
    for state, picture, drawn, frame in zip(states, pictures, script.draw(states), darker, strict=True):
        alone = torch.from_numpy(script.scene_alone(state))
        assert torch.equal(picture[:, alone], drawn[:, alone]) and torch.equal(picture[:, ~alone], frame[:, ~alone])


def test_errors_of_stills_count_at_all_scales():
    script = load_script(ROOT / "examples" / "svi_tiny" / "settle_vae.py")
    # An error of the whole frame counts at every scale, one of a chequered frame as pixels alone.
    even = torch.full((1, 3, 1, 64, 64), 0.125)
    chequered = even * (-1) ** (torch.arange(64)[:, None] + torch.arange(64))
    torch.testing.assert_close(script.error_of_scales(even), torch.tensor(0.125**2 * sum(script.SCALES.values())))
    torch.testing.assert_close(script.error_of_scales(chequered), torch.tensor(0.125**2 * script.SCALES[1]))


def test_gradient_goes_through_the_end_of_a_clip(svi_tiny):
    decode = load_script(ROOT / "examples" / "svi_tiny" / "train_vae.py").decode
    latents = torch.randn(1, svi_tiny.vae.config.z_dim, 3, 2, 2, generator=seeded()).requires_grad_()
    whole, end = decode(svi_tiny.vae, latents), decode(svi_tiny.vae, latents, first_latent=2)
    torch.testing.assert_close(end, whole[:, :, -4:])
    (gradient,) = torch.autograd.grad(end.square().sum(), latents)
    assert [bool(part.any()) for part in gradient.unbind(2)] == [False, False, True]


def test_windows_of_the_vae_show_the_sprite():
    script = load_script(ROOT / "examples" / "svi_tiny" / "train_vae.py")
    states = world.film(world.State("blue sky", 0, world.Sprite("circle", "red", "large", 50, 12)), [world.Action()])
    rng = np.random.default_rng(0)
    windows = [script.window_around_sprite(states, 32, rng) for _ in range(200)]
    shown = [world.render(states[0])[rows, columns] for rows, columns in windows]
    assert {pixels.shape for pixels in shown} == {(32, 32, 3)} and {rows.start % 8 for rows, _ in windows} == {0}
    assert np.mean([(pixels == world.COLOURS["red"]).all(axis=-1).sum() > 50 for pixels in shown]) > 0.75
