"""The recipe of a film: everything it is made with, told so that it can be made again."""

import base64
import hashlib
import io
import json
import struct

import av
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from conftest import make_components, quiet
from diffusers_svi import PixelMotion, SVIEulerScheduler, SVIPipeline, boxes
from diffusers_svi.notes import MARK, note
from diffusers_svi.recipe import film_recipe, read_recipe
from test_lora import make_lora


IMAGE = torch.arange(3 * 32 * 32).remainder(256).view(1, 3, 32, 32) / 127.5 - 1
SETTINGS = {"height": 32, "guidance_scale": 5.0, "negative_prompt": "blurry"}


def recipe_of(pipe, **settings) -> dict:
    recipe = film_recipe(pipe, SETTINGS | settings, IMAGE, PixelMotion(5))
    assert json.loads(json.dumps(recipe)) == recipe
    return recipe


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_holds_for_the_film_is_told(i2v, tmp_path):
    i2v.scheduler = SVIEulerScheduler(shift=4.0)
    i2v.save_pretrained(tmp_path)
    pipe = SVIPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    recipe = recipe_of(pipe)
    assert recipe["format"] == "diffusers_svi.recipe" and recipe["versions"]["torch"] == torch.__version__
    assert recipe["model"] == {"name": str(tmp_path), "revision": None, "dtype": "bfloat16"}
    assert recipe["scheme"] == PixelMotion(5).to_dict() and recipe["loras"] == []
    assert recipe["scheduler"]["class"] == "SVIEulerScheduler" and recipe["scheduler"]["shift"] == 4.0
    assert recipe["settings"] == SETTINGS


def test_the_start_image_is_told_exactly(i2v):
    head, _, content = recipe_of(i2v)["image"].partition(",")
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(content)))
    expected = np.arange(3 * 32 * 32).reshape(3, 32, 32) % 256
    assert head == "data:image/png;base64" and np.array_equal(np.asarray(picture), expected.transpose(1, 2, 0))


def test_a_setting_that_is_a_tensor_is_told_in_words(i2v):
    assert recipe_of(i2v, negative_prompt=torch.zeros(2, 3))["settings"]["negative_prompt"] == (
        "a tensor (2, 3) of torch.float32"
    )


def test_the_model_of_the_hub_is_told_with_its_commit(i2v):
    commit = "0123456789" * 4
    i2v.register_to_config(_name_or_path="a/model")
    i2v.transformer.register_to_config(_name_or_path=f"/cache/models--a--model/snapshots/{commit}/transformer")
    assert recipe_of(i2v)["model"]["revision"] == commit
    # A transformer of another model says nothing of this one.
    i2v.transformer.register_to_config(_name_or_path=f"/cache/models--a--finetune/snapshots/{commit}/transformer")
    assert recipe_of(i2v)["model"] == {"name": "a/model", "revision": None, "dtype": "float32"}


@pytest.fixture
def folder(i2v, tmp_path):
    for seed, name in enumerate(("high", "low", "other")):
        save_file(make_lora(i2v.transformer, seed, alpha=3.0), tmp_path / f"{name}.safetensors")
    return tmp_path


def test_a_lora_of_two_files_is_one_with_a_weight_for_each_expert(folder):
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    pipe.load_lora_weights(folder, weight_name="high.safetensors", weight_name_2="low.safetensors")
    pipe.transformer.set_adapters(["default_0"], [0.7])
    pipe.transformer_2.set_adapters(["default_0"], [3.0])
    assert recipe_of(pipe)["loras"] == [
        {
            "adapter": "default_0",
            "name": str(folder),
            "weight_name": "high.safetensors",
            "weight_name_2": "low.safetensors",
            "revision": None,
            "sha256": {
                "transformer": digest(folder / "high.safetensors"),
                "transformer_2": digest(folder / "low.safetensors"),
            },
            "weights": {"transformer": 0.7, "transformer_2": 3.0},
        }
    ]


