"""The run for a card: its sizes, what it keeps between parts, and all of it at a tenth of the size."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from diffusers.optimization import get_scheduler
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_svi import PixelMotion, SVIPipeline
from diffusers_svi.lora_file import read_lora
from diffusers_svi.training.layers import parse_layers
from svi_tiny import world
from svi_tiny.sizes import SIZES
from svi_tiny.stills import write_stills
from svi_tiny.train_transformer import build_text_encoder, build_transformer
from svi_tiny.train_vae import Z_DIM, build_vae
from svi_tiny.training import HELD_OUT, Checkpoints, Deadline, clip_batches, cosine_schedule, sample_clips


ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "svi_tiny" / "model"
SCRIPT = ROOT / "examples" / "svi_tiny" / "on_a_card.sh"
LIMIT = 60e6  # bytes, of all that has to be copied between parts


def call(folder: Path, *stages: str, **settings: str) -> subprocess.CompletedProcess:
    """The script at a tenth of the size, on one thread."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    own = {"OUT": str(folder), "SIZE": "tenth", "PYTHON": sys.executable, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own, **settings}
    return subprocess.run([SCRIPT, *stages], capture_output=True, text=True, check=False, env=environment)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def halves(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.half() for name, value in module.state_dict().items()}


# Sizes


def test_the_default_size_is_that_of_the_embedded_model():
    for model, name in ((build_vae(), "vae"), (build_transformer(Z_DIM), "transformer")):
        built, embedded = dict(model.config), json.loads((MODEL / name / "config.json").read_text())
        for config in (built, embedded):
            for key in [key for key in config if key.startswith(("_", "latents_"))]:  # not of the size
                del config[key]
        assert json.loads(json.dumps(built)) == embedded


def test_what_is_kept_at_the_size_for_a_card_is_under_the_limit():
    with torch.device("meta"):
        vae, transformer = build_vae(SIZES["card"]), build_transformer(Z_DIM, SIZES["card"])
        text_encoder = build_text_encoder(100)
    assert (count(vae), count(transformer)) == (8_365_796, 13_781_424)

    in_float32 = WanTransformer3DModel._keep_in_fp32_modules
    transformer_bytes = sum(
        parameter.numel() * (4 if any(module in name for module in in_float32) else 2)
        for name, parameter in transformer.named_parameters()
    )
    model = 2 * count(vae) + transformer_bytes + 4 * count(text_encoder)
    layers = [
        module
        for name, module in transformer.blocks.named_modules()
        if isinstance(module, torch.nn.Linear) and any(name.endswith(layer) for layer in parse_layers(None))
    ]
    assert len(layers) == 6 * 10
    lora = 2 * sum(16 * (layer.in_features + layer.out_features) for layer in layers)
    last_frames = 48 * 50 * 2600  # of three times 16 chains of 50 clips, as PNG; svi-tiny's take 2,500 bytes each
    training = 2 * (count(vae) + count(transformer) + count(text_encoder))
    assert training < LIMIT
    assert model + 5 * lora < LIMIT  # the plain one, and control and ERFT while both replace their forerunners
    assert model + 2 * lora + last_frames < LIMIT


def test_a_tenth_is_a_tenth():
    with torch.device("meta"):
        large, small = (
            count(build_vae(size)) + count(build_transformer(Z_DIM, size)) for size in (SIZES["card"], SIZES["tenth"])
        )
    assert small == pytest.approx(large / 10, rel=0.05)


# Parts


def make_models() -> dict[str, torch.nn.Module]:
    return {"text_encoder": build_text_encoder(20), "transformer": build_transformer(Z_DIM, SIZES["tenth"])}


def test_a_part_goes_on_from_the_weights_that_were_kept(tmp_path):
    kept, models = make_models(), make_models()
    for step in (3, 7):
        Checkpoints(tmp_path, kept, weights_only=True).save(Accelerator(), step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-7"]
    (file,) = (tmp_path / "step-7").iterdir()
    # Two bytes a parameter; the embedding of words has two names in a T5.
    shared = kept["text_encoder"].shared.weight.numel()
    parameters = sum(map(count, kept.values())) + shared
    assert 2 * parameters < file.stat().st_size < 2 * parameters + 30_000

    assert Checkpoints(tmp_path, models, weights_only=True).load_weights() == 7
    for name, model in models.items():
        for key, value in halves(kept[name]).items():
            torch.testing.assert_close(model.state_dict()[key], value.float(), rtol=0, atol=0)


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path):
    models = {"model": torch.nn.Linear(2, 2)}
    Checkpoints(tmp_path, models, weights_only=True).save(Accelerator(), 1)
    with pytest.raises(ValueError, match="`--weights_only`: .*step-1 was written with it"):
        Checkpoints(tmp_path, models)
    (tmp_path / "step-1" / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="step-1 was written without it"):
        Checkpoints(tmp_path, models, weights_only=True)


