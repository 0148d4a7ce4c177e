"""SVI-Dance: the transformer that sees poses, the published pose encoder on it, and films that follow poses."""

import itertools
import logging

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import save_file

from conftest import CLIP, make_components, make_transformer, quiet, seeded
from diffusers_svi import LatentMotion, PixelMotion, save_video
from diffusers_svi.conditions.converters import convert_pose, with_modules
from diffusers_svi.conditions.dance_pipeline import SVIDancePipeline
from diffusers_svi.conditions.dance_transformer import PoseEmbedder, SVIDanceTransformer3DModel
from diffusers_svi.conditions.pose import open_pose
from diffusers_svi.memory.model import build
from diffusers_svi.published import PUBLISHED
from test_lora import make_lora
from test_talk import inputs


def make_dwpose(dim: int = 24, pose_dim: int = 4, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What `svi-dance.safetensors` holds beside its LoRA, at any size."""
    shapes = {0: (pose_dim, 3, 3, 3, 3), 12: (dim, pose_dim, 1, 2, 2)}
    shapes |= {2 * index: (pose_dim, pose_dim, 3, 3, 3) for index in range(1, 6)}
    generator, weights = seeded(5), {}
    for index, shape in shapes.items():
        for part, of_part in {"weight": shape, "bias": shape[:1]}.items():
            value = torch.empty(of_part, device="meta")
            weights[f"dwpose_embedding.{index}.{part}"] = (
                value if device == "meta" else torch.randn(of_part, generator=generator) / 4
            )
    return weights


def make_dance(**config) -> SVIDanceTransformer3DModel:
    return with_modules(SVIDanceTransformer3DModel, make_transformer(**config), make_dwpose()).eval()


def pictures(seed: int = 1) -> torch.Tensor:
    return torch.rand(1, 3, 9, 32, 32, generator=seeded(seed))


@torch.no_grad()
def predict(model, pose=None) -> torch.Tensor:
    attention_kwargs = None if pose is None else {"pose": pose}
    return model(**inputs(), attention_kwargs=attention_kwargs, return_dict=False)[0]


# The transformer


def test_the_encoder_equals_the_published_layers():
    """Those that the names of the file count, one after the other, on 84 frames for 81: here 12 for 9."""
    published, pose = make_dwpose(), pictures()
    hidden = torch.cat([pose[:, :, :1], pose[:, :, :1], pose[:, :, :1], pose], dim=2)
    assert hidden.shape[2] == 12
    strides = [(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2), 2, 2, (1, 2, 2)]
    for index, stride in enumerate(strides):
        weight, bias = (published[f"dwpose_embedding.{2 * index}.{part}"] for part in ("weight", "bias"))
        hidden = torch.nn.functional.conv3d(hidden, weight, bias, stride, padding=0 if index == 6 else 1)
        hidden = hidden if index == 6 else hidden * torch.sigmoid(hidden)
    with torch.no_grad():
        tokens = make_dance().pose_embedder(pose)
    assert tokens.shape == (1, 24, 3, 2, 2) and torch.allclose(tokens, hidden, atol=1e-5)


def test_its_tokens_are_added_to_the_patches():
    dance, base, pose = make_dance(), make_transformer(), pictures()
    base.patch_embedding.register_forward_hook(lambda *args: args[2] + dance.pose_embedder(pose))
    assert torch.equal(predict(dance, pose), predict(base))
    assert not torch.allclose(predict(dance, pose), predict(dance), atol=1e-2)


@pytest.mark.parametrize("image_dim", [None, 16])
def test_without_poses_it_is_the_parent_bit_for_bit(image_dim):
    config = {} if image_dim is None else {"image_dim": 16, "added_kv_proj_dim": 24}
    more = {} if image_dim is None else {"encoder_hidden_states_image": torch.randn(1, 5, 16, generator=seeded(3))}
    with torch.no_grad():
        expected = make_transformer(**config)(**inputs(), **more).sample
        assert torch.equal(make_dance(**config)(**inputs(), **more).sample, expected)


def test_with_an_encoder_that_gives_zeros_it_is_the_parent_bit_for_bit():
    dance = make_dance()
    for parameter in dance.pose_embedder.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(predict(dance, pictures()), predict(make_transformer()))


def test_gradients_with_checkpointing_are_those_without():
    dance, gradients = make_dance().train(), []
    for checkpointing in (False, True):
        (dance.enable_gradient_checkpointing if checkpointing else dance.disable_gradient_checkpointing)()
        dance.zero_grad()
        dance(**inputs(), attention_kwargs={"pose": pictures()}).sample.square().sum().backward()
        gradients.append({name: value.grad.clone() for name, value in dance.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(value.abs().max() > 0 for name, value in gradients[0].items() if "pose" in name)


def test_compiled_as_a_whole_it_sees_what_each_call_has():
    dance = make_dance()
    compiled = torch.compile(dance, backend="eager", fullgraph=True)
    for pose in (pictures(1), pictures(2)):
        assert torch.equal(predict(compiled, pose), predict(dance, pose))


def test_it_is_saved_and_loaded_with_its_sizes(tmp_path):
    dance = make_dance()
    dance.save_pretrained(tmp_path)
    loaded = SVIDanceTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config.pose_dim == 4
    assert torch.equal(predict(loaded, pictures()), predict(dance, pictures()))


def test_group_offloading_changes_nothing():
    dance = make_dance()
    expected = predict(dance, pictures())
    dance.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(predict(dance, pictures()), expected)


def test_poses_of_another_shape_are_refused():
    for shape in ((1, 3, 8, 32, 32), (1, 3, 9, 32, 16), (2, 3, 9, 32, 32), (3, 9, 32, 32)):
        with pytest.raises(ValueError, match=r"`pose` must be .* = \(1, 3, 9, 32, 32\), got"):
            predict(make_dance(), torch.zeros(shape))


def test_nothing_is_left_of_a_call_that_failed():
    dance = make_dance()
    expected = predict(dance)
    with pytest.raises(RuntimeError):
        dance(**{**inputs(), "hidden_states": torch.zeros(1, 3, 3, 4, 4)}, attention_kwargs={"pose": pictures()})
    assert torch.equal(predict(dance), expected)


# The published encoder


def test_every_published_tensor_finds_its_place_at_the_true_shapes():
    published = make_dwpose(5120, 16, device="meta")
    base = build(PUBLISHED["wan2.1-i2v-14b-480p"], "transformer")
    dance = with_modules(SVIDanceTransformer3DModel, base, published)
    of_base = base.state_dict()
    own = {name: value.shape for name, value in dance.state_dict().items() if name not in of_base}
    assert len(own) == len(published) == 14
    assert sum(value.numel() for value in published.values()) == 368_752
    assert sorted(own.values()) == sorted(value.shape for value in published.values())
    with torch.device("meta"):
        default = SVIDanceTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120)
        tokens = PoseEmbedder(16, 5120, (1, 2, 2))(torch.empty(1, 3, 81, 480, 832))
    assert tokens.shape == (1, 5120, 21, 30, 52)
    assert {name: value.shape for name, value in default.state_dict().items()} == {
        name: value.shape for name, value in dance.state_dict().items()
    }


def test_the_base_keeps_its_layers_and_shares_them():
    base = make_transformer()
    expected = predict(base)
    dance = with_modules(SVIDanceTransformer3DModel, base, make_dwpose())
    seen = predict(dance, pictures())
    assert type(base) is WanTransformer3DModel and torch.equal(predict(base), expected)
    assert dance.patch_embedding is base.patch_embedding
    again = with_modules(SVIDanceTransformer3DModel, dance, make_dwpose())
    assert torch.equal(predict(again, pictures()), seen)


def test_what_svi_dance_does_not_use_is_named(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers_svi"), "propagate", True)
    weights = convert_pose({**make_dwpose(), "randomref_embedding_pose.0.weight": torch.zeros(2)})
    assert weights.keys() == convert_pose(make_dwpose()).keys()
    assert "is left out, as SVI-Dance does not use it: 'randomref_embedding_pose.0.weight'" in caplog.text


@pytest.mark.parametrize("name", ["dwpose_embedding.1.weight", "dwpose_embedding.14.weight", "dwpose.0.weight"])
def test_a_weight_that_is_none_of_the_encoder_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is no weight of the pose encoder"):
        convert_pose({**make_dwpose(), name: torch.zeros(2)})


# Films


def make_pipe(kind: str = "i2v") -> SVIDancePipeline:
    components = make_components(kind)
    components["transformer"] = with_modules(
        SVIDanceTransformer3DModel, components["transformer"], make_dwpose()
    ).eval()
    return quiet(SVIDancePipeline(**components))


def counted(length: int) -> np.ndarray:
    """Poses whose picture n is of the grey n."""
    return np.arange(length, dtype=np.uint8).repeat(32 * 32 * 3).reshape(length, 32, 32, 3)


@pytest.fixture
def seen(monkeypatch) -> list[list[int]]:
    """The pictures that each call of a dancing transformer saw."""
    rows, forward = [], SVIDanceTransformer3DModel.forward

    def record(self, *args, attention_kwargs=None, **kwargs):
        pose = attention_kwargs["pose"]
        assert pose.shape == (1, 3, 9, 32, 32) and pose.dtype == torch.float32
        rows.append((255 * pose[0, 0, :, 0, 0]).round().int().tolist())
        return forward(self, *args, attention_kwargs=attention_kwargs, **kwargs)

    monkeypatch.setattr(SVIDanceTransformer3DModel, "forward", record)
    return rows


FAST = {**CLIP, "num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.mark.parametrize("scheme", [PixelMotion(1, "reference"), PixelMotion(5), LatentMotion(1)], ids=str)
def test_frame_n_of_the_film_sees_pose_n_through_every_seam_and_on_resume(scheme, image, seen):
    pipe, pose = make_pipe(), counted(scheme.film_length(4, 9))
    options = {"conditioning": scheme, "pose": pose, "seeds": itertools.count(), **FAST}
    clips = list(pipe.stream(image, "a cat sits", **options))
    told = {}
    for clip, pictures_of_clip in zip(clips, seen, strict=True):
        frames = len(clip.frames) + len(clip.tail)
        for number in range(frames):
            told[clip.start + number] = pictures_of_clip[9 - frames + number]
    assert list(told) == list(told.values()) == list(range(len(pose)))
    before, options["seeds"] = seen[2:], itertools.count()
    seen.clear()
    rest = list(make_pipe().stream(prompts="a cat sits", state=clips[1].state, **options))
    assert seen == before
    assert all(np.array_equal(one.frames, other.frames) for one, other in zip(clips[2:], rest, strict=True))


def test_a_film_ends_with_its_poses_the_last_of_which_holds(image, seen):
    film = make_pipe()(image, "a cat sits", pose=counted(12), generator=seeded(), **FAST).frames[0]
    assert len(film) == 17 and seen == [list(range(9)), [8, 9, 10, 11, 11, 11, 11, 11, 11]]
    message = (
        "`pose` has 12 frames, which make 2 clips .* but 3 are asked for by `num_clips`. .* pass `loop_pose=True`"
    )
    with pytest.raises(ValueError, match=message):
        make_pipe().stream(image, "a cat sits", num_clips=3, pose=counted(12), **FAST)


def test_poses_that_loop_begin_again_in_the_film(image, seen):
    options = {"pose": counted(6), "loop_pose": True, "num_clips": 3, **FAST}
    clips = list(make_pipe().stream(image, "a cat sits", generator=seeded(), **options))
    assert len(clips) == 3
    assert seen == [[frame % 6 for frame in range(first, first + 9)] for first in (0, 8, 16)]
    assert clips[0].recipe["settings"]["loop_pose"] is True


def test_both_passes_of_guidance_see_the_pose(image, seen):
    make_pipe()(image, "a cat sits", pose=counted(9), generator=seeded(), **{**CLIP, "num_inference_steps": 1})
    assert seen == [list(range(9))] * 2  # guided by default, as published


def test_pictures_may_be_a_tensor_a_list_or_an_array(image):
    pose = (255 * pictures()[0].permute(1, 0, 2, 3)).byte()
    array = pose.permute(0, 2, 3, 1).numpy()
    films = [
        make_pipe()(image, "a cat", pose=given, generator=seeded(), **FAST).frames[0]
        for given in (pose, array, [PIL.Image.fromarray(picture) for picture in array])
    ]
    assert np.array_equal(films[0], films[1]) and np.array_equal(films[0], films[2])
    other = make_pipe()(image, "a cat", pose=array[::-1], generator=seeded(), **FAST).frames[0]
    assert not np.array_equal(films[0], other)


def test_poses_are_brought_to_the_size_of_the_film(image, seen):
    large = counted(9).repeat(2, axis=1).repeat(2, axis=2)
    make_pipe()(image, "a cat", pose=large, generator=seeded(), **FAST)
    assert seen == [list(range(9))]


def test_poses_out_of_a_video(image, seen, tmp_path):
    save_video(tmp_path / "dance.mp4", 20 * counted(9), fps=16)
    make_pipe()(image, "a cat", pose=str(tmp_path / "dance.mp4"), generator=seeded(), **FAST)
    assert np.allclose(seen, [20 * np.arange(9)], atol=4)


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        (None, "`pose`, which the film is to follow, is missing"),
        (counted(0), "`pose` must be a path, frames .* at least one"),
        (open_pose(counted(9), 64, 32), r"`pose` was opened for a film of 64 x 32 .* this one is 32 x 32. Open it by"),
    ],
    ids=["missing", "none", "of another size"],
)
def test_poses_that_are_none_are_refused(pose, message, image):
    with pytest.raises(ValueError, match=message):
        make_pipe().stream(image, "a cat", pose=pose, **FAST)


def test_an_option_that_is_wrong_is_refused(image):
    with pytest.raises(ValueError, match="`loop_pose` must be `True` or `False`, got 1"):
        make_pipe().stream(image, "a cat", pose=counted(9), loop_pose=1, **FAST)


# Loading


def test_lora_and_encoder_are_loaded_in_one_call(image, tmp_path):
    save_file({**make_lora(make_transformer()), **make_dwpose()}, tmp_path / "svi-dance.safetensors")
    pipe = quiet(SVIDancePipeline(**make_components("i2v")))
    with pytest.raises(ValueError, match="the model has no modules for it"):
        pipe.stream(image, "a cat", pose=counted(9), **FAST)
    pipe.load_lora_weights(tmp_path, weight_name="svi-dance.safetensors", adapter_name="dance")
    assert pipe.has_modules and pipe.lora_conditioning == PixelMotion(1, padding="reference")
    assert pipe.lora_clip_resize == "squash" and pipe.get_list_adapters() == {"transformer": ["dance"]}
    made = pipe(image, "a cat", pose=counted(9), generator=seeded(), **FAST).frames
    other = make_pipe()
    other.load_lora_weights(make_lora(other.transformer), conditioning=PixelMotion(1, "reference"))
    expected = other(image, "a cat", pose=counted(9), generator=seeded(), clip_resize="squash", **FAST).frames
    assert np.array_equal(made, expected)


def test_the_command_tells_what_films_of_a_lora_follow(run_command, tmp_path):
    save_file({**make_lora(make_transformer()), **make_dwpose()}, tmp_path / "svi-dance.safetensors")
    status, output, _ = run_command("inspect", "svi-dance.safetensors")
    assert status == 0 and "follows    pose\n" in output and "padding='reference'" in output


def test_where_something_is_wrong_nothing_has_been_loaded(tmp_path):
    lora = make_lora(make_transformer())
    save_file(lora, tmp_path / "svi-dance.safetensors")
    for source, options, message in (
        (tmp_path, {"weight_name": "svi-dance.safetensors"}, "comes without the pose encoder, `dwpose_embedding`"),
        ({**lora, **make_dwpose(dim=48)}, {}, r"is \(48, 4, 1, 2, 2\), but the layer is \(24, 4, 1, 2, 2\)"),
        ({**lora, "audio_proj.norm.bias": torch.zeros(2)}, {}, "follow audio, .* load it with `SVITalkPipeline`"),
    ):
        pipe = SVIDancePipeline(**make_components("i2v"))
        before = pipe.transformer
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(source, **options)
        assert pipe.transformer is before and not hasattr(before, "peft_config")


def test_a_lora_on_the_patches_comes_and_goes_and_poses_are_seen():
    dance = make_dance()
    expected = predict(dance, pictures())
    dance.add_adapter(LoraConfig(r=2, target_modules=["patch_embedding"]), adapter_name="a")
    assert torch.equal(predict(dance, pictures()), expected)  # its second matrix is of zeros
    dance.delete_adapters("a")
    assert torch.equal(predict(dance, pictures()), expected)
    wrapped = make_transformer()
    wrapped.add_adapter(LoraConfig(r=2, target_modules=["patch_embedding"]), adapter_name="a")
    dance = with_modules(SVIDanceTransformer3DModel, wrapped, make_dwpose())
    assert torch.equal(predict(dance, pictures()), expected)
    dance.unload_lora()
    assert torch.equal(predict(dance, pictures()), expected)


def test_a_saved_pipeline_has_its_encoder(image, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    loaded = quiet(SVIDancePipeline.from_pretrained(tmp_path))
    film, again = (one(image, "a cat", pose=counted(9), generator=seeded(), **FAST).frames for one in (pipe, loaded))
    assert np.array_equal(film, again)
