"""`examples/train_erft.py --condition`, run as a script on tiny real models: LoRA and modules, and films with them."""

import ast
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from conftest import CLIP, load_script, make_components, make_transformer
from diffusers_svi import PixelMotion, SVIDancePipeline, SVIPipeline, SVITalkPipeline
from diffusers_svi.conditions.audio import open_audio
from diffusers_svi.conditions.audio_encoder import AudioEncoder
from diffusers_svi.conditions.converters import with_modules
from diffusers_svi.conditions.talk_transformer import SVITalkTransformer3DModel
from diffusers_svi.conditions.trained_modules import modules_to_save
from diffusers_svi.lora_file import read_lora
from diffusers_svi.published import AUDIO_ENCODER
from small_videos import write_numbered, write_rows
from test_audio import make_model, speech, write
from test_dance import make_dwpose
from test_talk import make_multitalk
from test_train_erft import LORA, SCRIPT, assert_same, command, failed, train, under_deepspeed


PIPELINES = {"talk": SVITalkPipeline, "dance": SVIDancePipeline}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny model, an encoder, and three videos of five seconds with sounds, features and poses."""
    folder = tmp_path_factory.mktemp("models")
    SVIPipeline(**make_components("i2v")).save_pretrained(folder / "i2v")
    SVIPipeline(**make_components("ti2v-5b")).save_pretrained(folder / "ti2v-5b")
    make_model().float().save_pretrained(folder / "encoder")
    rows = []
    for name in "abc":
        (folder / "world").mkdir(exist_ok=True)
        write_numbered(folder / "world" / f"{name}.mp4", height=64, width=64)
        write(folder / "world" / f"{name}.wav", speech(5, ord(name)), 16000)
        np.save(folder / "world" / f"{name}.npy", np.random.default_rng(ord(name)).random((40, 2, 3), np.float32))
        rows.append([f"{name}.mp4", "a cat sits", f"{name}.wav", f"{name}.npy", f"{name}.mp4"])
    write_rows(folder / "world" / "list.csv", ["file_name", "text", "audio", "features", "pose"], *rows)
    return folder


@pytest.fixture(scope="module")
def train_erft():
    return load_script(SCRIPT)


def options_of(models: Path, preset: str, cache: Path | None = None, **options) -> dict:
    own = {
        "talk": {
            "audio_encoder": models / "encoder",
            "module_sizes": ["audio_hidden_dim=8", "audio_tokens=2", "audio_token_dim=8"],
        },
        "dance": {"module_sizes": ["pose_dim=2"]},
    }
    common = {"condition_modules": "init", "train_condition_modules": True, "height": 32, "width": 32, "num_frames": 9}
    cache = models / f"cache-{preset}" if cache is None else cache
    return {"preset": preset, **common, **own[preset], "latent_cache_dir": cache, "max_train_steps": 3, **options}


def film(pipe, models: Path, image, preset: str) -> np.ndarray:
    follows = {"pose": models / "world" / "a.mp4"}
    if preset == "talk":
        follows = {"audio": open_audio(models / "world" / "a.wav", pipe.audio_encoder, 8), "audio_guidance_scale": 1}
    return pipe(
        image=image,
        prompts="a cat",
        num_clips=2,
        output_type="np",
        guidance_scale=1,
        generator=torch.Generator().manual_seed(0),
        **CLIP,
        **follows,
    ).frames[0]


@pytest.mark.parametrize("preset", ["talk", "dance"])
def test_lora_and_modules_come_out_of_one_file(models, tmp_path, image, preset):
    """Fresh modules are trained, and a film by the pipeline of the condition follows; gone on from, they are these."""
    options = options_of(models, preset, checkpointing_steps=2, learning_rate=1e-2)
    train(models / "i2v", tmp_path / "run", **options)
    lora = read_lora(tmp_path / "run", LORA)
    assert lora.conditioning == PixelMotion(1, "reference") and lora.condition == {"talk": "audio"}.get(preset, "pose")
    last = "blocks.1.audio_cross_attn.proj.weight" if preset == "talk" else "dwpose_embedding.12.weight"
    assert lora.modules[last].any() and lora.modules[last].dtype == torch.float32

    encoder = {"audio_encoder": AudioEncoder(models / "encoder").model} if preset == "talk" else {}
    pipe = PIPELINES[preset].from_pretrained(models / "i2v", **encoder)
    pipe.load_lora_weights(tmp_path / "run", weight_name=LORA)
    assert all(torch.equal(value, lora.modules[key]) for key, value in modules_to_save(pipe.transformer).items())
    assert pipe.lora_conditioning == lora.conditioning
    assert film(pipe, models, image, preset).shape == (17, 32, 32, 3)

    # Another run that goes on from the file, without learning, hands the same over.
    more = options_of(models, preset, learning_rate=0.0, init_lora=tmp_path / "run", condition_modules=None)
    train(models / "i2v", tmp_path / "more", **{**more, "module_sizes": None})
    assert_same(tmp_path / "run" / LORA, tmp_path / "more" / LORA)
    card = (tmp_path / "run" / "README.md").read_text()
    ast.parse(card.split("```python")[1].split("```")[0])
    assert f"for which `{PIPELINES[preset].__name__}` gives the model modules. Those lie in the file too." in card
    assert f"pipe = {PIPELINES[preset].__name__}.from_pretrained(model, vae=vae" in card


@pytest.mark.parametrize("preset", ["talk", "dance"])
def test_a_run_goes_on_bit_for_bit(models, tmp_path, preset):
    options = options_of(models, preset, checkpointing_steps=2, max_train_steps=4, use_ema=True)
    train(models / "i2v", tmp_path / "straight", **options)
    train(models / "i2v", tmp_path / "stopped", **{**options, "max_train_steps": 2})
    told = train(models / "i2v", tmp_path / "stopped", resume_from_checkpoint="latest", **options)
    assert re.search(r"Going on from .*/checkpoint-2\.", told)
    assert_same(tmp_path / "straight" / LORA, tmp_path / "stopped" / LORA)
    for name in ("bank-0.safetensors", "recycler-0.safetensors", LORA):
        assert_same(*(tmp_path / run / "checkpoint-4" / name for run in ("straight", "stopped")))
    # Of other rows it is another run.
    other = {**options, "resume_from_checkpoint": "latest"}
    shutil.copytree(models / "world", tmp_path / "world")
    other["train_data_dir"] = tmp_path / "world"
    if preset == "talk":
        write(tmp_path / "world" / "b.wav", speech(5, 77), 16000)
    else:
        write_numbered(tmp_path / "world" / "p.mp4", height=64, width=32)
        rows = [[f"{name}.mp4", "a cat sits", "p.mp4"] for name in "abc"]
        write_rows(tmp_path / "world" / "list.csv", ["file_name", "text", "pose"], *rows)
    assert "the data were others (3 samples, now 3)" in failed(models / "i2v", tmp_path / "stopped", **other)


def test_a_lora_alone_leaves_modules_as_they_are(models, tmp_path):
    """Those of the base, from a file; for poses they are handed over nevertheless, for audio not."""
    components = make_components("i2v")
    components["transformer"] = with_modules(SVITalkTransformer3DModel, make_transformer(), make_multitalk())
    SVITalkPipeline(**components).save_pretrained(models / "talk")
    options = options_of(models, "talk", condition_modules=None, module_sizes=None, train_condition_modules=None)
    options |= {"audio_encoder": None, "condition_column": "features", "train_data_dir": models / "world"}
    train(models / "talk", tmp_path / "talk", **options)
    lora = read_lora(tmp_path / "talk", LORA)
    assert lora.condition == "audio" and not lora.modules and lora.state_dict
    assert not any("audio" in name for name in lora.state_dict)
    assert f"They are those of `{models / 'talk'}`." in (tmp_path / "talk" / "README.md").read_text()
    pipe = SVITalkPipeline.from_pretrained(models / "talk")
    pipe.load_lora_weights(tmp_path / "talk", weight_name=LORA)
    published = modules_to_save(pipe.transformer)
    assert all(torch.equal(value, published[name]) for name, value in make_multitalk().items())

    save_file(make_dwpose(), tmp_path / "dwpose.safetensors")
    options = options_of(models, "dance", module_sizes=None, train_condition_modules=None)
    train(models / "i2v", tmp_path / "dance", **{**options, "condition_modules": tmp_path / "dwpose.safetensors"})
    modules = read_lora(tmp_path / "dance", LORA).modules
    assert all(torch.equal(value, modules[name]) for name, value in make_dwpose().items())


def test_films_hear_their_sound_and_have_it(models, tmp_path):
    options = options_of(models, "talk", validation_image=Path(__file__).parents[1] / "docs" / "images" / "start.png")
    options |= {"validation_prompt": ["a cat", "a dog"], "validation_condition": models / "world" / "a.wav"}
    options |= {"validation_inference_steps": 2, "export_format": "original", "export_dtype": "bfloat16"}
    train(models / "i2v", tmp_path / "run", **options)
    with av.open(str(tmp_path / "run" / "validation" / "step-3.mp4")) as container:
        assert container.streams.audio and container.streams.video[0].frames == 17
    original = load_file(tmp_path / "run" / "pytorch_lora_weights_original.safetensors")
    assert original["diffusion_model.audio_proj.proj2.weight"].dtype == torch.bfloat16
    assert read_lora(tmp_path / "run" / "pytorch_lora_weights_original.safetensors").condition == "audio"
    message = failed(models / "i2v", tmp_path / "long", **{**options, "num_validation_clips": 6})
    assert "`--validation_condition` has 40 frames, which make 5 clips, but 6 are asked for" in message


def test_modules_on_a_small_card(models, tmp_path):
    """Blocks that come and go beside modules that are trained change nothing; a quantized base does."""
    small = {"group_offload": True, "gradient_checkpointing": True}
    for name, options in {"plain": {}, "offload": small, "int8": {"quantize_base": "int8"}}.items():
        train(models / "i2v", tmp_path / name, **options_of(models, "talk", **options))
    assert_same(tmp_path / "plain" / LORA, tmp_path / "offload" / LORA)
    plain, int8 = (
        read_lora(tmp_path / name, LORA).modules["blocks.1.audio_cross_attn.proj.weight"] for name in ("plain", "int8")
    )
    assert plain.any() and not torch.equal(plain, int8)


@pytest.mark.parametrize("preset", ["talk", "dance"])
@pytest.mark.parametrize("trains", [True, False])
def test_modules_in_half_precision(models, tmp_path, preset, trains):
    """Trained ones are kept in float32 all the same."""
    options = options_of(models, preset, mixed_precision="bf16", learning_rate=1e-2, dataloader_num_workers=1)
    if not trains:
        modules = make_multitalk(audio_dim=48) if preset == "talk" else make_dwpose()
        save_file(modules, tmp_path / "modules.safetensors")
        options |= {"condition_modules": tmp_path / "modules.safetensors", "train_condition_modules": None}
        options |= {"module_sizes": None}
    train(models / "i2v", tmp_path / "run", **options)
    modules = read_lora(tmp_path / "run", LORA).modules
    if trains:
        assert {value.dtype for value in modules.values()} == {torch.float32}
        assert all(value.any() for name, value in modules.items() if "weight" in name)


def test_buckets_of_poses(models, tmp_path):
    options = options_of(models, "dance", height=None, width=None, num_frames=None, buckets=["32x32x9", "32x32x13"])
    train(models / "i2v", tmp_path / "run", **options)
    assert read_lora(tmp_path / "run", LORA).modules["dwpose_embedding.12.weight"].any()


def test_what_does_not_go_together_is_one_line(models, tmp_path, train_erft, capsys):
    image = Path(__file__).parents[1] / "docs" / "images" / "start.png"
    cases = [
        ("talk", {"expert": "both"}, "`--condition audio` is for models with one transformer"),
        ("talk", {"expert": "high"}, "Leave out `--expert high`."),
        ("talk", {"fps": "none"}, "`--condition audio` has a row a frame: give `--fps`"),
        ("dance", {"random_flip": True}, "`--random_flip`: in a mirrored skeleton"),
        ("dance", {"audio_encoder": "x"}, "`--audio_encoder` is for `--condition audio`, got pose."),
        ("talk", {"p_no_condition": 2}, "`--p_no_condition` is a share in [0, 1], got 2.0."),
        ("talk", {"conditioning": "held", "reference": "before"}, "`--conditioning held`, for TI2V-5B, has none"),
        ("talk", {"validation_prompt": ["a cat"], "validation_image": image}, "and `--validation_condition`."),
        (
            "talk",
            {"validation_prompt": ["a cat"], "validation_image": image, "validation_condition": "x.wav"},
            "`--validation_condition`='x.wav' is not there.",
        ),
        ("shot", {}, "`--audio_encoder` is for `--condition audio` or `pose`, or `--preset talk` or `dance`."),
    ]
    for preset, options, message in cases:
        given = options_of(models, "talk" if preset == "shot" else preset, **options) | {"preset": preset}
        with pytest.raises(SystemExit) as exit:
            train_erft.parse_args(command(models / "i2v", tmp_path / "run", **given)[2:])
        told = capsys.readouterr().err
        assert exit.value.code == 1 and message in told and told.count("\n") == 1


def test_mistakes_are_told_before_anything_is_encoded(models, tmp_path, train_erft):
    cases = [
        ("i2v", "talk", {"condition_modules": None, "module_sizes": None}, "this model has no modules for it."),
        (
            "i2v",
            "talk",
            {"train_condition_modules": None},
            "fresh modules do nothing. Give `--train_condition_modules`",
        ),
        ("i2v", "talk", {"audio_encoder": None}, "a sound needs an encoder"),
        ("i2v", "dance", {"condition_column": "skeleton"}, "`condition_column`='skeleton' is no column of"),
        ("i2v", "dance", {"module_sizes": ["size=3"]}, "`--module_sizes`: 'size' is none of pose_dim."),
        ("i2v", "dance", {"condition_column": "audio"}, "`pose` of"),
        ("ti2v-5b", "dance", {"width": 64, "height": 64}, "the VAE of this model makes them a 16th."),
    ]
    for kind, preset, options, message in cases:
        given = options_of(models, preset, tmp_path / "cache", **options)
        with pytest.raises(ValueError, match=re.escape(message)):
            train_erft.main(train_erft.parse_args(command(models / kind, tmp_path / "run", **given)[2:]))
    assert not list((tmp_path / "cache").glob("*"))


def test_the_published_encoder_is_read_where_its_safetensors_are(models, tmp_path, monkeypatch, train_erft):
    """From a cache as downloads leave it; on the main branch of its repository are none."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--TencentGameMate--chinese-wav2vec2-base"
    for branch, commit in (("main", "1" * 40), ("refs/pr/1", "2" * 40)):
        (repository / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    (repository / "snapshots" / ("1" * 40)).mkdir(parents=True)
    shutil.copytree(models / "encoder", repository / "snapshots" / ("2" * 40))
    options = options_of(models, "talk", cache_dir=tmp_path) | {"audio_encoder": AUDIO_ENCODER}
    args = train_erft.parse_args(command(models / "i2v", tmp_path / "run", **options)[2:])
    base = dict(make_transformer().config, _class_name="WanTransformer3DModel")
    condition = train_erft.find_condition(args, models / "i2v", base, None, torch.device("cpu"))
    (rows,) = condition.open_film(models / "world" / "a.wav", 1, PixelMotion(1), 32, 32, 9).values()
    local = AudioEncoder(models / "encoder", torch.device("cpu"))
    assert torch.equal(rows[:], open_audio(models / "world" / "a.wav", local.model, args.fps)[:])


def test_modules_under_deepspeed(models, tmp_path):
    """ZeRO-2, with a LoRA and modules."""
    lora = under_deepspeed(2, models / "i2v", tmp_path, **options_of(models, "talk"))
    assert len(lora.state_dict) == 40 and lora.modules["blocks.1.audio_cross_attn.proj.weight"].any()


def test_two_processes_train_modules(models, tmp_path):
    """The first makes the error that it makes by itself, and learns from what the second does too."""
    options = options_of(models, "dance", tmp_path / "cache", max_train_steps=1, checkpointing_steps=1)
    errors, learned = [], []
    for num_processes in (1, 2):
        run = tmp_path / str(num_processes)
        train(models / "i2v", run, num_processes=num_processes, learning_rate=1e-2, **options)
        errors.append(load_file(run / "checkpoint-1" / "bank-0.safetensors")["values"])
        learned.append(read_lora(run, LORA).modules["dwpose_embedding.12.weight"])
    assert torch.equal(*errors) and (run / "checkpoint-1" / "bank-1.safetensors").is_file()
    # A step of Adam is as long as the learning rate: where the second is heeded some go the other way.
    assert (learned[0] - learned[1]).abs().max() > 1e-2