def rates(schedule) -> list[float]:
    values = []
    for _ in range(30):
        values.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return values


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)


def test_the_learning_rate_is_diffusers_cosine():
    theirs = get_scheduler("cosine", make_optimizer(), num_warmup_steps=5, num_training_steps=30)
    assert rates(cosine_schedule(make_optimizer(), 5, 30)) == pytest.approx(rates(theirs))


def test_an_optimizer_that_begins_anew_warms_up_again():
    whole = rates(cosine_schedule(make_optimizer(), 5, 60))
    part = rates(cosine_schedule(make_optimizer(), 5, 60, first_step=20))
    warm_up = [done / 5 for done in range(5)]
    assert part[:5] == pytest.approx([a * b for a, b in zip(warm_up, whole[20:25], strict=True)])
    assert part[5:10] == pytest.approx(whole[25:30])


def test_a_deadline():
    assert Deadline(0).over() and not Deadline(60).over() and not Deadline().over()
    for minutes in (-1, math.nan):
        with pytest.raises(ValueError, match="`--max_minutes` must be 0, for one step, or more"):
            Deadline(minutes)


def test_worker_processes_draw_the_same_clips_in_their_order():
    ranges = [range(2), range(HELD_OUT, HELD_OUT + 3), range(5, 6)]
    state = torch.get_rng_state()
    drawn = list(clip_batches(0, ranges, num_workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    for (prompts, pixels), indices in zip(drawn, ranges, strict=True):
        wanted_prompts, wanted = sample_clips(0, indices)
        assert prompts == wanted_prompts and torch.equal(pixels, wanted)


def test_stills(tmp_path):
    prompts = write_stills(tmp_path, 2)
    state, (action,) = world.sample_story(1, 1)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "001.png")), world.render(state))
    assert prompts[1] == world.caption(state, action)
    assert (tmp_path / "prompts.txt").read_text().splitlines() == prompts


# The script


@pytest.mark.parametrize(
    "stage, settings, message",
    [
        ("vae", {"SIZE": "huge"}, "SIZE is card or tenth, got huge."),
        ("vae", {"MINUTES": "nine"}, "MINUTES is a number, got nine."),
        ("vae", {"SHARE": "1.5"}, "SHARE is above 0 and at most 1, got 1.5."),
        ("vae", {"SHARE": "0.5"}, "SHARE is for SIZE=card, got SIZE=tenth."),
        ("lora", {}, "Stages are vae, transformer, loras, drift and correction, got lora."),
        pytest.param(
            *("vae", {"SIZE": "card"}, "SIZE=card needs a GPU, and PyTorch sees none."),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="There is one."),
        ),
    ],
)
def test_the_script_refuses(stage, settings, message, tmp_path):
    finished = call(tmp_path, stage, **settings)
    assert (finished.returncode, finished.stderr.strip()) == (1, message)


def test_what_fails_is_not_gone_on_from(tmp_path):
    """The checkpoint of a training that stops or fails stays: it is removed only behind one that is finished."""
    checkpoint = tmp_path / "keep" / "checkpoint" / "vae" / "step-1"
    checkpoint.mkdir(parents=True)
    for status, told in (("75", "Stopped after"), ("3", "VAE failed, with status 3.")):
        program = tmp_path / f"exits-{status}"
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
        finished = call(tmp_path, PYTHON=str(program))
        assert finished.returncode == int(status) and told in finished.stdout + finished.stderr
        assert checkpoint.exists()