def test_a_lora_that_is_for_the_second_expert_alone(folder):
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    pipe.load_lora_weights(folder / "low.safetensors", load_into_transformer_2=True)
    (lora,) = recipe_of(pipe)["loras"]
    assert lora["name"] == str(folder / "low.safetensors") and lora["weight_name"] is None
    assert lora["sha256"] == {"transformer_2": digest(folder / "low.safetensors")}
    assert lora["weights"] == {"transformer_2": 1.0}


def test_loras_that_do_nothing_have_no_weight(i2v, folder):
    for name in ("high", "other"):
        i2v.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    i2v.set_adapters("other", 0.5)
    assert [lora["weights"]["transformer"] for lora in recipe_of(i2v)["loras"]] == [0, 0.5]
    i2v.disable_lora()
    assert [lora["weights"]["transformer"] for lora in recipe_of(i2v)["loras"]] == [0, 0]


def test_weights_that_differ_from_layer_to_layer_are_told_by_layer(i2v, folder):
    i2v.load_lora_weights(folder / "high.safetensors")
    layer = i2v.transformer.blocks[0].attn1.to_q
    layer.set_scale("default_0", 0.25)
    (lora,) = recipe_of(i2v)["loras"]
    weights = lora["weights"]["transformer"]
    assert weights.pop("blocks.0.attn1.to_q") == 0.25 and len(weights) == 19 and set(weights.values()) == {1.0}


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_lora_of_the_hub_is_told_with_its_commit(revision, i2v, folder, tmp_path):
    """Also where a branch or tag was asked for, which may move on. From the cache, as it lies on disk."""
    commit, cache = "0123456789" * 4, tmp_path / "cache" / "models--a--lora"
    place = cache / "snapshots" / commit / "version-1" / "svi.safetensors"
    for file in (place, cache / "refs" / (revision or "main")):
        file.parent.mkdir(parents=True)
    (cache / "refs" / (revision or "main")).write_text(commit)
    place.write_bytes((folder / "high.safetensors").read_bytes())
    options = {"subfolder": "version-1", "cache_dir": tmp_path / "cache", "local_files_only": True}
    i2v.load_lora_weights("a/lora", weight_name="svi.safetensors", revision=revision, **options)
    (lora,) = recipe_of(i2v)["loras"]
    expected = {"name": "a/lora", "weight_name": "svi.safetensors", "subfolder": "version-1", "revision": commit}
    assert {name: lora[name] for name in expected} == expected
    assert lora["sha256"] == {"transformer": digest(folder / "high.safetensors")}


def test_a_lora_that_is_found_in_its_folder_is_told_by_its_file(i2v, folder):
    for name in ("low", "other"):
        (folder / f"{name}.safetensors").unlink()
    i2v.load_lora_weights(folder)
    (lora,) = recipe_of(i2v)["loras"]
    assert lora["weight_name"] == "high.safetensors"
    assert lora["sha256"] == {"transformer": digest(folder / "high.safetensors")}


def test_a_lora_goes_out_of_the_recipe_with_its_adapter(i2v, folder):
    i2v.load_lora_weights(folder / "high.safetensors")
    i2v.load_lora_weights(folder / "other.safetensors")
    i2v.delete_adapters("default_0")
    assert [lora["name"] for lora in recipe_of(i2v)["loras"]] == [str(folder / "other.safetensors")]


def test_a_fused_lora_is_told_by_its_weight_and_by_its_scheme_once_it_is_taken_out(i2v, folder):
    i2v.load_lora_weights(folder / "high.safetensors", conditioning=PixelMotion(5))
    i2v.fuse_lora(lora_scale=0.5)
    (lora,) = recipe_of(i2v)["loras"]
    assert lora["weights"] == {"transformer": 0.5}
    i2v.unload_lora_weights()
    recipe = recipe_of(i2v)
    assert recipe["loras"] == [] and recipe["model"]["fused"] == [PixelMotion(5).to_dict()]


def test_a_state_dict_is_told_as_such(i2v):
    i2v.load_lora_weights(make_lora(i2v.transformer))
    (lora,) = recipe_of(i2v)["loras"]
    assert lora["name"] == "a state dict" and lora["sha256"] == {} and lora["weights"] == {"transformer": 1.0}