def test_every_round_goes_on_from_the_one_before(tmp_path):
    """What is called at the size for a card, by a program that writes what it is told to, but once fails with one LoRA
    and is not done in time with the other."""
    program, calls = tmp_path / "trainer", tmp_path / "calls"
    program.write_text(
        """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in --output_dir) to=$2 ;; --init_lora) from=$(basename $2 .safetensors) ;; --max_train_steps) n=$2 ;; esac
    shift
done
[ -n "$to" ] || exit 0
if [ "$(basename "$to")" = control-2 ] && [ ! -e "$0.failed" ]; then touch "$0.failed"; exit 3; fi
if [ "$(basename "$to")" = erft-2 ] && [ ! -e "$0.late" ]; then touch "$0.late"; sleep 0.5; exit 124; fi
mkdir -p "$to"
touch "$to/pytorch_lora_weights.safetensors"
[ -z "$n" ] || echo "$from -> $(basename "$to"), $n" >> "$(dirname "$0")/calls"
"""
    )
    program.chmod(0o755)
    settings = {"SIZE": "card", "PYTHON": str(program), "SHARE": "0.5"}
    failed = call(tmp_path, "loras", **settings)
    assert failed.returncode == 3 and "control and ERFT LoRA, round 2 of 2 failed" in failed.stderr
    loras = tmp_path / "keep" / "loras"
    assert {path.stem for path in loras.iterdir()} == {"plain", "control-1", "erft-1"}
    other = call(tmp_path, "loras", **{**settings, "SHARE": "1"})
    assert other.stderr.endswith("was begun with SIZE=card SHARE=0.5, not SIZE=card SHARE=1: give another OUT.\n")
    call(tmp_path, "loras", **settings)
    assert {path.stem for path in loras.iterdir()} == {"control-2", "erft-2"}
    assert sorted(calls.read_text().splitlines()) == [
        " -> plain, 1500",
        "control-1 -> control-2, 2500",
        "erft-1 -> erft-2, 2500",
        "plain -> control-1, 2500",
        "plain -> erft-1, 2500",
    ]


def test_all_of_it_at_a_tenth_of_the_size(tmp_path):
    """Two parts, the first of a single step."""
    keep = tmp_path / "keep"
    first = call(tmp_path, MINUTES="0")
    assert first.returncode == 75, first.stderr[-3000:]
    assert "Not finished, 1 of 10 steps of the VAE" in first.stdout
    (checkpoint,) = (keep / "checkpoint" / "vae").iterdir()
    assert checkpoint.name == "step-1"
    vae_parameters = count(build_vae(SIZES["tenth"]))
    assert sum(file.stat().st_size for file in keep.rglob("*") if file.is_file()) < 2 * vae_parameters + 30_000

    rest = call(tmp_path, MINUTES="600")
    assert rest.returncode == 0, rest.stderr[-3000:]
    assert f"Going on from the weights of {checkpoint}." in rest.stdout
    assert not list((keep / "checkpoint").iterdir())
    record = json.loads((keep / "results" / "training" / "vae.json").read_text())
    assert [point["step"] for point in record["curve"]] == list(range(1, 11)) and len(record["commands"]) == 2
    # The learning rate is 0 at the first step of a part: the second one begins where the first one ended.
    psnr = [point["psnr"] for point in record["curve"]]
    assert psnr[1] == pytest.approx(psnr[0], abs=0.01) and abs(psnr[9] - psnr[0]) > 0.1

    pipe = SVIPipeline.from_pretrained(keep / "model")
    assert pipe.transformer.config.num_layers == SIZES["tenth"].num_layers
    assert sorted(path.stem for path in (keep / "loras").iterdir()) == ["control-1", "erft-1"]
    for file in (keep / "loras").iterdir():
        assert read_lora(file).conditioning == PixelMotion(1, padding="reference")
        with safe_open(file, "pt") as opened:
            assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.bfloat16}
    control, erft = (load_file(keep / "loras" / f"{kind}-1.safetensors") for kind in ("control", "erft"))
    assert any(not torch.equal(control[name], erft[name]) for name in control)
    drift = json.loads((keep / "results" / "drift" / "drift.json").read_text())
    assert list(drift["results"]["consistent"]) == ["base", "control", "erft"]
    assert drift["command"].startswith("python benchmarks/drift.py --model_dir") and "torch" in drift["versions"]
    for kind in ("control", "erft"):
        correction = json.loads((keep / "results" / "correction" / kind / "correction.json").read_text())
        assert list(correction["measured"]["lora"]["0"]) == ["exposure medium"]

    # Nothing is done twice.
    again = call(tmp_path, MINUTES="0")
    assert again.returncode == 0 and "==" not in again.stdout