def write_notes(path, *notes: dict) -> None:
    path.write_bytes(b"".join(note(told, boxes) for told in notes))


def test_a_recipe_that_changed_is_told_by_the_clip_it_changed_at(tmp_path):
    clips = [
        {"index": index, "prompt": "a cat", "start": 0, "spec": {"prompt": "a cat", "seed": index}}
        for index in range(3)
    ]
    write_notes(tmp_path / "film.mp4", {"recipe": {"a": 1}}, clips[0], clips[1], {"recipe": {"a": 2}}, clips[2])
    recipe = read_recipe(tmp_path / "film.mp4")
    assert recipe.film == {"a": 1} and recipe.changes == {2: {"a": 2}}
    assert recipe.clips == [{"prompt": "a cat", "seed": seed} for seed in range(3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text", "cannot be read as a film: it is no MP4 and no Matroska file"),
        (b"#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n", "it is no MP4 and no Matroska file"),
        (b"\0\0\0\x08ftyp", "it is no video"),
        (note({"index": 0}, boxes)[:-4] + b"oops", "`path`=.*cannot be read as a film"),
        (note([1], boxes), "its JSON is no object but list"),
        (struct.pack(">I4s", 8 + 16 + 10**5, b"uuid") + MARK + b"[" * 10**5, "its JSON is nested too deeply"),
    ],
)
def test_files_that_tell_no_recipe(tmp_path, content, message):
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "film.mp4")


def write_comment(path, comment: str) -> None:
    """As other programs write it: a video with a comment."""
    with av.open(str(path), "w") as output:
        output.metadata["comment"] = comment
        stream = output.add_stream("libx264", rate=16)
        stream.width = stream.height = 32
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode())


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("told", "clips"),
    [
        (
            {"prompt": "a cat\n# a thought\n\nit jumps", "seed": 7},
            [{"prompt": "a cat", "seed": 7}, {"prompt": "it jumps"}],
        ),
        ({"prompt": "a cat\nit jumps", "multi_prompts_gen_type": 1}, [{"prompt": "a cat"}, {"prompt": "it jumps"}]),
        (
            {"prompt": "a cat\nsits\n \nit jumps", "multi_prompts_gen_type": "PW"},
            [{"prompt": "a cat\nsits"}, {"prompt": "it jumps"}],
        ),
        ({"prompt": "!enhanced!\na cat\nsits", "multi_prompts_gen_type": 2, "seed": -1}, [{"prompt": "a cat\nsits"}]),
        ({"prompt": "a cat\nsits", "multi_prompts_gen_type": "FG", "seed": "no"}, [{"prompt": "a cat\nsits"}]),
    ],
)
def test_prompts_and_seed_of_wan2gp_are_read(suffix, told, clips, tmp_path):
    others = {"negative_prompt": "bad", "guidance_scale": 5, "num_inference_steps": 30, "model_type": "i2v"}
    write_comment(tmp_path / f"film.{suffix}", json.dumps(told | others))
    recipe = read_recipe(tmp_path / f"film.{suffix}")
    assert recipe.film == {"format": "Wan2GP"} and recipe.clips == clips


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("a holiday", "does not say how it was made"),
        ('{"prompt": ', "cannot be read as a film"),
        ('{"prompt": ["a cat"]}', "does not say how it was made"),
        ('{"prompt": "# only a thought"}', "does not say how it was made"),
        ('{"a":' + "[" * 10**5, "nested too deeply"),
        ('{"a": "' + "a" * 2**24 + '"}', "its comment has 16777225 characters"),
        ('{"format": "diffusers_svi.film", "notes": [1]}', "its comment is not as it was written"),
        ('{"format": "diffusers_svi.film"}', "its comment is not as it was written"),
    ],
)
def test_comments_that_tell_no_recipe(comment, message, tmp_path):
    write_comment(tmp_path / "film.mp4", comment)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "film.mp4")
